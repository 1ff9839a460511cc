"""Methods beyond the paper, as runs of a study: what they see, what they train, what they are equal to."""

from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import pytest
import torch

from steph.data.bags import RaggedBatch
from steph.data.dataset import Dataset
from steph.merging import task_vector
from steph.merging.steph import Hypernetwork
from steph.mil import PatchGCN
from steph.mil.state import load_state
from steph.study.execute import Run, Workbench, plan, run_all
from steph.study.paper import tables_of_methods
from steph.study.runs import SOURCE_FOLD, STAGE, TARGET

FREE = ["steph_free_cosine", "steph_free_concordance", "steph_free_scores"]
BEYOND = ["joint", "steph_random_sources", "steph_subsampled", "steph_patch_gcn", *FREE]
SARC = Run("SARC", "steph", 1, 42)


@pytest.fixture(scope="module")
def bench(tiny):
    """The study `tiny` with all that is here finished on SARC, fold 1, whatever the book shows."""
    run_all(tiny, [replace(SARC, method=name) for name in ("steph", *BEYOND)], workers=1)
    return tiny


def state(bench, wanted):
    return load_state(bench.record(wanted).file("model.safetensors"))


def changed(study, **steph):
    return study.model_copy(update={"steph": study.steph.model_copy(update=steph)})


@contextmanager
def seen(monkeypatch):
    """Patients of each data set who were looked at, in order: (data set, patient, what was asked)."""
    found = []
    with monkeypatch.context() as patch:
        for what in ("batch", "labels", "slides"):
            original = getattr(Dataset, what)

            def spied(self, patients, *args, original=original, what=what, **options):
                names = [patients] if isinstance(patients, str) else patients
                if self.splits is not None:  # external patients are nobody's test fold
                    found.extend((self.name, patient, what) for patient in names)
                return original(self, patients, *args, **options)

            patch.setattr(Dataset, what, spied)
        yield found


@pytest.mark.parametrize("name", ["vanilla", *BEYOND])
def test_no_test_patient_is_looked_at_before_predictions(bench, name, monkeypatch):
    from steph.study import execute as module

    wanted = next(Run(d, name, 1, 42) for d in (bench.study.datasets if name == "joint" else ["SARC"]))
    predicting = []
    original = module.predict

    def predict(model, data, patients, *args):
        predicting.append(len(looked_at))
        return original(model, data, patients, *args)

    record = bench.record
    monkeypatch.setattr(bench, "record", lambda run: None if run == wanted else record(run))  # it is not finished yet
    with seen(monkeypatch) as looked_at:
        monkeypatch.setattr(module, "predict", predict)
        monkeypatch.setattr(module, "write_record", lambda *args: None)
        module._execute(bench, wanted, "cpu")
    before, after = looked_at[: predicting[0]], looked_at[predicting[0] :]
    tested = {(d, p) for d in bench.study.datasets for p in bench.dataset(d).splits.test(1)}
    assert not tested & {(dataset, patient) for dataset, patient, _ in before}
    own = {("SARC" if name != "joint" else wanted.dataset, p) for p in bench.dataset(wanted.dataset).splits.test(1)}
    assert {(dataset, patient) for dataset, patient, _ in after} == own
    looks = name not in ("steph_free_cosine",)
    assert bool(before) == looks  # the data-free way looks at nobody


# ------------------------------------------------------------------------------------------------ joint


def test_joint_is_trained_once_for_all_data_sets(bench):
    leader, *others = [Run(name, "joint", 1, 42) for name in bench.study.datasets]
    table = run_all(bench, [leader, *others], workers=1)
    assert bench.prerequisites(leader) == {}
    for run in others:
        assert bench.prerequisites(run) == {STAGE: leader}
        assert bench.record(run).info["trained_parameters"] == 0
        one, all_ = state(bench, run), state(bench, leader)
        assert set(one) == set(all_) and all(torch.equal(one[k], all_[k]) for k in one)
        predictions = pd.read_csv(bench.record(run).file("predictions.csv"))
        assert predictions["patient_id"].tolist() == bench.dataset(run.dataset).splits.test(1)
    assert bench.record(leader).info["trained_parameters"] > 0
    assert table["external_c_index"].notna().all()


def test_joint_trains_on_everybodys_training_patients(bench, monkeypatch):
    leader = Run(next(iter(bench.study.datasets)), "joint", 0, 42)
    data, patients = bench.training_set(leader)
    expected = {f"{d}/{p}" for d in bench.study.datasets for p in bench.dataset(d).splits.train(0)}
    assert set(patients) == expected and len(patients) == len(expected)
    assert len(data.labels(patients)) == len(patients)
    with seen(monkeypatch) as looked_at:
        data.batch(patients[::40])
    assert {f"{dataset}/{patient}" for dataset, patient, _ in looked_at} == set(patients[::40])


