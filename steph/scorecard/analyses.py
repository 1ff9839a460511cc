"""Rules for claims that analyses decide: landscapes, alignment, trajectories, cost, attention (4.2, 4.3, 5.2, 5.3, D.2,
D.4, D.6, D.7, E)."""

import pandas as pd

from steph import Refused
from steph.analysis.cost import operations, timing
from steph.analysis.mixing import attention, landscape
from steph.analysis.performance.estimates import BETTER, WORSE, conclusion, with_interval
from steph.methods.registry import title
from steph.scorecard.rules import Evidence, Finding, Rule
from steph.study.paper import paper_table

MARGINAL, MUCH = 1.10, 1.25
"""What takes up to this many times as long as another costs marginally, or clearly, more. The paper gives no border;
its own ratios of epochs are 1.03 (Table S6) and 1.05 (Table S7)."""
SAME_COUNT = 0.01
"""Two counts of operations agree that differ by less than this share."""
MOST = 2 / 3
"""What holds of this share of pairs holds "often"."""


def _often(n: int, of: int, ours: str, what: str) -> Finding:
    """The finding on a claim that something is often so: it agrees for most pairs, and disagrees for less than half."""
    answer = "agrees" if n >= MOST * of else "refuted" if n < of / 2 else "unclear"
    return Finding(f"{n} of {of} {ours}", answer, f"{what}; reproduced from {MOST:.0%} on, not below half")


def _pairs(evidence: Evidence, target: str = "") -> pd.DataFrame:
    """`landscape.summaries` of all targets, or of one; `inside`: is the best lambda on test patients inside (0, 1)?"""
    chosen = [landscape.summaries(planes) for t, planes in evidence.landscapes.items() if planes and target in ("", t)]
    if not chosen:
        raise Refused("no loss landscape was drawn of it.")
    pairs = pd.concat(chosen, ignore_index=True)
    return pairs.assign(inside=pairs["lambda_test"].between(0, 1, inclusive="neither"))


def _better_direction(evidence: Evidence, reading: str) -> Finding:
    """4.2.2, Fig. 4 (c): there are mixtures with less loss than M_t on training and on test patients alike. reading:
    "both", of the mixture itself, or "scaled", of the mixture that w scales (`landscape.summaries`)."""
    pairs = _pairs(evidence)
    both, n = pairs[f"{reading}_low"].notna(), len(pairs)
    ours = f"pairs on both; on test patients alone {pairs['inside'].sum()} of {n}"
    if reading == "scaled":
        ours = f"pairs on both, by a w for each set; by one w for both {pairs['scaled_alike'].sum()} of {n}"
    return _often(both.sum(), n, ours, "pairs with a λ < 1 of less loss than M_t on training and test patients")


def _more_pairs(evidence: Evidence) -> Finding:
    """5.3, D.2: similar results on other pairs."""
    pairs = _pairs(evidence)
    ours = f"pairs; gain in loss {pairs['gain_test'].median():.4f} in the median"
    if "tested_external" in pairs:
        ours += f", and of the same λ on external patients {pairs['tested_external'].median():+.4f}"
    return _often(pairs["inside"].sum(), len(pairs), ours, "pairs whose best λ on test patients is inside (0, 1)")


def _magnitude(evidence: Evidence) -> Finding:
    """4.3: lambda alone may not reach the best point; w reaches further."""
    pairs = _pairs(evidence)
    deeper = pairs["best_test"] - pairs["ray_test"]
    ours = f"pairs; by {deeper.median():.4f} in the median"
    what = "pairs in which scaling by w lowers the least test loss on the line"
    return _often((deeper > 1e-4).sum(), len(pairs), ours, what)


def _blca_lambda(evidence: Evidence) -> Finding:
    """Appendix E: on BLCA the best lambda is large."""
    if "BLCA" not in evidence.study.datasets:
        raise Refused("BLCA is not in this study.")
    best = _pairs(evidence, "BLCA")["lambda_test"]
    near = best.between(0.65, 0.85).sum()
    ours = f"pairs near 0.7 to 0.8; median {best.median():.2f}"
    return _often(near, len(best), ours, "pairs whose best λ on test patients is 0.65 to 0.85")


def _steps_in(evidence: Evidence) -> Finding:
    """5.3, Fig. 8: training moves the mixture into the region of less test loss."""
    ends = evidence.analysis("trajectories", "STEPH was not trained on pairs; the chapter 06_dynamics does.")
    lower = (ends["last_loss"] < ends["first_loss"]).sum()
    ours = f"trainings end below M_t's loss; {lower} below their own first epoch's"
    what = "trainings that end where the test loss is less than M_t's"
    return _often(ends["steps_in"].sum(), len(ends), ours, what)


def _alignment(evidence: Evidence) -> Finding:
    """4.2.2, 5.3: tau_mix stays aligned with tau_t in the attention layer, not in the embedding."""
    lacking = "the alignment of task vectors was not measured; the chapter 05_sar does."
    table = evidence.analysis("alignment", lacking)
    released = table[table["rule"] == "released"].set_index("quantity")
    at, rotated = released.loc["at"], released.loc["rotated"]
    ours = (
        f"pairs have more in attention; SAR {at['attention']:.2f} (attention), {at['embedding']:.2f} (embedding). "
        f"With a rotated source: {rotated['attention']:.2f}, {rotated['embedding']:.2f}"
    )
    what = "pairs in which the attention layer has more, at λ = 0.5, released rule"
    return _often(at["wins"], at["pairs"], ours, what)


