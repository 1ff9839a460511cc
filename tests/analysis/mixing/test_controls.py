"""Controls: the questions, the studies beside, and what they together allow to say; with trained models, that the
comparisons say yes where transfer is planted and no in its twin."""

import shutil

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.analysis.mixing import controls, starts
from steph.analysis.mixing.controls import (
    HERE,
    HERE_APART,
    HERE_TWIN,
    NECESSARY,
    POSITIVE,
    POSITIVE_APART,
    POSITIVE_TWIN,
    RIVALS,
)
from steph.analysis.performance.statistics import compare
from steph.data import manifest
from steph.data.manifest import MANIFESTS, load_study
from steph.methods.registry import METHODS
from steph.plots.comparison import transfer_controls
from steph.study import Workbench, run_all
from tests.helpers.made_results import DATASETS, frame, shifted


def made(gains: dict[str, float], external: bool = True, folds: int = 3, few: int = 2, seed: int = 0) -> pd.DataFrame:
    """Results of the controls' methods that gain so much over vanilla, with little noise; λ = 1 has `few` folds."""
    rng = np.random.default_rng(seed)
    values: dict[tuple[str, str], list[float | None]] = {}
    for dataset in DATASETS:
        for method in controls.METHODS:
            n = few if method == "steph_lambda1" else folds
            values[dataset, method] = list(0.6 + gains.get(method, 0.0) + rng.normal(0, 0.002, n))
    table = frame(values)
    return table.assign(external_c_index=table["c_index"]) if external else table


TRANSFER = {"steph": 0.1, "vanilla_longer": 0.03, "joint": 0.15, "steph_lambda0": 0.1, "steph_lambda1": 0.01}
TRAINING = {"steph": 0.1, "vanilla_longer": 0.1, "hypernetwork_only": 0.05}


def less_twin(own: pd.DataFrame, of_twin: pd.DataFrame) -> pd.DataFrame:
    """How much larger differences are in a study than in its twin, by method and kind of patients."""
    table = controls.side_by_side({HERE: own, HERE_TWIN: of_twin})
    return table[table["where"] == HERE_APART].set_index(["method", "on"])


# ------------------------------------------------------------------------------------------------- studies and runs


def test_every_control_is_a_method_and_stands_once():
    names = [control.method for control in (*NECESSARY, *RIVALS)]
    assert len(set(names)) == len(names) and set(controls.METHODS) == {"steph", *names} <= set(METHODS)
    assert set(controls.TWIN_METHODS) <= set(controls.METHODS)


def test_the_runs_are_those_of_the_methods_and_of_the_starts():
    study = load_study("demo")
    found = controls.runs(Workbench(study), [42, 43, 44])
    assert len(found) == len(set(found))
    own = {(r.method, r.fold) for r in found if r.seed == 42}
    few = {m: study.book_folds.get(m) or study.book_folds.get(METHODS[m].group, 5) for m in controls.METHODS}
    assert own == {(m, f) for m in controls.METHODS for f in range(few[m])} and few["steph_random_sources"] == 1
    others = [r for r in found if r.seed != 42]
    assert {(r.method, r.fold) for r in others} == {("steph", starts.FOLD)} and len(others) == 2 * 13
    assert {r.precision for r in controls.runs(Workbench(study, "cuda"), [1])} == {"bf16"}


def test_a_study_of_one_cancer_asks_what_it_can(tmp_path):
    (tmp_path / "one.yaml").write_text("extends: tiny\nname: one\ndatasets: {SARC: {projects: [X]}}\n")
    found = {run.method for run in controls.comparisons(Workbench(tmp_path / "one.yaml"), 42)}
    assert {"vanilla", "vanilla_longer", "cox_mean"} <= found and not {"steph", "steph_lambda1"} & found


