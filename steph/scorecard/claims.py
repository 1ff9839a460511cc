"""The paper's claims that results decide: sections 5.2, 5.3 (dynamics), 5.4, 5.5, D.1, D.3 to D.6 and E."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.cost.operations import learnable_parameters
from steph.analysis.mixing.dynamics import USED_BELOW
from steph.analysis.performance.estimates import MIN_DIFFERENCE, interval
from steph.analysis.performance.statistics import compare
from steph.methods.registry import title
from steph.scorecard.rules import POINTS, Claim, Evidence, Finding, judge_gain, judge_wins
from steph.study.paper import (
    AVERAGE,
    paper_c_index,
    paper_gain,
    paper_labels,
    paper_pair,
    paper_table,
    paper_values,
    paper_wins,
    table_methods,
)
from steph.study.tables import on_common_folds


def _gain_text(gain: float, percent: float) -> str:
    return f"{gain:+.4f} ({percent:+.2f} %)"


def mean_gain(id: str, section: str, text: str, first: str, second: str) -> Claim:
    """The claim that the first method is better than the second on average."""

    def paper() -> str:
        return _gain_text(*paper_gain(first, second))

    def check(evidence: Evidence) -> Finding:
        found = compare(evidence.results, first, second)
        answer, because = judge_gain(found.gain, paper_gain(first, second)[0])
        percent = 100 * found.gain.value / found.base
        return Finding(f"{_gain_text(found.gain.value, percent)}, {interval(found.gain)}", answer, because)

    return Claim(id, section, text, paper, check, pair=(first, second))


def better_than_each(
    id: str, section: str, text: str, pairs: Sequence[tuple[str, str]] | Callable[[], Sequence[tuple[str, str]]]
) -> Claim:
    """The claim that the first of each pair of methods is better on average: it agrees if each does, and disagrees if
    one does."""

    def chosen() -> Sequence[tuple[str, str]]:
        return pairs() if callable(pairs) else pairs

    def paper() -> str:
        gains = [paper_gain(*pair)[0] for pair in chosen()]
        return f"{sum(g > 0 for g in gains)} of {len(gains)}; from {min(gains):+.4f} to {max(gains):+.4f}"

    def check(evidence: Evidence) -> Finding:
        gains = [compare(evidence.results, *pair).gain for pair in chosen()]
        answers = [judge_gain(g, paper_gain(*pair)[0])[0] for g, pair in zip(gains, chosen(), strict=True)]
        values = [g.value for g in gains]
        ours = f"{sum(v > 0 for v in values)} of {len(values)}; from {min(values):+.4f} to {max(values):+.4f}"
        counts = ", ".join(f"{answers.count(a)} {words}" for a, words in POINTS.items())
        answer = "disagrees" if "disagrees" in answers else "agrees" if set(answers) == {"agrees"} else "unclear"
        return Finding(ours, answer, f"one by one: {counts}")

    return Claim(id, section, text, paper, check)


def wins(id: str, section: str, text: str, first: str, second: str) -> Claim:
    """The claim that the first method is better than the second on so many data sets."""

    def paper() -> str:
        return "{} of {}".format(*paper_wins(first, second))

    def check(evidence: Evidence) -> Finding:
        found = compare(evidence.results, first, second)
        n, count = len(found.gains), found.wins
        won, of = paper_wins(first, second)
        # Fewer data sets than the paper's: the same share of them.
        answer, because = judge_wins(count, n, int(np.ceil(won * n / of)))
        return Finding(f"{count.value} of {n}, {interval(count, '.0f')}", answer, because)

    return Claim(id, section, text, paper, check)


def _check_cohort(evidence: Evidence) -> Finding:
    table = evidence.cohort
    if table is None:
        raise Refused("the cohort was not counted.")
    known = table[table["paper_patients"].notna()]
    columns = ["patients", "slides", "survival_rate_pct"]
    same = sum(int((known[c] == known[f"paper_{c}"]).sum()) for c in columns)
    total = 3 * len(paper_table("table_s1_datasets"))
    if evidence.study.synthetic:
        answer, because = "unclear", f"it is made at {evidence.study.synthetic.scale:g} of the size, on purpose"
    else:
        answer = "agrees" if same == total else "disagrees"
        because = "patients, slides and survival rate of each data set, number by number"
    return Finding(
        f"{same} of {total} numbers; {int(known['patients'].sum()):,} patients, {int(known['slides'].sum()):,} slides",
        answer, because,
    )  # fmt: skip


def _paper_cohort() -> str:
    table = paper_table("table_s1_datasets")
    return f"{3 * len(table)} numbers; {table['patients'].sum():,} patients, {table['wsis'].sum():,} slides"


def _check_parameters(_: Evidence) -> Finding:
    printed = paper_table("table_s4").set_index("method")["learnable_params_m"]
    counts = learnable_parameters()
    same = sum(round(n / 1e6, 2) == printed[name] for name, n in counts.items())
    return Finding(
        f"{same} of {len(printed)} counts; ABMIL {counts['vanilla'] / 1e6:.2f} M, STEPH {counts['steph'] / 1e6:.2f} M",
        "agrees" if same == len(printed) else "disagrees",
        "counted on our models at the paper's dimensions; no patients are involved",
    )


def _paper_parameters() -> str:
    printed = paper_table("table_s4").set_index("method")["learnable_params_m"]
    return f"{len(printed)} counts; ABMIL {printed['vanilla']:.2f} M, STEPH {printed['steph']:.2f} M"


def sources_used(figure: str, target: str, sources: Sequence[str], below: float = USED_BELOW) -> Claim:
    """The claim that training leads a target to use certain sources (final w > 0, lambda < below)."""
    names = ", ".join(sources)

    def check(evidence: Evidence) -> Finding:
        course = evidence.dynamics.get(target)
        if course is None:
            raise Refused(f"STEPH was not run on {target}.")
        last = course[course["epoch"] == course["epoch"].max()]
        chosen = last[last["source"].isin(sources)]
        used = ((chosen["w"] > 0) & (chosen["lambda"] < below)).groupby(chosen["seed"]).sum()
        whole, n = int((used == len(sources)).sum()), len(used)
        ours = f"all of them in {whole} of {n} start(s); on average {used.mean():.1f} of {len(sources)}"
        if n < 3:
            return Finding(ours, "unclear", "fewer than three starts; run 06_dynamics on it")
        answer = "agrees" if whole > n / 2 else "disagrees" if whole == 0 else "unclear"
        return Finding(ours, answer, "agrees if all are used in most starts, disagrees if in none")

    text = f"for {target}, training comes to use {names} (w > 0, λ < {below:g})"
    return Claim(
        f"sources-{target}", figure, text, lambda: f"{len(sources)} of {len(sources)} in the one start shown", check
    )


MERGING = ("model_average", "adamerging", "ties_am", "surgery_am", "iso_c_am")
"""The existing merging methods of Table 1."""
HYPERNETWORK = (
    ("adamerging_hyper", "adamerging"),
    ("ties_hyper", "ties_am"),
    ("surgery_hyper", "surgery_am"),
    ("iso_c_hyper", "iso_c_am"),
)
"""Table 3's pairs: weights of the hypernetwork against the method's own."""
NETWORKS = ("vanilla", "transmil", "ilra", "r2t_mil", "patch_gcn")
"""Table S2's networks, trained on the target alone."""


