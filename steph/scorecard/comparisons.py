"""Rules for claims that results, counts and final weights decide: sections 5.2, 5.3 (dynamics), 5.4, 5.5, D.1, D.3 to
D.5 and E."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.cost.operations import built, trained_numbers
from steph.analysis.performance.estimates import BETTER, WORSE, conclusion, interval
from steph.analysis.performance.statistics import Comparison, compare
from steph.methods.registry import METHODS, title
from steph.scorecard import rules
from steph.scorecard.rules import Evidence, Finding, Rule, all_of, judge_gain, judge_wins
from steph.study import paper
from steph.study.tables import on_common_folds

OURS, PAPERS = "+.3f", "+.4f"
"""How gains are written: the paper's with as many decimals as it prints."""
IS_ONE = 0.95
"""A lambda from here on is read off the paper's figure as 1."""


def hypernetwork_pairs() -> list[tuple[str, str]]:
    """Table 3's pairs: a merging method with the hypernetwork's weights, and with its own."""
    names = paper.table_methods("table3")
    return list(zip(names[1::2], names[::2], strict=True))


def pairs_of(first: str, others: str | Sequence[str]) -> list[tuple[str, str]]:
    """A method with each of others. others: names, or "merging" (the other merging methods of Table 1), "networks" (the
    networks of Table S2, trained on the target alone); or "hypernetwork" with "own", for `hypernetwork_pairs`."""
    if first == "hypernetwork":
        return hypernetwork_pairs()
    if others == "merging":
        others = [m for m in paper.table_methods("table1") if METHODS[m].group == "model_merging" and m != "steph"]
    elif others == "networks":
        others = [m for m in paper.table_methods("table_s2") if m not in ("steph", first)]
    return [(first, other) for other in others]


def _text(gain: float, percent: float, form: str = PAPERS) -> str:
    return f"{gain:{form}} ({percent:+.2f} %)"


def _gain_here(comparison: Comparison) -> str:
    return _text(comparison.gain.value, 100 * comparison.gain.value / comparison.base, OURS)


def _interval(comparison: Comparison) -> str:
    return f"{interval(comparison.on_these())}; {comparison.n_folds} fold(s)"


def _gain(evidence: Evidence, first: str, second: str) -> Finding:
    """The first method is better than the second on average."""
    found = compare(evidence.results, first, second)
    answer, because = judge_gain(found, paper.paper_gain(first, second)[0])
    return Finding(f"{_gain_here(found)}, {_interval(found)}", answer, because)


def _wins(evidence: Evidence, first: str, second: str) -> Finding:
    """The first method is better than the second on so many data sets; of fewer than the paper's, on the same share."""
    found = compare(evidence.results, first, second)
    won, of = paper.paper_wins(first, second)
    answer, because = judge_wins(found, int(np.ceil(won * len(found.gains) / of)))
    return Finding(found.wins_text, answer, because)


def _above_zero(gains: Sequence[float], form: str = PAPERS) -> str:
    return f"{sum(g > 0 for g in gains)} of {len(gains)}; from {min(gains):{form}} to {max(gains):{form}}"


def _gain_over_each(evidence: Evidence, first: str, others: str | Sequence[str]) -> Finding:
    """The first method is better than each of others on average."""
    found = {pair: compare(evidence.results, *pair) for pair in pairs_of(first, others)}
    judged = [judge_gain(gains, paper.paper_gain(*pair)[0], len(found)) for pair, gains in found.items()]
    answers, answer = [a for a, _ in judged], all_of(a for a, _ in judged)
    counts = ", ".join(f"{answers.count(a)} {words}" for a, words in rules.VERDICTS.items() if a in answers)
    because = next(because for a, because in judged if a == answer)
    ours = _above_zero([each.gain.value for each in found.values()], OURS)
    return Finding(ours, answer, f"one by one: {counts}; {because}")


def _gain_over_best(evidence: Evidence, first: str, others: str) -> Finding:
    """The first method beats the best of others, the best being chosen by the very numbers (which favours it)."""
    found = {other: compare(evidence.results, first, other) for _, other in pairs_of(first, others)}
    best = min(found, key=lambda m: found[m].gain.value)
    answer, because = judge_gain(found[best], min(paper.paper_gain(first, m)[0] for m in found))
    text = f"{_gain_here(found[best])} over {title(best)}, {_interval(found[best])}"
    return Finding(text, answer, because)


def _paper_gain_over_best(first: str, others: str) -> str:
    best = min((m for _, m in pairs_of(first, others)), key=lambda m: paper.paper_gain(first, m)[0])
    return f"{_text(*paper.paper_gain(first, best))} over {title(best)}"


