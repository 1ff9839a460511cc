"""The registry: complete against the paper's tables, honest about what it looked at, the same numbers again."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from steph import PROJECT, Refused
from steph.data.dataset import Dataset
from steph.data.manifest import load_study
from steph.methods import builders
from steph.methods.registry import METHODS, Method, method
from steph.mil.state import load_state, state_of
from steph.study.execute import Run, _execute, run, run_all
from steph.study.paper import paper_labels, tables_of_methods
from steph.study.runs import SOURCE_FOLD, TARGET, code_of, plan, results
from steph.training.device import single_thread
from steph.training.engine import predict
from steph.training.selection import INNER_FOLDS, best_value, grid_search

PAPER = PROJECT / "data_manifest" / "paper"
SARC = Run("SARC", "steph", 1, 42)


def possible(name):
    """Can the study `tiny`, of two sources, have it at all?"""
    return not METHODS[name].refusal(load_study("tiny"), "SARC") and "nearest" not in name


EVERY = sorted(filter(possible, METHODS))


# ------------------------------------------------------------------------------------------------ complete


def test_every_row_of_the_papers_tables_is_an_entry():
    tables = {path.stem: pd.read_csv(path) for path in PAPER.glob("*.csv")}
    assert {name for name, table in tables.items() if "method" not in table} == {"table_s1_datasets"}
    for name, table in tables.items():
        assert set(table.get("method", ())) <= set(METHODS), name


def test_names_and_titles_are_unique_and_described():
    assert len({m.title for m in METHODS.values()}) == len(METHODS)
    for name, m in METHODS.items():
        assert re.fullmatch(r"[a-z0-9_.]+", name) and m.description and m.group
        assert m.after is None or METHODS[m.after].needs_target


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.group == "sweep"])
def test_a_sweep_changes_one_setting_of_steph(name):
    entry, parameter, value = METHODS[name], *METHODS[name].sweep
    changed = {parameter: value, **({"top_k": value} if parameter == "sources" else {})}  # Table S7: K = m
    assert entry.options == changed and entry.build is METHODS["steph"].build
    (table,) = tables_of_methods()[name]
    assert entry.sparse and float(paper_labels(table)[name]) == value
    assert name.endswith(f"{value}")


def test_options_reach_the_models(tiny):
    x = ingredients(tiny, "steph")
    built = {name: METHODS[name].build(x, **METHODS[name].options) for name in ("steph", "steph_beta0.01", "steph_k1")}
    assert built["steph"].beta == tiny.study.steph.beta and built["steph_beta0.01"].beta == 0.01
    assert (built["steph"].top_k, built["steph_k1"].top_k) == (tiny.study.steph.top_k, 1)
    fixed = METHODS["steph_gamma0.01"].build(x, gamma=0.01)
    assert fixed.gamma == 0.01 != built["steph"].gamma == tiny.study.steph.gamma(len(x.data.cohort))
    with_target = METHODS["steph_lambda0_with_target"]
    model = with_target.build(x, **with_target.options)
    assert model.source_names == ["SARC", "CESC", "LIHC"] and model.mix == 0
    assert builders.steph(x, sources=1, top_k=1).source_names == ["CESC"]


# ------------------------------------------------------------------------------------------------ what cannot be


def test_settings_that_ask_for_too_many_sources_are_left_out_of_the_plan_and_refused_by_name(tiny):
    planned = {r.method for r in plan(tiny.study)}
    assert "steph_k1" in planned and not planned & {"steph_k3", "steph_k11", "steph_m6"}
    assert {"steph_k3", "steph_k11"} <= {r.method for r in plan(load_study("demo"))}
    for name, message in {
        "steph_k3": r"K = 3 keeps 3 of the source cancers, but SARC has 2 source cancers in study tiny; choose K",
        "steph_m6": r"asks for 6 source cancers, but SARC has 2",
    }.items():
        with pytest.raises(Refused, match=message):
            run(tiny, "SARC", name, 0)


def test_a_method_gets_the_folds_that_the_study_gives_it_unless_folds_are_named(tiny):
    study = tiny.study.model_copy(update={"book_folds": {"sweep": 1, "transmil": 1, "control": 9}})

    def folds(name, **choice):
        return {r.fold for r in plan(study, methods=[name], **choice)}

    assert [folds(name) for name in ("steph_beta0", "transmil")] == [{0}, {0}]
    assert [folds(name) for name in ("steph", "ilra", "hypernetwork_only")] == [{0, 1}] * 3
    assert folds("steph_beta0", folds=[1]) == {1}
    wrong = tiny.study.model_copy(update={"book_folds": {"sweeps": 1}})
    with pytest.raises(
        Refused, match=r"unknown group or method 'sweeps' in book_folds of study tiny.* Did you mean .*sweep"
    ):
        plan(wrong)


def test_a_study_of_one_cancer_has_no_sources(tiny):
    alone = tiny.study.model_copy(update={"datasets": {"SARC": tiny.study.datasets["SARC"]}})
    for name in ("adamerging", "roupkt", "steph_dense"):
        with pytest.raises(Refused, match="needs source cancers; study tiny has only SARC"):
            run_all(alone, [replace(SARC, method=name)])


def test_unknown_method_offers_the_nearest():
    with pytest.raises(Refused, match=r"unknown method 'ties'.*Did you mean ties_am"):
        method("ties")


def test_a_method_can_be_given_one_source(tiny):
    only = replace(SARC, method="steph@CESC")
    assert set(tiny.prerequisites(only)) == {"(target)", "CESC"} and tiny.key(only) != tiny.key(SARC)
    found = run_all(tiny, [only])
    assert len(found) == 1 and only.method in set(results(tiny)["method"])
    assert tiny.model(only).source_names == ["CESC"] and tiny.model(only).top_k == 1
    for name, message in {
        "steph@SARC": "SARC is no source for SARC in study tiny; those are CESC, LIHC",
        "steph@BRCA": "BRCA is no source for SARC",
        "vanilla@CESC": "Vanilla cannot be given one source",
        "step@CESC": r"unknown method 'step'.* Did you mean .*steph",
    }.items():
        with pytest.raises(Refused, match=message):
            run_all(tiny, [replace(SARC, method=name)])


def test_the_releases_table_of_nearest_sources_needs_its_source(tiny):
    with pytest.raises(Refused, match="names STES as the nearest source of CESC, and the pool lacks it"):
        run(tiny, "CESC", "finetuned_representation_nearest", 0)
    assert run(tiny, "SARC", "finetuned_representation_nearest", 0).info["facts"] == {"source": "LIHC"}


def test_models_of_another_network_are_refused(tiny):
    """A network's models are merged onto its own M_0 and with no other's."""
    x = ingredients(tiny, "steph")
    other = replace(x, target_state=tiny.state(replace(SARC, method="ilra", fold=0)))
    for name in ("steph", "adamerging", "ties_am", "model_average"):
        with pytest.raises(Refused, match="different networks cannot be merged"):
            METHODS[name].build(other, **METHODS[name].options)
    with pytest.raises(Refused, match="needs_target"):
        METHODS["steph"].build(replace(x, target_state=None))
    with pytest.raises(Refused, match="after"):
        METHODS["surgery_am"].build(x)


# ------------------------------------------------------------------------------------------------ who was looked at


def ingredients(bench, name, fold=1):
    wanted = replace(SARC, method=name, fold=fold)
    states = {role: bench.state(first) for role, first in bench.prerequisites(wanted).items()}
    data = bench.dataset("SARC")
    return builders.Ingredients(
        study=bench.study,
        data=data,
        patients=data.splits.train(fold),
        network_name=METHODS[name].network,
        null_state=bench.null_state(METHODS[name].network),
        target_state=states.pop(TARGET, None),
        source_states=states,
        seed=42,
    )


class Spy:
    """Who of which data set is asked for, while a method is built and trained."""

    def __init__(self, monkeypatch):
        self.seen = []
        for name in ("batch", "labels", "n_patches", "check_coords"):
            self.watch(monkeypatch, name)

    def watch(self, monkeypatch, name):
        plain = getattr(Dataset, name)

        def watched(dataset, patients, *args, **kwargs):
            self.seen += [(dataset.name, patient) for patient in patients]
            return plain(dataset, patients, *args, **kwargs)

        monkeypatch.setattr(Dataset, name, watched)


class Trained(Exception):
    """Raised in place of the first prediction: training is over."""


@pytest.mark.parametrize("name", EVERY)
def test_no_test_patient_is_looked_at_before_predictions(tiny, monkeypatch, tmp_path, name):
    """In building, choosing and training, a method asks for training patients of its fold and for nobody else, of no
    data set. Selections inside (best source, gamma) use `steph.training.engine.predict`, not the study's, so they are seen."""
    wanted = replace(SARC, method=name)
    run_all(tiny, tiny.prerequisites(wanted).values(), workers=1)
    folder = tiny.folder
    monkeypatch.setattr(tiny, "folder", lambda r: tmp_path if r == wanted else folder(r))  # as if never run: it chooses
    spy = Spy(monkeypatch)

    def stop(*_args, **_kwargs):
        raise Trained

    monkeypatch.setattr("steph.study.execute.predict", stop)
    with pytest.raises(Trained):
        _execute(tiny, wanted, "cpu")
    allowed = {("SARC", patient) for patient in tiny.dataset("SARC").splits.train(1)}
    assert set(spy.seen) <= allowed, sorted(set(spy.seen) - allowed)[:5]
    model = tiny.untrained(wanted)
    assert spy.seen or not any(p.requires_grad for p in model.parameters()), "the spy sees who trains"


