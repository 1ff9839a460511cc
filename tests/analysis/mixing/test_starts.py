"""Starts: whether they choose the same sources, and what each gains."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from steph.analysis.mixing import dynamics, starts
from steph.book.notebooks import declared, find
from steph.data.manifest import load_study
from steph.study import Workbench
from tests.helpers.made_results import frame

SOURCES = [f"S{i}" for i in range(8)]


def courses(of_target: float, of_start: float, targets: tuple[str, ...] = ("A", "B", "C"), starts: int = 4) -> dict:
    """Courses whose final w are made of what belongs to the target and of what belongs to the start."""
    rng = np.random.default_rng(0)
    by_target = {target: rng.random(len(SOURCES)) for target in targets}
    by_start = {seed: rng.random(len(SOURCES)) for seed in range(starts)}
    found = {}
    for target, own in by_target.items():
        noise = 1e-3 * rng.random(len(SOURCES))
        w = {seed: of_target * own + of_start * drawn + noise for seed, drawn in by_start.items()}
        table = pd.DataFrame({"source": SOURCES, "epoch": 1, "lambda": 0.5, **w})
        found[target] = table.melt(["source", "epoch", "lambda"], var_name="seed", value_name="w")
    return found


def test_choices_tell_what_is_the_targets_from_what_is_the_starts():
    target, start = (starts.choices(courses(*shares), load_study("tcga")) for shares in ((1, 0), (0, 1)))
    assert target["other_starts"].min() > 0.9 > 0.6 > abs(target["other_targets"]).max()
    assert start["other_targets"].min() > 0.9 > 0.6 > abs(start["other_starts"]).max()
    assert target["planted"].isna().all() and len(target) == 3 * 4
    assert target["other_starts"].notna().all()
    wide = starts.choice_wide(start)
    assert list(wide.columns) == ["same target, other start", "same start, other target"]
    assert wide.loc["Mean"].tolist() == pytest.approx(wide.drop(index="Mean").mean().tolist())
    found = courses(0, 1, ("S0", "S1"))  # each the other's source: compared are the sources that both have
    found = {name: course[course["source"] != name] for name, course in found.items()}
    assert starts.choices(found, load_study("tcga"))["other_targets"].min() > 0.9


def test_starts_of_one_target_agree_or_not():
    w = {1: [0, 0.2, 0.3, 0.4], 2: [0, 0.1, 0.5, 0.6], 3: [0.4, 0.3, 0.2, 0]}
    table = pd.DataFrame({"source": list("DABC"), "epoch": 1, "lambda": 0.5, **w})
    course = table.melt(["source", "epoch", "lambda"], var_name="seed", value_name="w")
    found = starts.choices({"T": course}, load_study("tcga"))
    assert found["seed"].tolist() == [1, 2, 3] and found["other_starts"].tolist() == pytest.approx([0, 0, -1])


def test_what_was_planted_is_found_in_weights_that_follow_it():
    study = load_study("demo")
    planted = dynamics.planted(study, "BRCA")
    course = pd.DataFrame({"seed": 1, "epoch": 1, "source": planted.index, "w": planted.to_numpy() + 1, "lambda": 0.5})
    row = starts.choices({"BRCA": course}, study).iloc[0]
    assert row["planted"] == pytest.approx(1.0)
    assert np.isnan(row["other_starts"]) and np.isnan(row["other_targets"])  # one start, one target


def test_two_sources_give_no_correlation():
    found = {name: course[course["source"].isin(SOURCES[:2])] for name, course in courses(1, 0).items()}
    choice = starts.choices(found, load_study("tcga"))
    assert choice[list(starts.FOLLOWS)].isna().all(axis=None)
    assert starts.choice_wide(choice).shape == (4, 0)


def test_the_runs_are_of_every_target_and_start():
    found = starts.runs(Workbench("transfer", precision="bf16"), [42, 43])
    assert {(r.method, r.fold, r.precision) for r in found} == {("steph", 0, "bf16")} and len(found) == 2 * 5


def test_sources_chosen_over_starts():
    table = starts.sources_over_starts(courses(1, 0)).set_index("target")
    assert (table["distinct"] == 1).all() and table["largest"].str.endswith(" (4)").all()
    assert (table[["always", "sources", "never"]] == [8, 8, 0]).all(axis=None)


def test_what_each_start_gains():
    own = frame({("SARC", "vanilla"): [0.5], ("CESC", "vanilla"): [0.6]})
    several = pd.concat(
        frame({("SARC", "steph"): [0.5 + gain], ("CESC", "steph"): [0.6 + gain]}).assign(seed=seed)
        for seed, gain in ((1, 0.1), (2, 0.0), (3, 0.2))
    )
    gains = starts.start_gains(several, own)
    assert gains["gain"].tolist() == pytest.approx([0.1, 0.1, 0.0, 0.0, 0.2, 0.2])
    spread = starts.c_index_by_start(gains).set_index("target")
    assert spread.loc["SARC"].tolist() == pytest.approx([0.6, 0.1, 0.5, 0.7])
    table = starts.gain_by_start(gains).set_index("seed")
    assert list(table.index) == [1, 2, 3, starts.MEAN] and table.loc[1, "conclusion"] == "better"
    assert table["difference"].tolist() == pytest.approx([0.1, 0.0, 0.2, 0.1])
    reach = t.ppf(0.975, 2) * 0.1 / np.sqrt(3)  # both cancers gain the same from a start: as sure as three starts are
    assert table.loc[starts.MEAN, ["low", "high"]].tolist() == pytest.approx([0.1 - reach, 0.1 + reach])
    assert set(gains["on"]) == set(table["on"]) == {"test folds"}
    assert list(starts.gain_by_start(gains[gains["seed"] == 1])["seed"]) == [1]  # one start has no mean of several
    several.loc[several["seed"] == 2, "c_index"] = None
    gains = starts.start_gains(several, own)
    assert starts.c_index_by_start(gains).drop(columns="target").isna().all(axis=None)
    found = starts.gain_by_start(gains)["conclusion"]
    assert found[1] == found[3] == "no answer: undefined for CESC, SARC" and found[0] == "better"


def test_a_large_weight_under_a_lambda_of_one_is_no_share():
    course = pd.DataFrame({"seed": 1, "epoch": 1, "source": SOURCES, "w": range(8, 0, -1), "lambda": [1.0, *[0.5] * 7]})
    shares = dynamics.final_shares(course)[1]
    assert shares["S0"] == 0 and shares.idxmax() == "S1"


def test_the_notebook_compares_as_many_starts_as_the_chapter_says():
    assert declared(find("11_controls"))["n_seeds"] == 3
