"""The registry: complete against the paper's tables, honest about what it looked at, the same numbers again."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from steph import PROJECT, Refused
from steph.data.dataset import Dataset
from steph.data.manifest import load_study
from steph.methods import METHODS, Method
from steph.methods.cancer_specific import vanilla
from steph.methods.merging import steph
from steph.mil.state import state_of
from steph.study import Run, execute, plan, results, run, run_all
from steph.study.paper import paper_labels, tables_of_methods
from steph.study.runs import SOURCE_FOLD, TARGET, Workbench
from steph.training.device import single_thread
from steph.training.engine import predict
from tests.helpers.spy import spied

SARC = Run("SARC", "steph", 1, 42)


EVERY = [name for name, m in METHODS.items() if "nearest" not in name and not m.refusal(load_study("tiny"), "SARC")]
FREE = ("steph_free_cosine", "steph_free_concordance", "steph_free_scores")


def inputs(name):
    """What the study `tiny` gives the builder of a method."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, name, replace(METHODS[name], build=lambda x, **options: x))
        return Workbench("tiny").untrained(replace(SARC, method=name))


# ------------------------------------------------------------------------------------------------ complete


def test_every_row_of_the_papers_tables_is_an_entry():
    tables = {path.stem: pd.read_csv(path) for path in (PROJECT / "data_manifest" / "paper").glob("*.csv")}
    assert {name for name, table in tables.items() if "method" not in table} == {"table_s1_datasets"}
    for name, table in tables.items():
        assert set(table.get("method", ())) <= set(METHODS), name


def test_names_and_titles_are_unique_and_described():
    assert len({m.title for m in METHODS.values()}) == len(METHODS)
    for name, m in METHODS.items():
        assert re.fullmatch(r"[a-z0-9_.]+", name) and m.description and m.group
        assert m.after is None or m.after in METHODS


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.group == "sweep"])
def test_a_sweep_changes_one_setting_of_steph(name):
    entry, parameter, value = METHODS[name], *METHODS[name].sweep
    changed = {parameter: value, **({"top_k": value} if parameter == "sources" else {})}  # Table S7: K = m
    assert entry.options == changed and entry.build is METHODS["steph"].build
    (table,) = tables_of_methods()[name]
    assert entry.sparse and float(paper_labels(table)[name]) == value
    assert name.endswith(f"{value}")


def test_options_reach_the_models(tiny):
    x, settings = inputs("steph"), tiny.study.steph

    def built(name):
        return METHODS[name].build(x, **METHODS[name].options)

    assert (built("steph").beta, built("steph_beta0.01").beta) == (settings.beta, 0.01)
    assert (built("steph").top_k, built("steph_k1").top_k) == (settings.top_k, 1)
    assert built("steph_gamma0.01").gamma == 0.01 != built("steph").gamma == settings.gamma(len(x.data.cohort))
    model = built("steph_lambda0_with_target")
    assert model.source_names == ["SARC", "CESC", "LIHC"] and model.mix == 0
    assert steph(x, sources=1, top_k=1).source_names == ["CESC"]


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steph_k3", "K = 3 asks for 3 source cancers, but SARC has 2 source cancers in study tiny"),
        ("steph_m6", "asks for 6 source cancers, but SARC has 2"),
        ("ties", r"unknown method 'ties'.*Did you mean ties_am"),
        ("step@CESC", r"unknown method 'step'.* Did you mean .*steph"),
        ("steph@", "names no data set after @"),
        ("steph@SARC", "SARC is no source for SARC in study tiny; those are CESC, LIHC"),
        ("steph@BRCA", "BRCA is no source for SARC"),
        ("vanilla@CESC", "Vanilla cannot be given one source"),
    ],
)
def test_methods_that_cannot_be_are_refused(tiny, name, message):
    with pytest.raises(Refused, match=message):
        run_all(tiny, [replace(SARC, method=name)])


def test_settings_that_ask_for_too_many_sources_are_left_out_of_the_plan(tiny):
    planned = {r.method for r in plan(tiny)}
    assert "steph_k1" in planned and not planned & {"steph_k3", "steph_k11", "steph_m6"}
    assert {"steph_k3", "steph_k11"} <= {r.method for r in plan(Workbench("demo"))}