def test_joint_of_one_data_set_is_that_cancers_own_model(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    alone = Workbench(bench.study.model_copy(update={"datasets": {"SARC": bench.study.datasets["SARC"]}}))
    one, other = Run("SARC", "joint", 1, 42), Run("SARC", "vanilla", 1, 42)
    run_all(alone, [one, other], workers=1)
    states = state(alone, one), state(alone, other)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])


def test_keys_of_joint_follow_every_data_set(bench, monkeypatch):
    leader, *others = [Run(name, "joint", 1, 42) for name in bench.study.datasets]
    keys = {run: bench.key(run) for run in (leader, *others)}
    vanilla = Run(leader.dataset, "vanilla", 1, 42)
    before = bench.key(vanilla)
    again = Workbench("tiny")
    last = again.dataset(others[-1].dataset)
    again._datasets[others[-1].dataset] = replace(last, splits=replace(last.splits, folds=last.splits.folds[::-1]))
    assert all(again.key(run) != key for run, key in keys.items())
    assert again.key(vanilla) == before


# ------------------------------------------------------------------------------------------------ random sources


def test_random_sources_start_where_steph_starts(bench):
    """The same hypernetwork, the same target vector, sources' vectors of the same norms: only directions differ."""
    real, noise = bench.untrained(SARC), bench.untrained(replace(SARC, method="steph_random_sources"))
    trained = {k: p for k, p in real.named_parameters() if p.requires_grad}
    others = dict(noise.named_parameters())
    assert trained and all(torch.equal(p, others[k]) for k, p in trained.items())
    (base, target, *vectors), (same_base, same_target, *others) = real.encoder.states(), noise.encoder.states()
    flatten = real.encoder.layout.flatten
    assert torch.equal(flatten(base), flatten(same_base)) and torch.equal(flatten(target), flatten(same_target))
    for one, other in zip(vectors, others, strict=True):
        norms = [torch.stack([v.norm() for v in x.values()]) for x in (one, other)]
        torch.testing.assert_close(*norms)
        assert abs(torch.cosine_similarity(flatten(one), flatten(other), dim=0)) < 0.15
    other_seed = bench.untrained(replace(SARC, method="steph_random_sources", seed=7))
    assert not torch.equal(flatten(other_seed.encoder.states()[2]), flatten(others[0]))


# ------------------------------------------------------------------------------------------------ subsampled


@pytest.mark.parametrize("sample_patches", [None, 100_000])
def test_a_sample_of_all_patches_is_steph_bit_for_bit(bench, sample_patches):
    other = Workbench(changed(bench.study, sample_patches=sample_patches))
    wanted = replace(SARC, method="steph_subsampled")
    run_all(other, [wanted], workers=1)
    one, two = state(other, wanted), state(bench, SARC)
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in two)
    tables = [b.record(r).file("predictions.csv").read_bytes() for b, r in ((other, wanted), (bench, SARC))]
    assert tables[0] == tables[1]


def test_the_hypernetwork_reads_a_sample_and_the_encoder_everything(bench, monkeypatch):
    study = changed(bench.study, sample_patches=7)
    data = bench.dataset("SARC")
    patients = data.splits.train(1)[:6]
    batch = data.batch(patients)
    sizes = batch.sizes
    assert min(sizes) < max(sizes) and max(sizes) > 7
    other = Workbench(study)
    run_all(other, [replace(SARC, method="vanilla")], workers=1)
    run_all(other, [Run(name, "vanilla", SOURCE_FOLD, 42) for name in ("CESC", "LIHC")], workers=1)
    model = other.untrained(replace(SARC, method="steph_subsampled")).eval()
    read, encoded = [], []
    forward = Hypernetwork.forward
    monkeypatch.setattr(Hypernetwork, "forward", lambda self, b: read.append(b) or forward(self, b))
    model.encoder.register_forward_pre_hook(lambda module, args: encoded.append(args[1]))
    w, lam, _ = model.batch_coefficients(batch)
    model(batch)
    assert read[0].sizes == [min(7, n) for n in sizes] and encoded[0].sizes == sizes
    for i, n in enumerate(sizes):  # what is read are the bag's own patches, none twice
        rows = {tuple(row) for row in batch.bag(i).tolist()}
        sampled = [tuple(row) for row in read[0].bag(i).tolist()]
        assert len(set(sampled)) == len(sampled) == min(7, n) and set(sampled) <= rows
        alone = model.coefficients(batch.bag(i))  # and the same ones, whatever else is in the batch
        torch.testing.assert_close(alone[0], w[i])
        torch.testing.assert_close(alone[1], lam[i])