def test_the_spy_sees_a_leak(tiny, monkeypatch, tmp_path):
    def leaky(x):
        x.data.labels(x.data.splits.test(1))
        return builders.vanilla(x)

    monkeypatch.setitem(METHODS, "vanilla", Method("Leaky", "cancer_specific", leaky, "a leak"))
    with pytest.raises(AssertionError):
        test_no_test_patient_is_looked_at_before_predictions(tiny, monkeypatch, tmp_path, "vanilla")


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


def test_a_reloaded_model_repeats_no_choice(tiny, monkeypatch):
    for name in ("finetuned_representation", "steph_gamma_search"):
        wanted = replace(SARC, method=name)
        done = run(tiny, "SARC", name, 1)
        assert done.info["facts"]
        spy = Spy(monkeypatch)
        assert tiny.model(wanted).facts == done.info["facts"]
        assert not spy.seen


def test_the_source_is_the_best_on_training_patients(tiny):
    facts = run(tiny, "SARC", "finetuned_representation", 1).info["facts"]
    found = facts["transfer_performance"]
    assert list(found) == ["CESC", "LIHC"] and facts["source"] == max(found, key=found.get)
    model = tiny.model(replace(SARC, method="finetuned_representation"))
    chosen = tiny.state(replace(SARC, dataset=facts["source"], method="vanilla", fold=SOURCE_FOLD))
    assert torch.equal(model.encoder.network.embed.weight, chosen["embed.weight"])