def _hypernetwork_weights(evidence: Evidence) -> Finding:
    """Table 3's mean over its four methods. It is compared cell by cell, as if it were one method: its interval knows
    that the four share their patients."""
    pairs = hypernetwork_pairs()
    alone = [compare(evidence.results, *pair) for pair in pairs]
    side = {m: name for pair in pairs for m, name in zip(pair, ("hypernetwork", "own"), strict=True)}
    cells = evidence.results.assign(method=evidence.results["method"].map(side))
    cell = [c for c in ("dataset", "method", "fold", "folds") if c in cells]
    mean = compare(cells.groupby(cell)["c_index"].mean().reset_index(), "hypernetwork", "own")
    percent = float(np.mean([100 * c.gain.value / c.base for c in alone]))
    answer, because = judge_gain(mean, float(np.mean([paper.paper_gain(*pair)[0] for pair in pairs])))
    return Finding(f"{_text(mean.gain.value, percent, OURS)}, {_interval(mean)}", answer, because)


def _paper_hypernetwork_weights() -> str:
    return _text(*np.mean([paper.paper_gain(*pair) for pair in hypernetwork_pairs()], axis=0))


def _mild_penalty(evidence: Evidence, table: str, symbol: str, mild: str) -> Finding:
    """A mild penalty is best: better than none and better than the strongest tried. mild: the method whose row is the
    paper's mildest best."""
    names = paper.table_methods(table)
    found = [compare(evidence.results, mild, m) for m in (names[0], names[-1])]
    judged = [judge_gain(gain, printed, 2) for gain, printed in zip(found, _paper_extremes(table, mild), strict=True)]
    answer = all_of(a for a, _ in judged)
    because = next(because for a, because in judged if a == answer)
    cells = on_common_folds(evidence.results, [mild, *names])
    means = cells.groupby(["method", "dataset"])["c_index"].mean().groupby("method").mean()
    texts = [f"{each.gain.value:{OURS}} ({_interval(each)})" for each in found]
    return Finding(_best(means, table, symbol, *texts), answer, because)


def _best(means: pd.Series, table: str, symbol: str, none: str, strong: str) -> str:
    top = means[means == means.max()].rename(paper.paper_labels(table))
    return f"best at {symbol} = {' and '.join(top.index)}; {none} over none, {strong} over the strongest"


def _paper_extremes(table: str, mild: str) -> list[float]:
    """What the paper's mild value gains over none and over the strongest."""
    means = paper.paper_values(table)[paper.AVERAGE]
    return [float(means[mild] - means.iloc[i]) for i in (0, -1)]


def _paper_mild_penalty(table: str, symbol: str, mild: str) -> str:
    texts = [f"{gain:+.4f}" for gain in _paper_extremes(table, mild)]
    return _best(paper.paper_values(table)[paper.AVERAGE], table, symbol, *texts)


def _smaller_beta_on_blca(evidence: Evidence) -> Finding:
    """The conjecture of Appendix E: on BLCA a smaller beta may be better."""
    results = evidence.results[evidence.results["dataset"] == "BLCA"]
    if results.empty:
        raise Refused("BLCA is not in this study.")
    smaller = [name for name, beta in paper.paper_labels("table4").items() if float(beta) < 0.05]
    found = {m: compare(results, m, "steph") for m in smaller}
    gains = {m: each.on_these(1 - 0.05 / len(smaller)) for m, each in found.items()}
    ours = "; ".join(f"{title(m)}: {gain.value:{OURS}}, {interval(gain)}" for m, gain in gains.items())
    conclusions = {conclusion(gain) for gain in gains.values()}
    answer = "agrees" if BETTER in conclusions else "reversed" if conclusions == {WORSE} else "small"
    because = "decided by whether an interval lies above 0; two are asked, so each is a little wider"
    best = max(gains, key=lambda m: gains[m].value)
    if np.isnan(gains[best].low):
        return Finding(ours, "unclear", "one fold of one data set gives no interval")
    if answer == "small":
        because += f"; were all gains as they are here, {rules.to_show(found[best], gains[best].value)}"
    return Finding(ours, answer, because)


def _ahead(gains: pd.Series, form: str = PAPERS) -> str:
    ahead = gains[gains > 0]
    where = f", most on {ahead.idxmax()} ({ahead.max():{form}})" if len(ahead) else ""
    return f"{len(ahead)} of {len(gains)}{where}"


def _paper_roupkt_ahead() -> pd.Series:
    pair = paper.paper_pair("roupkt", "steph")
    return pair["first"] - pair["second"]


def _roupkt_ahead(evidence: Evidence) -> Finding:
    """Appendix E: ROUPKT is ahead on some data sets, most on BLCA."""
    found = compare(evidence.results, "roupkt", "steph")
    ours = f"{_ahead(found.gains['gain'], OURS)}, {interval(found.wins(), '.0f')}; {found.n_folds} fold(s)"
    if "BLCA" not in found.gains.index:
        return Finding(ours, "unclear", "BLCA is not in this study")
    there = compare(evidence.results[evidence.results["dataset"] == "BLCA"], "roupkt", "steph")
    answer, because = judge_gain(there, float(_paper_roupkt_ahead()["BLCA"]))
    return Finding(ours, answer, f"decided on BLCA, {there.gain.value:{OURS}} ({_interval(there)}): {because}")