def _operations(evidence: Evidence) -> pd.DataFrame:
    """GFLOPs of a prediction by method: in layers, and in all products."""
    counted = evidence.analysis("operations", "operations were not counted; the chapter 07_efficiency does.")
    return counted.set_index("method")[["layers", "products"]] / 1e9


def _cheaper_than_roupkt(evidence: Evidence) -> Finding:
    """5.2 (2), Fig. 2."""
    counted = _operations(evidence)["products"]
    ratio = counted["steph"] / counted["roupkt"]
    ours = f"{counted['steph']:.1f} against {counted['roupkt']:.1f} GFLOPs, {ratio:.0%}"
    return Finding(ours, "agrees" if ratio < 0.5 else "refuted", "counted at the paper's dimensions: under a half")


def _operations_of_networks(evidence: Evidence) -> Finding:
    """Table S4's operations of networks."""
    counted, printed = _operations(evidence)["layers"], pd.Series(operations.printed_gflops()).drop("steph")
    off = (counted[printed.index] / printed - 1).abs()
    same = int((off < SAME_COUNT).sum())
    ours = f"{same} of {len(off)} within {SAME_COUNT:.0%}; the largest difference is {off.max():.1%}"
    return Finding(ours, "agrees" if same == len(off) else "refuted", "counted in layers, at the paper's dimensions")


def _paper_operations_of_networks() -> str:
    printed = operations.printed_gflops().items()
    return ", ".join(f"{title(name)} {value:g}" for name, value in printed if name != "steph")


def _operations_of_steph(evidence: Evidence) -> Finding:
    """Table S4's operations of STEPH (D8 of the differences between paper and release)."""
    counted, printed = _operations(evidence).loc["steph"], operations.printed_gflops()["steph"]
    off = float((counted / printed - 1).abs().min())
    ours = f"{counted['layers']:.2f} in layers, {counted['products']:.2f} in all products"
    because = f"{off:.1%} of the printed number is unexplained, by the count that fits the networks"
    return Finding(ours, "agrees" if off < SAME_COUNT else "refuted", because)


def _hardly_slower(evidence: Evidence, _: str, slow: str, fast: str) -> Finding:
    """An epoch of one method takes hardly longer than another's."""
    times = evidence.epochs
    if times is None or not {slow, fast} <= set(times["method"]):
        raise Refused("the epochs of these methods were not timed.")
    row = timing.epoch_ratios(times, fast).loc[slow]
    ours = f"× {row['ratio']:.3f} (quartiles {row['low']:.3f} to {row['high']:.3f}; {times['device'].iloc[0]})"
    if timing.is_wide(float(row["low"]), float(row["high"])):
        return Finding(ours, "unclear", "not measurable here: the quartiles are too far apart")
    answer = "agrees" if row["ratio"] <= MARGINAL else "refuted" if row["low"] > MUCH else "unclear"
    return Finding(ours, answer, f"reproduced up to × {MARGINAL}, not where the lower quartile is above × {MUCH}")


def _paper_hardly_slower(table: str, slow: str, fast: str) -> str:
    longer, base = paper_table(table).set_index("method")["seconds_mean"][[slow, fast]]
    return f"× {longer / base:.3f} ({longer:.2f} s against {base:.2f} s)"


def _more_attention(evidence: Evidence, zone: str) -> Finding:
    """D.7: STEPH attends more than M_t to something that only an annotation, or a synthetic cohort, tells."""
    table = evidence.analysis("attention", "nobody has marked the tumour on these slides.")
    gain = attention.gain(table, "auc" if zone == "tumour" else f"times_{zone}", unit=["dataset"])
    unit = "AUC" if zone == "tumour" else "× even share"
    text = with_interval(gain.value, gain.low, gain.high, form="+.2f")
    answer = {BETTER: "agrees", WORSE: "reversed"}.get(conclusion(gain), "unclear")
    ours = f"{unit} {text} over {table['dataset'].nunique()} data sets"
    return Finding(ours, answer, "the interval over data sets lies above 0, or below")


RULES = {
    "better_direction": Rule(_better_direction),
    "more_pairs": Rule(_more_pairs),
    "magnitude": Rule(_magnitude),
    "blca_lambda": Rule(_blca_lambda),
    "steps_in": Rule(_steps_in),
    "alignment": Rule(_alignment),
    "cheaper_than_roupkt": Rule(_cheaper_than_roupkt),
    "operations_of_networks": Rule(_operations_of_networks, _paper_operations_of_networks),
    "operations_of_steph": Rule(_operations_of_steph, lambda: f"{operations.printed_gflops()['steph']:g}"),
    "hardly_slower": Rule(_hardly_slower, _paper_hardly_slower),
    "more_attention": Rule(_more_attention),
}