# ------------------------------------------------------------------------------------------------ Patch-GCN


def test_steph_merges_patch_gcn_models_and_gives_them_coordinates(bench, monkeypatch):
    wanted = replace(SARC, method="steph_patch_gcn")
    upstream = bench.prerequisites(wanted)
    assert {first.method for first in upstream.values()} == {"patch_gcn"} and set(upstream) == {TARGET, "CESC", "LIHC"}
    model, data = bench.model(wanted), bench.dataset("SARC")
    assert isinstance(model.encoder.network, PatchGCN)
    null = bench.null_state("patch_gcn")
    vector = task_vector(bench.state(upstream[TARGET]), null)
    assert all(torch.equal(value, vector[name]) for name, value in model.encoder.states()[1].items())
    coords = []
    encode = PatchGCN.encode_under

    def watched(network, weights, bags):
        coords.append(bags.coords)
        return encode(network, weights, bags)

    monkeypatch.setattr(PatchGCN, "encode_under", watched)
    from steph.training.engine import predict

    predict(model, data, data.splits.test(1)[:3])
    assert len(coords) == 3 and all(found is not None for found in coords)
    patient = data.splits.test(1)[0]
    there = data.batch([patient], coords=True)
    moved = RaggedBatch(there.features, there.offsets, there.coords.flip(0), there.slide_offsets)
    assert not torch.equal(model(there), model(moved))


# ------------------------------------------------------------------------------------------------ training-free


@pytest.mark.parametrize("name", FREE)
def test_training_free_methods_train_nothing_and_say_what_they_chose(bench, name):
    record = bench.record(replace(SARC, method=name))
    assert record.info["trained_parameters"] == 0 and not any(
        p.requires_grad for p in bench.model(SARC).encoder.parameters()
    )
    w, lam = record.info["facts"]["w"], record.info["facts"]["lambda"]
    assert set(w) == set(lam) == {"CESC", "LIHC"}
    assert all(value >= 0 for value in w.values()) and all(0 <= value <= 1 for value in lam.values())
    own, null = state(bench, replace(SARC, method="vanilla")), bench.null_state("abmil")
    found = state(bench, replace(SARC, method=name))
    sources = {n: state(bench, Run(n, "vanilla", SOURCE_FOLD, 42)) for n in w}
    for key, base in null.items():
        expected = base.double()
        for n, source in sources.items():
            mixture = lam[n] * (own[key] - base).double() + (1 - lam[n]) * (source[key] - base).double()
            expected = expected + w[n] * mixture
        expected = own[key].double() if key.startswith("head.") else expected
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FREE)
def test_training_free_methods_repeat_themselves_and_reload_without_looking(bench, name, monkeypatch):
    wanted = replace(SARC, method=name)
    with seen(monkeypatch) as looked_at:
        model = bench.model(wanted)
    assert not looked_at
    monkeypatch.setattr(bench, "record", lambda run: None if run == wanted else Workbench.record(bench, run))
    again = bench.untrained(wanted)
    assert again.facts == model.facts
    for (key, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), key


# ------------------------------------------------------------------------------------------------ repeats


def test_a_repeated_study_has_more_folds_and_the_same_first_ones(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    repeated = Workbench(bench.study.model_copy(update={"repeats": 2}))
    assert (repeated.study.folds, repeated.study.n_folds) == (2, 4)
    assert [run.fold for run in plan(repeated.study, ["SARC"], ["vanilla"])] == [0, 1, 2, 3]
    run = Run("SARC", "model_average", 3, 42)
    run_all(repeated, [run], workers=1)
    upstream = repeated.prerequisites(run)
    assert upstream[TARGET].fold == 3 and {upstream[name].fold for name in ("CESC", "LIHC")} == {SOURCE_FOLD}
    splits = repeated.dataset("SARC").splits
    predictions = pd.read_csv(repeated.record(run).file("predictions.csv"))
    assert predictions["patient_id"].tolist() == splits.test(3)
    assert splits.folds[:2] == bench.dataset("SARC").splits.folds
    assert sorted(splits.test(2) + splits.test(3)) == sorted(splits.test(0) + splits.test(1))


def test_one_repeat_changes_no_key(bench):
    """`repeats` is none of what decides a run's result: its splits are."""
    one = Workbench(bench.study.model_copy(update={"repeats": 1}))
    assert one.key(SARC) == bench.key(SARC)
    assert one.dataset("SARC").fingerprint == bench.dataset("SARC").fingerprint


def test_entries_beyond_the_paper_stand_in_none_of_its_tables():
    assert not set(BEYOND) & set(tables_of_methods())
