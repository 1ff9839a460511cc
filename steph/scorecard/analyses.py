"""The paper's claims that analyses decide: landscapes, alignment, trajectories, cost, attention (4.2, 4.3, 5.2, 5.3,
D.2, D.4, D.6, D.7, E)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from steph import Refused
from steph.analysis.cost import operations, timing
from steph.analysis.mixing import attention, landscape
from steph.analysis.performance.estimates import BETTER, WORSE, conclusion, with_interval
from steph.methods.registry import title
from steph.scorecard.rules import Claim, Evidence, Finding
from steph.study.paper import paper_table

MARGINAL, MUCH = 1.10, 1.25
"""What takes up to this many times as long as another costs marginally, or clearly, more. The paper gives no border;
its own ratios of epochs are 1.03 (Table S6) and 1.05 (Table S7)."""
SAME_COUNT = 0.01
"""Two counts of operations agree that differ by less than this share."""
MOST = 2 / 3
"""What holds of this share of pairs holds "often"."""


def _often(n: int, of: int, what: str) -> tuple[str, str]:
    """The answer to a claim that something is often so, and why: of most pairs, or of less than half."""
    answer = "agrees" if n >= MOST * of else "disagrees" if n < of / 2 else "unclear"
    return answer, f"{what}; agrees from {MOST:.0%} on, disagrees below half"


# ------------------------------------------------------------------------------------------ the plane of two vectors


def _summaries(evidence: Evidence, targets: Sequence[str] = ()) -> pd.DataFrame:
    """`landscape.summaries` of all targets, or of these."""
    chosen = {t: planes for t, planes in evidence.landscapes.items() if planes and (not targets or t in targets)}
    if not chosen:
        raise Refused("no loss landscape was drawn of it.")
    return pd.concat([landscape.summaries(planes).assign(target=t) for t, planes in chosen.items()], ignore_index=True)


def _better_direction() -> Claim:
    """4.2.2: there are mixtures with less loss than M_t on training and on test patients alike."""

    def check(evidence: Evidence) -> Finding:
        found = _summaries(evidence)
        both, n = int(found["both_low"].notna().sum()), len(found)
        test = int(((found["lambda_test"] > 0) & (found["lambda_test"] < 1)).sum())
        ours = f"{both} of {n} pairs on both; on test patients alone {test} of {n}"
        return Finding(ours, *_often(both, n, "pairs with a λ of less loss than λ = 1 on training and test patients"))

    text = "mixing opens directions of less loss, on training and test patients alike"
    return Claim("landscape", "4.2.2, Fig. 4", text, lambda: "one pair: both, for λ in [0.7, 0.8]", check)


def _more_pairs() -> Claim:
    """5.3, D.2: similar results on other pairs."""

    def check(evidence: Evidence) -> Finding:
        found = _summaries(evidence)
        inside = (found["lambda_test"] > 0) & (found["lambda_test"] < 1)
        ours = (
            f"{int(inside.sum())} of {len(found)} pairs; gain in loss {found['gain_test'].median():.4f} in the median"
        )
        if "tested_external" in found:
            ours += f", and of the same λ on external patients {found['tested_external'].median():+.4f}"
        return Finding(
            ours, *_often(int(inside.sum()), len(found), "pairs whose best λ on test patients is inside (0, 1)")
        )

    text = "so it is on other pairs: some mixture has less test loss than the target's model"
    return Claim("landscapes", "5.3, Figs. 6, S3", text, lambda: "on every pair shown, on one marginally", check)


def _magnitude() -> Claim:
    """4.3: lambda alone may not reach the best point; w reaches further."""

    def check(evidence: Evidence) -> Finding:
        found = _summaries(evidence)
        deeper = found["best_test"] - found["ray_test"]
        n = int((deeper > 1e-4).sum())
        ours = f"{n} of {len(found)} pairs; by {deeper.median():.4f} in the median"
        return Finding(
            ours, *_often(n, len(found), "pairs in which scaling by w lowers the least test loss on the line")
        )

    text = "λ alone does not reach the least loss; scaling the mixture by w comes nearer"
    return Claim("magnitude", "4.3", text, lambda: "said of Fig. 4, without a number", check)


def _blca_lambda() -> Claim:
    """Appendix E: on BLCA the best lambda is large."""

    def check(evidence: Evidence) -> Finding:
        if "BLCA" not in evidence.study.datasets:
            raise Refused("BLCA is not in this study.")
        best = _summaries(evidence, ["BLCA"])["lambda_test"]
        near = int(best.between(0.65, 0.85).sum())
        ours = f"{near} of {len(best)} pairs near 0.7 to 0.8; median {best.median():.2f}"
        return Finding(ours, *_often(near, len(best), "pairs whose best λ on test patients is 0.65 to 0.85"))

    return Claim(
        "blca-lambda", "E, Fig. S5", "on BLCA the best λ on test patients is large", lambda: "0.7 to 0.8", check
    )


def _steps_in() -> Claim:
    """5.3, Fig. 8: training moves the mixture into the region of less test loss."""

    def check(evidence: Evidence) -> Finding:
        found = evidence.trajectories
        if found is None or found.empty:
            raise Refused("STEPH was not trained on pairs; the chapter 06_dynamics does.")
        n, lower = int(found["steps_in"].sum()), int((found["last_loss"] < found["first_loss"]).sum())
        ours = f"{n} of {len(found)} trainings end below M_t's loss; {lower} below their own first epoch's"
        return Finding(ours, *_often(n, len(found), "trainings that end where the test loss is less than M_t's"))

    text = "training STEPH on a pair moves the mixture to where the test loss is less than the target's model's"
    return Claim("trajectory", "5.3, Fig. 8", text, lambda: "on every pair shown", check)


def _alignment() -> Claim:
    """4.2.2, 5.3: tau_mix stays aligned with tau_t in the attention layer, not in the embedding."""

    def check(evidence: Evidence) -> Finding:
        found = evidence.alignment
        if found is None or found.empty:
            raise Refused("the alignment of task vectors was not measured; the chapter 05_sar does.")
        released = found[found["rule"] == "released"].set_index("quantity")
        own, rotated = released.loc["at"], released.loc["rotated"]
        wins, n = int(own["wins"]), int(own["pairs"])
        ours = (
            f"SAR {own['attention']:.2f} (attention), {own['embedding']:.2f} (embedding); attention has more in {wins} "
            f"of {n} pairs. With a rotated source: {rotated['attention']:.2f}, {rotated['embedding']:.2f}"
        )
        return Finding(ours, *_often(wins, n, "pairs in which the attention layer has more, at λ = 0.5, released rule"))

    text = "the mixture keeps a close alignment with the target in the attention layer, not in the embedding"
    return Claim("alignment", "4.2.2, Figs. 5, 7", text, lambda: "on every pair shown", check)


# ------------------------------------------------------------------------------------------ cost


def _operations(evidence: Evidence) -> pd.DataFrame:
    if evidence.operations is None:
        raise Refused("operations were not counted; the chapter 07_efficiency does.")
    return evidence.operations.set_index("method")


def _cheaper_than_roupkt() -> Claim:
    """5.2 (2), Fig. 2."""

    def check(evidence: Evidence) -> Finding:
        found = _operations(evidence)["products"] / 1e9
        ratio = found["steph"] / found["roupkt"]
        ours = f"{found['steph']:.1f} against {found['roupkt']:.1f} GFLOPs, {ratio:.0%}"
        return Finding(
            ours, "agrees" if ratio < 0.5 else "disagrees", "counted at the paper's dimensions: under a half"
        )

    text = "a prediction of STEPH costs significantly less than ROUPKT's"
    return Claim("cheaper", "5.2 (2), Fig. 2", text, lambda: "drawn, without a number", check, needs_cohort=False)


def _networks_counts() -> Claim:
    """Table S4's operations of networks."""
    printed = operations.printed_gflops

    def check(evidence: Evidence) -> Finding:
        found = _operations(evidence)["layers"] / 1e9
        off = {name: found[name] / p - 1 for name, p in printed().items() if name != "steph"}
        same = sum(abs(share) < SAME_COUNT for share in off.values())
        ours = (
            f"{same} of {len(off)} within {SAME_COUNT:.0%}; the largest difference is {max(map(abs, off.values())):.1%}"
        )
        return Finding(
            ours, "agrees" if same == len(off) else "disagrees", "counted in layers, at the paper's dimensions"
        )

    def paper() -> str:
        return ", ".join(f"{title(name)} {value:g}" for name, value in printed().items() if name != "steph")

    return Claim("operations", "D.4, Table S4", "operations of a prediction of the networks (GFLOPs)", paper, check,
                 needs_cohort=False)  # fmt: skip