def _over_best(names: Sequence[str]) -> Claim:
    """The claim that STEPH beats the best of several methods, the best being chosen by the very numbers (which favours
    it)."""

    def paper() -> str:
        best = max(names, key=lambda m: paper_c_index(m, "table_s2")[AVERAGE])
        return f"{_gain_text(*paper_gain('steph', best))} over {title(best)}"

    def check(evidence: Evidence) -> Finding:
        found = {m: compare(evidence.results, "steph", m) for m in names}
        best = min(found, key=lambda m: found[m].gain.value)
        gain = found[best].gain
        text = _gain_text(gain.value, 100 * gain.value / found[best].base)
        expected = min(paper_gain("steph", m)[0] for m in names)
        answer, because = judge_gain(gain, expected)
        return Finding(f"{text} over {title(best)}, {interval(gain)}", answer, because)

    text = "STEPH is better than the best of the MIL networks"
    return Claim("networks-best", "D.4", text, paper, check)


def _hypernetwork_weights() -> Claim:
    """The claim of Table 3 about the mean over its four methods."""

    def paper() -> str:
        gains = [paper_gain(*pair) for pair in HYPERNETWORK]
        return _gain_text(*(float(np.mean(values)) for values in zip(*gains, strict=True)))

    def check(evidence: Evidence) -> Finding:
        alone = {pair: compare(evidence.results, *pair) for pair in HYPERNETWORK}
        # The mean over the four, cell by cell, is compared as if it were one method: its interval knows that the four
        # share their patients.
        side = {m: i for pair in HYPERNETWORK for i, m in enumerate(pair)}
        cells = evidence.results[evidence.results["method"].isin(side)]
        cells = cells.assign(method=cells["method"].map(side).map({0: "hypernetwork", 1: "own"}))
        cell = [c for c in ("dataset", "method", "fold", "folds") if c in cells]
        mean = cells.groupby(cell, sort=False)["c_index"].mean().reset_index()
        gain = compare(mean, "hypernetwork", "own").gain
        percent = float(np.mean([100 * c.gain.value / c.base for c in alone.values()]))
        answer, because = judge_gain(gain, float(np.mean([paper_gain(*pair)[0] for pair in HYPERNETWORK])))
        return Finding(f"{_gain_text(gain.value, percent)}, {interval(gain)}", answer, because)

    text = "weights that the hypernetwork gives improve existing merging methods (mean of four)"
    return Claim("hypernetwork-weights", "5.5, Table 3", text, paper, check)