def test_a_method_gets_the_folds_that_the_study_gives_it_unless_folds_are_named(tiny):
    study = tiny.study.model_copy(update={"book_folds": {"sweep": 1, "transmil": 1, "control": 9}})

    def folds(name, **choice):
        return {r.fold for r in plan(Workbench(study), methods=[name], **choice)}

    assert [folds(name) for name in ("steph_beta0", "transmil")] == [{0}, {0}]
    assert [folds(name) for name in ("steph", "ilra", "hypernetwork_only")] == [{0, 1}] * 3
    assert folds("steph_beta0", folds=[1]) == {1}
    wrong = tiny.study.model_copy(update={"book_folds": {"sweeps": 1}})
    with pytest.raises(Refused, match=r"unknown group or method 'sweeps' in book_folds .* Did you mean .*sweep"):
        plan(Workbench(wrong))


def test_a_study_of_one_cancer_has_no_sources(tiny):
    alone = Workbench(tiny.study.model_copy(update={"datasets": {"SARC": tiny.study.datasets["SARC"]}}))
    for name in ("adamerging", "roupkt", "steph_dense"):
        with pytest.raises(Refused, match="needs source cancers; study tiny has only SARC"):
            run_all(alone, [replace(SARC, method=name)])


def test_a_method_can_be_given_one_source(tiny):
    only = replace(SARC, method="steph@CESC")
    assert set(tiny.prerequisites(only)) == {TARGET, "CESC"} and tiny.key(only) != tiny.key(SARC)
    found = run_all(tiny, [only])
    assert len(found) == 1 and only.method in set(results(tiny)["method"])
    assert tiny.model(only).source_names == ["CESC"] and tiny.model(only).top_k == 1


def test_the_releases_table_of_nearest_sources_needs_its_source(tiny):
    with pytest.raises(Refused, match="has STES as the nearest source of CESC, and the study has LIHC, SARC"):
        run(tiny.study, "CESC", "finetuned_representation_nearest", 0)
    assert run(tiny.study, "SARC", "finetuned_representation_nearest", 0).info["facts"] == {"source": "LIHC"}


def test_models_of_another_network_are_refused(tiny):
    """A network's models are merged onto its own M_0 and with no other's."""
    x = inputs("steph")
    other = replace(x, target_state=tiny.state(replace(SARC, method="ilra", fold=0)))
    for name in ("steph", "adamerging", "ties_am", "model_average"):
        with pytest.raises(Refused, match="different networks cannot be merged"):
            METHODS[name].build(other, **METHODS[name].options)
    with pytest.raises(Refused, match="needs_target"):
        METHODS["steph"].build(replace(x, target_state=None))
    with pytest.raises(Refused, match="after"):
        METHODS["surgery_am"].build(x)


# ------------------------------------------------------------------------------------------------ who was looked at


def test_a_setting_that_a_method_does_not_declare_is_refused(tiny):
    x = inputs("vanilla")
    with pytest.raises(Refused, match=r"steph\.beta of the study and does not declare it"):
        x.settings["beta"]


@pytest.mark.parametrize("name", EVERY)
def test_no_test_patient_is_looked_at_before_predictions_and_nobody_else_by_them(tiny, monkeypatch, name):
    """In building, choosing and training, a method asks for training patients of its fold and for nobody else, of no
    data set but, for joint learning, of all. Selections inside (best source, gamma) are among what is watched."""
    this = replace(SARC, method=name)
    if METHODS[name].joint:
        this = replace(this, dataset=next(iter(tiny.study.datasets)))  # where it is trained
    run_all(tiny, tiny.prerequisites(this).values(), workers=1)
    record, started = tiny.record, []
    monkeypatch.setattr(tiny, "record", lambda r: None if r == this else record(r))  # as if never run: it chooses
    monkeypatch.setattr(execute, "write_record", lambda *_: None)
    predict_hazards = execute.predict_hazards
    with spied(monkeypatch) as looked_at:
        predicts = lambda *args: started.append(len(looked_at)) or predict_hazards(*args)  # noqa: E731
        monkeypatch.setattr(execute, "predict_hazards", predicts)
        execute._build_train_record(tiny, this)
    before, after = set(looked_at[: started[0]]), set(looked_at[started[0] :])
    names = tiny.study.datasets if METHODS[name].joint else [this.dataset]
    allowed = {(d, patient) for d in names for patient in tiny.dataset(d).splits.train(1)}
    assert before <= allowed, sorted(before - allowed)[:5]
    assert before or not any(p.requires_grad for p in tiny.untrained(this).parameters()), "the spy sees who trains"
    data = tiny.dataset(this.dataset)
    external = set(data.external.cohort.patients["patient_id"])
    assert after == {(this.dataset, patient) for patient in {*data.splits.test(1), *external}}