def _steph_count() -> Claim:
    """Table S4's operations of STEPH (D8 of the differences between paper and release)."""

    def check(evidence: Evidence) -> Finding:
        row, printed = _operations(evidence).loc["steph"], operations.printed_gflops()["steph"]
        layers, products = row["layers"] / 1e9, row["products"] / 1e9
        ours = f"{layers:.2f} in layers, {products:.2f} in all products"
        off = min(abs(layers / printed - 1), abs(products / printed - 1))
        answer = "agrees" if off < SAME_COUNT else "disagrees"
        return Finding(
            ours, answer, f"{off:.1%} of the printed number is unexplained, by the count that fits the networks"
        )

    return Claim("operations-steph", "D.4, Table S4", "operations of a prediction of STEPH (GFLOPs)",
                 lambda: f"{operations.printed_gflops()['steph']:g}", check, needs_cohort=False)  # fmt: skip


def _slower(id: str, section: str, text: str, table: str, slow: str, fast: str) -> Claim:
    """The claim that an epoch of one method takes hardly longer than another's."""

    def paper() -> str:
        own, base = paper_table(table).set_index("method")["seconds_mean"][[slow, fast]]
        return f"× {own / base:.3f} ({own:.2f} s against {base:.2f} s)"

    def check(evidence: Evidence) -> Finding:
        times = evidence.epochs
        if times is None or not {slow, fast} <= set(times["method"]):
            raise Refused("the epochs of these methods were not timed.")
        row = timing.epoch_ratios(times, fast).set_index("method").loc[slow]
        ours = f"× {row['ratio']:.3f} (quartiles {row['low']:.3f} to {row['high']:.3f}; {times['device'].iloc[0]})"
        answer = "agrees" if row["ratio"] <= MARGINAL else "disagrees" if row["low"] > MUCH else "unclear"
        return Finding(ours, answer, f"agrees up to × {MARGINAL}, disagrees where the lower quartile is above × {MUCH}")

    return Claim(id, section, text, paper, check)