def test_a_study_is_its_twins_but_for_sharing():
    for name in ("demo", "tiny", "transfer"):
        found = controls.twin(load_study(name))
        assert found is not None and found.name == f"{name}_twin" and not found.synthetic.sharing
        assert found.address == found.name
    for name in ("tcga", "demo_twin"):
        assert controls.twin(load_study(name)) is None


def test_the_studies_beside_are_the_positive_control_and_the_twins():
    found = controls.companions(Workbench("demo"))
    assert [bench.study.name for bench, _ in found.values()] == ["transfer", "transfer_twin", "demo_twin"]
    assert controls.companions(Workbench("transfer_twin")) == {}
    for where, (bench, runs) in found.items():
        twin = where != POSITIVE
        assert {r.method for r in runs} == set(controls.TWIN_METHODS if twin else controls.METHODS)
        assert {r.dataset for r in runs} == set(bench.study.target_names)
    of_tcga = controls.companions(Workbench("tcga", "cuda"))
    assert list(of_tcga) == [POSITIVE, POSITIVE_TWIN]
    assert {(b.compute.device, r.precision) for b, runs in of_tcga.values() for r in runs} == {("cuda", "bf16")}


def test_a_positive_control_without_a_twin_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("extends: tiny\nname: x\npositive_control: tcga\n")
    with pytest.raises(Refused, match="positive_control of study x: tcga has no twin"):
        controls.positive(load_study(tmp_path / "x.yaml"))


def test_what_differs_in_more_is_no_twin(tmp_path, monkeypatch):
    for name in ("demo", "tiny"):
        shutil.copy(MANIFESTS / f"{name}.yaml", tmp_path)
    for module in (manifest, controls):
        monkeypatch.setattr(module, "MANIFESTS", tmp_path)
    assert controls.twin(load_study("tiny")) is None
    other, head = tmp_path / "tiny_twin.yaml", "extends: tiny\nname: tiny_twin\ntitle: x\n"
    for more, differing in (("synthetic: {sharing: false}\nrecipe: {epochs: 3}\n", "recipe"), ("", "synthetic")):
        other.write_text(head + more)
        with pytest.raises(Refused, match=f"no twin of study tiny: they differ in {differing}"):
            controls.twin(load_study("tiny"))
    other.write_text(head + "synthetic: {sharing: false, shared_looks: false}\nbook_folds: {steph: 1}\n")
    assert controls.twin(load_study("tiny")) is not None


# ------------------------------------------------------------------------------------ methods compared


def test_controls_are_read_with_care():
    table = shifted(0.05).assign(external_c_index=lambda x: x["c_index"])
    found = controls.control_table(table).set_index(["method", "on"])["conclusion"]
    for on in ("test folds", "external patients"):
        assert found["vanilla", on] == "better" and found["hypernetwork_only", on] == "inconclusive"
        noise = found["steph_random_sources", on]
        assert noise.startswith("no answer: ") and "no results to compare" in noise
    reverse = controls.control_table(shifted(-0.05)).set_index("method")
    assert reverse.loc["vanilla", "conclusion"] == "worse" and set(reverse["on"]) == {"test folds"}


def test_a_gain_less_the_twins():
    own, other = made(TRANSFER), made({"steph": 0.03}, folds=2, seed=1)
    found = less_twin(own, other)
    row = found.loc[("vanilla", "external patients")]
    assert row["difference"] == pytest.approx(0.07, abs=0.002) and row["conclusion"] == "better"
    assert row["low"] < row["difference"] < row["high"]
    assert found.loc[("steph_lambda1", "test folds"), "difference"] == pytest.approx(0.06, abs=0.003)
    first_two = less_twin(own[own["fold"] < 2], other)
    pd.testing.assert_frame_equal(found, first_two)  # other folds have no counterpart
    fewer = own[(own["method"] != "steph") | (own["fold"] != 1)]  # so has one that only one of the methods was run on
    assert less_twin(fewer, other).loc[("vanilla", "test folds"), "conclusion"] == "better"