def test_the_spy_sees_a_leak(tiny, monkeypatch):
    def leaky(x):
        x.data.labels(x.data.splits.test(1))
        return vanilla(x)

    monkeypatch.setitem(METHODS, "vanilla", Method("Leaky", "cancer_specific", leaky, "a leak"))
    with pytest.raises(AssertionError):
        test_no_test_patient_is_looked_at_before_predictions_and_nobody_else_by_them(tiny, monkeypatch, "vanilla")


@pytest.mark.parametrize("name", EVERY)
def test_nothing_that_a_method_stands_on_saw_a_test_patient(tiny, name):
    """All the way up: runs on the target's patients are of the same fold; the others' sets share no patient with it."""
    tested = set(tiny.dataset("SARC").splits.test(1))
    waiting = [replace(SARC, method=name)]
    while waiting:
        current = waiting.pop()
        data, patients = tiny.training_set(current)
        assert not tested & {patient.removeprefix("SARC/") for patient in patients}, str(current)
        if isinstance(data, Dataset) and current.dataset != "SARC":
            assert current.fold == SOURCE_FOLD
        waiting += tiny.prerequisites(current).values()


@pytest.mark.parametrize("name", ["finetuned_representation", "steph_gamma_search", *FREE])
def test_a_reloaded_model_repeats_no_choice(tiny, monkeypatch, name):
    done = run(tiny.study, "SARC", name, 1)
    assert done.info["facts"]
    with spied(monkeypatch) as looked_at:
        assert tiny.model(replace(SARC, method=name)).facts == done.info["facts"]
    assert not looked_at


# ------------------------------------------------------------------------------------------------ the same again


@pytest.mark.parametrize("name", EVERY)
def test_a_method_repeated_gives_the_same_bits(tiny, tmp_path, monkeypatch, name):
    this = replace(SARC, method=name)
    first = run(tiny.study, "SARC", name, 1)
    folder = tiny.folder
    monkeypatch.setattr(tiny, "folder", lambda r: tmp_path if r == this else folder(r))
    execute._execute(tiny, this)
    again = tiny.record(this)
    assert again.path == tmp_path
    for file in ("model.safetensors", "predictions.csv", "predictions_external.csv"):
        assert again.info["files"][file] == first.info["files"][file], file
    assert again.info["trained_parameters"] == first.info["trained_parameters"]


@pytest.mark.parametrize("name", EVERY)
def test_only_what_is_trained_is_kept_and_the_reloaded_model_predicts_what_was_recorded(tiny, name):
    this, data = replace(SARC, method=name), tiny.dataset("SARC")
    done = run(tiny.study, "SARC", name, 1)
    model = tiny.untrained(this)
    kept, trained = tiny.state(this), state_of(model, trainable_only=True)
    assert set(kept) == set(trained or state_of(model))
    assert done.info["trained_parameters"] == sum(v.numel() for v in trained.values())
    if trained:
        assert any(not torch.equal(kept[k], v) for k, v in trained.items())
        assert all(torch.isfinite(v).all() for v in kept.values())
    with single_thread():
        again = predict(tiny.model(this), data, data.splits.test(1))
    recorded = pd.read_csv(done.file("predictions.csv"), float_precision="round_trip")
    assert again["risk"].tolist() == recorded["risk"].tolist()