# ------------------------------------------------------------------------------------------ attention


def _attention(id: str, text: str, value: Callable[[pd.DataFrame], pd.Series], unit: str) -> Claim:
    """D.7: STEPH attends more than M_t to something that only an annotation, or a synthetic cohort, tells."""

    def check(evidence: Evidence) -> Finding:
        found = evidence.attention
        if found is None or found.empty:
            raise Refused("nobody has marked the tumour on these slides.")
        gain = attention.gain(found, value(found), unit=["dataset"])
        where = f"over {found['dataset'].nunique()} data sets"
        ours = f"{unit} {with_interval(gain.value, gain.low, gain.high, form='+.2f')} {where}"
        answer = {BETTER: "agrees", WORSE: "disagrees"}.get(conclusion(gain, margin=0), "unclear")
        return Finding(ours, answer, "the interval over data sets lies above 0, or below")

    return Claim(id, "D.7, Fig. S4", text, lambda: "two slides shown, without a number", check)


OF_ANALYSES: list[Claim] = [
    _better_direction(),
    _more_pairs(),
    _magnitude(),
    _alignment(),
    _steps_in(),
    _cheaper_than_roupkt(),
    _networks_counts(),
    _steph_count(),
    _slower("seconds", "D.6, Table S6", "an epoch of STEPH takes hardly longer than AdaMerging's", "table_s6", "steph",
            "adamerging"),
    _slower("seconds-sources", "D.6, Table S7", "12 sources take hardly longer than 6", "table_s7", "steph_m12",
            "steph_m6"),
    _attention("attention-tumour", "STEPH attends more to the tumour than the target's model", lambda t: t["auc"],
               "AUC"),
    _attention("attention-border", "STEPH attends more to the tumour's border than the target's model",
               lambda t: attention.times_even(t, "border"), "× even share"),
    _blca_lambda(),
]  # fmt: skip