def test_gains_less_the_twins_know_the_folds_of_the_cross_validation():
    """`statistics.compare` corrects by the folds of one cross-validation where results tell them."""
    own, other = made(TRANSFER, folds=2), made({}, folds=2, seed=1)
    errors = []
    for more in ({}, {"folds": 5}):
        gains = controls.gains_in_both(own.assign(**more), other.assign(**more), "vanilla", "c_index")
        errors.append(compare(gains, HERE, HERE_TWIN, "gain").gains["error"])
    assert (errors[0] / errors[1]).tolist() == pytest.approx([np.sqrt((1 / 2 + 1) / (1 / 2 + 1 / 4))] * 13)


def test_an_undefined_fold_has_no_answer_and_says_which():
    own, other = made(TRANSFER), made({}, folds=2)
    other.loc[(other["dataset"] == "CESC") & (other["fold"] == 1) & (other["method"] == "steph"), "c_index"] = None
    found = less_twin(own, other)["conclusion"]
    assert found["vanilla", "test folds"].startswith("no answer: ") and "CESC, fold 1" in found["vanilla", "test folds"]
    assert found["vanilla", "external patients"] == "better"


def test_ceilings_of_two_studies():
    own = made(TRANSFER, folds=1, few=1)
    oracle = own[own["method"] == "vanilla"].assign(method="oracle", c_index=0.8, external_c_index=0.9)
    found = controls.ceilings({"demo": (own, oracle), "twin": (own[own["method"] == "vanilla"], oracle)})
    found = found.set_index("method")
    assert found.loc["STEPH", "share, demo"] == pytest.approx(0.2 / 0.4, abs=0.01)  # of external patients
    assert found.loc["Vanilla", "share, twin"] == pytest.approx(0.1 / 0.4, abs=0.01)
    assert np.isnan(found.loc["STEPH", "share, twin"]) and found.loc["STEPH", "folds, demo"] == "1"


# ------------------------------------------------------------------------------------------- what they say


def asked(gains: dict[str, float], in_twin: dict[str, float] | None, **beside: pd.DataFrame) -> pd.DataFrame:
    parts = {HERE: made(gains), **beside}
    return controls.side_by_side(parts if in_twin is None else {**parts, HERE_TWIN: made(in_twin, seed=1)})


def test_a_gain_that_meets_every_condition_is_transfer_also_where_a_simpler_way_does_better():
    summary = asked(TRANSFER, {})
    table = controls.conditions(summary)
    assert set(table["conclusion"]) == {"holds"} and len(table) == len(NECESSARY) + 1
    assert (
        controls.decision(table)
        == "There is a gain, and all 5 conditions that were asked hold: as far as they reach, it is transfer."
    )
    assert "Other ways do better: Joint learning (+0.0" in controls.simpler(summary)
    assert "; and as well, as far as can be told: λ = 0 (" in controls.simpler(summary)
    assert controls.simpler(asked({"steph": 0.1}, {})) == ""


def test_a_gain_that_equal_training_has_too_is_not_shown_to_be_transfer():
    summary = asked(TRAINING, TRAINING)
    table = controls.conditions(summary).set_index("method")
    assert table.loc["vanilla", "conclusion"] == "holds"
    assert table.loc[["vanilla_longer", "twin"], "conclusion"].tolist() == ["inconclusive"] * 2
    found = controls.decision(controls.conditions(summary))
    assert "not shown to be transfer: 3 of 5 conditions hold" in found
    assert "equal training (inconclusive), no-sharing twin (inconclusive)" in found


def test_without_a_gain_there_is_nothing_to_explain():
    assert controls.decision(controls.conditions(asked({}, {}))).startswith("No gain over the cancers' own models")
    none = controls.side_by_side({HERE: made(TRANSFER).query("method != 'vanilla'")})
    assert "could not be compared" in controls.decision(controls.conditions(none))