def _mild(id: str, table: str, symbol: str, mild: str) -> Claim:
    """The claim that a mild penalty is best: better than none and better than the strongest tried. mild: the method
    whose row is the paper's mildest best."""

    def extremes() -> tuple[str, str]:
        names = table_methods(table)
        return names[0], names[-1]

    def paper_gains() -> list[float]:
        values = [float(paper_c_index(m, table)[AVERAGE]) for m in (mild, *extremes())]
        return [values[0] - other for other in values[1:]]

    def best(means: pd.Series) -> str:
        top = means[means == means.max()].rename(paper_labels(table))
        return f"best at {symbol} = {' and '.join(top.index)}"

    def paper() -> str:
        none, strong = paper_gains()
        return f"{best(paper_values(table)[AVERAGE])}; {none:+.4f} over none, {strong:+.4f} over the strongest"

    def check(evidence: Evidence) -> Finding:
        gains = [compare(evidence.results, mild, m) for m in extremes()]
        cells = on_common_folds(evidence.results, [mild, *table_methods(table)])
        means = cells.groupby(["method", "dataset"])["c_index"].mean().groupby("method").mean()
        answers = [judge_gain(found.gain, gain) for found, gain in zip(gains, paper_gains(), strict=True)]
        kinds = {answer for answer, _ in answers}
        answer = "disagrees" if "disagrees" in kinds else "agrees" if kinds == {"agrees"} else "unclear"
        none, strong = (f"{found.gain.value:+.4f} ({interval(found.gain)})" for found in gains)
        because = next(because for given, because in answers if given == answer)
        return Finding(
            f"{best(means)}; {none} over none, {strong} over the strongest",
            answer,
            because,
        )

    number = table.removeprefix("table")
    return Claim(id, f"5.5, Table {number}", f"a mild penalty ({symbol}) is better than none and than a strong one",
                 paper, check)  # fmt: skip


def _beta_on_blca() -> Claim:
    """The conjecture of Appendix E: on BLCA a smaller beta may be better."""

    def check(evidence: Evidence) -> Finding:
        own = evidence.results[evidence.results["dataset"] == "BLCA"]
        if own.empty:
            raise Refused("BLCA is not in this study.")
        smaller = [name for name, beta in paper_labels("table4").items() if float(beta) < 0.05]
        gains = {m: compare(own, m, "steph").gain for m in smaller}
        ours = "; ".join(f"{title(m)}: {gain.value:+.4f}, {interval(gain)}" for m, gain in gains.items())
        if any(gain.low > 0 and gain.value >= MIN_DIFFERENCE for gain in gains.values()):
            return Finding(ours, "agrees", "one of them is better by at least the margin, its interval above 0")
        if all(gain.high < MIN_DIFFERENCE for gain in gains.values()):
            return Finding(ours, "disagrees", "none of them can be better by the margin")
        return Finding(ours, "unclear", "five folds of one data set do not tell differences of this size")

    text = "on BLCA, where STEPH falls behind ROUPKT most, a smaller β may be better"
    return Claim("blca-beta", "E", text, lambda: "a conjecture, without a number", check)


def _roupkt_better() -> Claim:
    """Appendix E: ROUPKT is ahead on some data sets, most on BLCA."""

    def text_of(gains: pd.Series) -> str:
        ahead = gains[gains > 0]
        where = f", most on {ahead.idxmax()} ({ahead.max():+.4f})" if len(ahead) else ""
        return f"{len(ahead)} of {len(gains)}{where}"

    def paper() -> str:
        pair = paper_pair("roupkt", "steph")
        return text_of(pair["first"] - pair["second"])

    def check(evidence: Evidence) -> Finding:
        found = compare(evidence.results, "roupkt", "steph")
        ours = f"{text_of(found.gains['gain'])}, {interval(found.wins, '.0f')}"
        if "BLCA" not in found.gains.index:
            return Finding(ours, "unclear", "BLCA is not in this study")
        on = compare(evidence.results[evidence.results["dataset"] == "BLCA"], "roupkt", "steph").gain
        pair = paper_pair("roupkt", "steph").loc["BLCA"]
        answer, because = judge_gain(on, float(pair["first"] - pair["second"]))
        return Finding(ours, answer, f"decided on BLCA, {on.value:+.4f} ({interval(on)}): {because}")

    return Claim("roupkt-better", "E", "ROUPKT is better on some data sets, most on BLCA", paper, check)