# ------------------------------------------------------------------------------------------------ gamma's search


def test_a_searched_gamma_gives_the_run_of_that_gamma(tiny):
    found = run(tiny, "SARC", "steph_gamma_search", 1)
    gamma = found.info["facts"]["gamma"]
    scores = pd.DataFrame(found.info["facts"]["inner_c_index"])
    assert len(scores) == INNER_FOLDS * 5 and gamma == best_value(scores)
    given = run(tiny, "SARC", f"steph_gamma{gamma:g}", 1)
    for name in ("model.safetensors", "predictions.csv"):
        assert found.info["files"][name] == given.info["files"][name]


def test_who_judges_a_value_trained_none_of_what_is_merged(tiny, monkeypatch):
    """Each inner fold: the own model and the merged ones are trained on the same patients, and judged on all others."""
    data, log = tiny.dataset("SARC"), []
    patients = data.splits.train(0)

    class Network(torch.nn.Linear):
        def __init__(self, kind):
            super().__init__(data.store.dim, 32)
            self.kind = kind

        def forward(self, bags):
            return super().forward(torch.stack([bags.bag(i).mean(0) for i in range(len(bags))]))

    def fit(model, dataset, train, *_args):
        log.append((model.kind, "train", frozenset(train)))

    def judge(model, dataset, judged, *args):
        log.append((model.kind, "judge", frozenset(judged)))
        return predict(model, dataset, judged, *args)

    monkeypatch.setattr("steph.training.selection.fit", fit)
    monkeypatch.setattr("steph.training.selection.predict", judge)
    study = tiny.study
    scores = grid_search(
        (0.1, 0.2),
        own=lambda: Network("own"),
        merged=lambda state, value: Network(f"merged {value}"),
        dataset=data,
        patients=patients,
        recipe=study.recipe,
        network=study.network,
        seed=3,
    )
    assert scores[["value", "fold"]].to_numpy().tolist() == [[v, f] for f in range(INNER_FOLDS) for v in (0.1, 0.2)]
    judged_all = []
    for fold in range(INNER_FOLDS):
        own, *rest = log[5 * fold : 5 * fold + 5]
        assert own[:2] == ("own", "train")
        for (kind, what, who), value in zip(rest, (0.1, 0.1, 0.2, 0.2), strict=True):
            assert kind == f"merged {value}"
            assert who == own[2] if what == "train" else who == set(patients) - own[2]
        judged_all += rest[-1][2]
    assert sorted(judged_all) == sorted(patients)