def test_on_real_patients_the_twin_falls_away_and_it_is_said():
    summary = controls.side_by_side({HERE: made(TRANSFER, external=False)})
    table = controls.conditions(summary)
    assert set(table["on"]) == {"test folds"} and controls.instrument(summary) == ""
    assert controls.decision(table).endswith(
        "all 4 conditions that were asked hold: as far as they reach, it is transfer. Not asked: no-sharing twin."
    )


def test_an_instrument_that_cannot_say_yes_is_told():
    able, unable = (
        asked({}, {}, **{POSITIVE: made(gains), POSITIVE_TWIN: made({}, seed=2)}) for gains in (TRANSFER, TRAINING)
    )
    assert controls.instrument(able).startswith(
        "The instrument can say yes: on the positive control, where transfer is"
    )
    assert "In its twin, where there is nothing to transfer, STEPH gains" in controls.instrument(able)
    assert "does not say yes where transfer is planted (not shown: equal training" in controls.instrument(unable)
    assert set(able["where"]) == {HERE, HERE_TWIN, HERE_APART, POSITIVE, POSITIVE_TWIN, POSITIVE_APART}


def test_controls_of_a_dead_model_are_void():
    def with_weights(dead):
        at_zero = [25 if (m, d, f) == ("steph", DATASETS[0], 1) and dead else 0
                   for m, d, f in alive[["method", "dataset", "fold"]].itertuples(index=False)]  # fmt: skip
        return alive.assign(n_test=40, unmerged_test=at_zero)

    alive = made(TRANSFER)
    void = f"void: the weights of STEPH are 0 for 25 of 40 patients in fold 1 of {DATASETS[0]}"
    table = controls.control_table(with_weights(dead=True))
    assert set(table["conclusion"]) == {void} and table["difference"].isna().all()
    assert not controls.control_table(with_weights(dead=False))["conclusion"].str.contains("void").any()
    summary = controls.side_by_side({HERE: with_weights(dead=True), HERE_TWIN: made({}, seed=1)})
    assert controls.decision(controls.conditions(summary)) == f"V{void[1:]}: nothing can be said of transfer."
    assert controls.simpler(summary) == ""
    both = controls.side_by_side({HERE: with_weights(dead=True), HERE_TWIN: with_weights(dead=True)})
    for some in (summary, both):
        transfer_controls(some, {HERE: "study", HERE_TWIN: "its twin"})
    # Where only the twin's is dead, the gain stands, and what would need the twin was not asked.
    summary = controls.side_by_side({HERE: with_weights(dead=False), HERE_TWIN: with_weights(dead=True)})
    conditions = controls.conditions(summary)
    assert conditions["conclusion"].tolist()[-1] == void and set(conditions["conclusion"][:-1]) == {"holds"}
    assert controls.decision(conditions).endswith("it is transfer. Not asked: no-sharing twin.")


def test_with_trained_models_the_instrument_says_yes_where_transfer_is_planted_and_no_in_its_twin(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    bench = Workbench("transfer")
    twin, of_twin = controls.companions(Workbench("demo"))[POSITIVE_TWIN]
    few = ["vanilla", "vanilla_longer", "steph_own_seeds", "steph_random_sources", "steph_lambda1", "steph", "joint"]
    planned = controls.comparisons(bench, bench.study.seed)
    results = {
        HERE: run_all(bench, [run for run in planned if run.method in few]),
        HERE_TWIN: run_all(twin, [run for run in of_twin if run.method in ("vanilla", "steph")]),
    }
    summary = controls.side_by_side(results)
    table = controls.conditions(summary)
    assert set(table["conclusion"]) == {"holds"}, table[["control", "difference", "low", "high"]].to_string()
    assert "Joint learning" in controls.simpler(summary)
    in_twin = controls.control_table(results[HERE_TWIN], ["vanilla"]).set_index("on").loc["external patients"]
    assert in_twin["conclusion"] != "better"