def _last_epoch(evidence: Evidence, target: str) -> pd.DataFrame:
    if target not in evidence.dynamics:
        raise Refused(f"STEPH was not run on {target}.")
    course = evidence.dynamics[target]
    return course[course["epoch"] == course["epoch"].max()]


def _in_starts(last: pd.DataFrame, sources: pd.Series, least: int, because: str) -> Finding:
    """Is there the least number of such sources in most starts? last: the last epoch; sources: which rows are such."""
    counts = sources.groupby(last["seed"]).sum()
    enough, n = int((counts >= least).sum()), len(counts)
    ours = f"{least} or more in {enough} of {n} start(s); on average {counts.mean():.1f}"
    if n < 3:
        return Finding(ours, "unclear", "fewer than three starts; run 06_dynamics on it")
    answer = "agrees" if enough > n / 2 else "refuted" if enough == 0 else "unclear"
    return Finding(ours, answer, f"{because}; reproduced if so in most starts, not if in none")


def _sources_used(evidence: Evidence, target: str, sources: Sequence[str], below: float) -> Finding:
    """Training leads a target to use certain sources (final w > 0, lambda < below)."""
    last = _last_epoch(evidence, target)
    used = last["source"].isin(sources) & (last["w"] > 0) & (last["lambda"] < below)
    return _in_starts(last, used, len(sources), "sources of these that are used")


def _only_scaled(evidence: Evidence, target: str, least: int) -> Finding:
    """Some mixtures are the target's own vector, by lambda = 1, and have a larger w, above the median of all."""
    last = _last_epoch(evidence, target)
    larger = last["w"] > last.groupby("seed")["w"].transform("median")
    return _in_starts(last, larger & (last["lambda"] >= IS_ONE), least, f"λ ≥ {IS_ONE} and w above the median")


def _cohort(evidence: Evidence) -> Finding:
    """Table S1, number by number."""
    table = evidence.analysis("cohort", "the cohort was not counted.").dropna(subset="paper_patients")
    total = 3 * len(paper.paper_table("table_s1"))
    same = 3 * len(table) - len(rules.differing_counts(table))
    ours = f"{same} of {total} numbers; {table['patients'].sum():,} patients, {table['slides'].sum():,} slides"
    if evidence.study.synthetic:
        scale = evidence.study.synthetic.scale
        return Finding(ours, "unclear", f"it is made at {scale:g} of the size, on purpose")
    because = "patients, slides and survival rate of each data set, number by number"
    return Finding(ours, "agrees" if same == total else "refuted", because)


def _paper_cohort() -> str:
    table = paper.paper_table("table_s1")
    return f"{3 * len(table)} numbers; {table['patients'].sum():,} patients, {table['wsis'].sum():,} slides"


def _parameters(_: Evidence) -> Finding:
    printed = paper.paper_table("table_s4").set_index("method")["learnable_params_m"]
    counts = {name: trained_numbers(built(name)) for name in printed.index}
    same = sum(round(n / 1e6, 2) == printed[name] for name, n in counts.items())
    ours = f"ABMIL {counts['vanilla'] / 1e6:.2f} M, STEPH {counts['steph'] / 1e6:.2f} M"
    because = "counted on our models at the paper's dimensions; no patients are involved"
    return Finding(f"{same} of {len(printed)} counts; {ours}", "agrees" if same == len(printed) else "refuted", because)


def _paper_parameters() -> str:
    printed = paper.paper_table("table_s4").set_index("method")["learnable_params_m"]
    return f"{len(printed)} counts; ABMIL {printed['vanilla']:.2f} M, STEPH {printed['steph']:.2f} M"


RULES = {
    "gain": Rule(_gain, lambda first, second: _text(*paper.paper_gain(first, second))),
    "wins": Rule(_wins, lambda first, second: "{} of {}".format(*paper.paper_wins(first, second))),
    "gain_over_each": Rule(
        _gain_over_each,
        lambda first, others: _above_zero([paper.paper_gain(*pair)[0] for pair in pairs_of(first, others)]),
    ),
    "gain_over_best": Rule(_gain_over_best, _paper_gain_over_best),
    "hypernetwork_weights": Rule(_hypernetwork_weights, _paper_hypernetwork_weights),
    "mild_penalty": Rule(_mild_penalty, _paper_mild_penalty),
    "smaller_beta_on_blca": Rule(_smaller_beta_on_blca),
    "roupkt_ahead": Rule(_roupkt_ahead, lambda: _ahead(_paper_roupkt_ahead())),
    "sources_used": Rule(_sources_used),
    "only_scaled": Rule(_only_scaled),
    "cohort": Rule(_cohort, _paper_cohort),
    "parameters": Rule(_parameters, _paper_parameters),
}