OF_RESULTS: list[Claim] = [
    Claim(
        "cohort", "Table S1", "13 data sets with these patients, slides, survival rates", _paper_cohort, _check_cohort
    ),
    # 5.2, Table 1
    mean_gain("gain", "5.2 (1)", "STEPH is better than the cancer's own model on average", "steph", "vanilla"),
    wins("wins", "5.2 (1)", "STEPH is better than the cancer's own model on nearly all data sets", "steph", "vanilla"),
    mean_gain("over-roupkt", "5.2 (2)", "STEPH is better than ROUPKT on average", "steph", "roupkt"),
    wins("wins-roupkt", "5.2 (2)", "STEPH is better than ROUPKT on most data sets", "steph", "roupkt"),
    better_than_each(
        "merging-worse", "5.2 (3)", "the cancer's own model is better than each existing merging method",
        [("vanilla", m) for m in MERGING],
    ),
    mean_gain("average-worse", "5.2 (3)", "averaging models is worse than the cancer's own model", "vanilla",
              "model_average"),
    wins("average-all", "5.2 (3)", "averaging is worse on every data set", "vanilla", "model_average"),
    mean_gain("over-average", "5.2 (3)", "STEPH is better than averaging", "steph", "model_average"),
    # 5.3 and D.1: what training comes to use
    sources_used("Fig. 9", "BRCA", ["KIPAN", "COADREAD", "BLCA"], below=0.3),
    sources_used("Fig. S1", "KIPAN", ["HNSC", "STES", "CESC", "SARC"]),
    sources_used("Fig. S2", "LUNG", ["HNSC", "STES", "CESC"]),
    # 5.4, Table 2
    mean_gain("over-lambda0", "5.4 (1)", "mixing is better than the sources' vectors alone (λ = 0)", "steph",
              "steph_lambda0"),
    mean_gain("over-lambda0-target", "5.4 (1)", "mixing is better than the target as one more source", "steph",
              "steph_lambda0_with_target"),
    mean_gain("over-lambda1", "5.4 (1)", "mixing is better than the target's vector alone (λ = 1)", "steph",
              "steph_lambda1"),
    mean_gain("over-param-lambda", "5.4 (1)", "λ from the hypernetwork is slightly better than one trained λ", "steph",
              "steph_param_lambda"),
    mean_gain("over-param-w", "5.4 (2)", "w from the hypernetwork is crucial, against one w for all patients", "steph",
              "steph_param_w"),
    mean_gain("over-dense", "5.4 (2)", "keeping K mixtures is better than keeping all", "steph", "steph_dense"),
    # 5.5, Tables 3 to 5
    _hypernetwork_weights(),
    better_than_each("hypernetwork-each", "5.5, Table 3", "and they improve each of the four", HYPERNETWORK),
    _mild("beta", "table4", "β", "steph"),
    _mild("gamma", "table5", "γ", "steph_gamma0.005"),
    # Appendix D.3 to D.6
    better_than_each(
        "k", "D.3, Table S3", "K = 5 is better than keeping more than half of the mixtures",
        [("steph", m) for m in ("steph_k7", "steph_k9", "steph_k11", "steph_dense")],
    ),
    _over_best(NETWORKS),
    better_than_each("networks-each", "D.4", "STEPH is better than each MIL network", [("steph", m) for m in NETWORKS]),
    better_than_each("patch-gcn", "D.4", "Patch-GCN is the best of the networks",
                     [("patch_gcn", m) for m in NETWORKS if m != "patch_gcn"]),
    Claim("parameters", "D.4, Table S4", "STEPH trains hardly more parameters than ABMIL, fewer than other networks",
          _paper_parameters, _check_parameters, needs_cohort=False),
    wins("wins-param-lambda", "D.5", "λ from the hypernetwork is better on most data sets", "steph",
         "steph_param_lambda"),
    wins("wins-param-w", "D.5", "w from the hypernetwork is better on most data sets", "steph", "steph_param_w"),
    wins("wins-lambda1", "D.5", "mixing is better than λ = 1 on most data sets", "steph", "steph_lambda1"),
    wins("wins-dense", "D.5", "keeping K mixtures is better on most data sets", "steph", "steph_dense"),
    # Appendix E
    _roupkt_better(),
    _beta_on_blca(),
]  # fmt: skip