def test_the_first_of_equal_values_is_chosen():
    scores = pd.DataFrame(
        {"value": [0, 0.1, 0.2] * 2, "fold": [0] * 3 + [1] * 3, "c_index": [0.5, 0.7, 0.7, 0.5, 0.7, 0.7]}
    )
    assert best_value(scores) == 0.1


# ------------------------------------------------------------------------------------------------ the same again


@pytest.mark.parametrize("name", EVERY)
def test_a_method_repeated_gives_the_same_bits(tiny, tmp_path, monkeypatch, name):
    wanted = replace(SARC, method=name)
    first = run(tiny, *(wanted.dataset, wanted.method, wanted.fold))
    folder = tiny.folder
    monkeypatch.setattr(tiny, "folder", lambda r: tmp_path if r == wanted else folder(r))
    again = _execute(tiny, wanted, "cpu")
    assert again.path == tmp_path
    for file in ("model.safetensors", "predictions.csv", "predictions_external.csv"):
        assert again.info["files"][file] == first.info["files"][file], file
    assert again.info["trained_parameters"] == first.info["trained_parameters"]


@pytest.mark.parametrize("name", EVERY)
def test_only_what_is_trained_is_kept_and_it_moved(tiny, name):
    wanted = replace(SARC, method=name)
    done = run(tiny, "SARC", name, 1)
    model = tiny.untrained(wanted)
    kept = load_state(done.file("model.safetensors"))
    trained = state_of(model, trainable_only=True)
    assert set(kept) == set(trained or state_of(model))
    assert done.info["trained_parameters"] == sum(v.numel() for v in trained.values())
    if trained:
        assert any(not torch.equal(kept[k], v) for k, v in trained.items())
        assert all(torch.isfinite(v).all() for v in kept.values())


@pytest.mark.parametrize("name", EVERY)
def test_a_reloaded_model_predicts_what_was_recorded(tiny, name):
    data = tiny.dataset("SARC")
    done = run(tiny, "SARC", name, 1)
    with single_thread():
        again = predict(tiny.model(replace(SARC, method=name)), data, data.splits.test(1))
    recorded = pd.read_csv(done.file("predictions.csv"), float_precision="round_trip")
    assert again["risk"].tolist() == recorded["risk"].tolist()


def test_a_method_follows_the_code_of_its_builder_and_of_what_it_calls(monkeypatch):
    before = {name: code_of(METHODS[name]) for name in ("vanilla", "steph", "adamerging", "surgery_am", "roupkt")}

    def steph(x, **options):
        return None

    steph.__module__ = "steph.methods.builders"
    monkeypatch.setattr(builders, "steph", steph)
    after = {name: code_of(METHODS[name]) for name in before}
    assert {name for name in before if before[name] != after[name]} == {"adamerging", "surgery_am"}


def test_a_method_follows_the_modules_that_its_builder_names(monkeypatch):
    asked = []
    monkeypatch.setattr("steph.study.runs.code_fingerprint", lambda *modules: asked.append(set(modules)) or "")
    expected = {
        "roupkt": {"steph.mil.transfer", "steph.mil.abmil"},
        "surgery_am": {"steph.merging.surgery", "steph.merging.pairs", "steph.merging.steph"},
        "transmil": {"steph.mil.transmil"},
        "hypernetwork_only": {"steph.mil.mean_mil"},
        "steph_gamma_search": {"steph.training.selection", "steph.merging.steph"},
        "model_average": {"steph.merging.average"},
    }
    for name, modules in expected.items():
        code_of(METHODS[name])
        assert modules | {"steph.training.engine", "steph.survival"} <= asked[-1], name
