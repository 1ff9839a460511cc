"""Joint learning: one model for all data sets, trained once on everybody's training patients."""

import pandas as pd
import torch

from steph.study import Run, Workbench, run_all
from steph.study.runs import STAGE
from tests.helpers.spy import spied


def test_joint_is_trained_once_for_all_data_sets(tiny):
    leader, *others = [Run(name, "joint", 1, 42) for name in tiny.study.datasets]
    table = run_all(tiny, [leader, *others], workers=1)
    assert tiny.prerequisites(leader) == {}
    for run in others:
        assert tiny.prerequisites(run) == {STAGE: leader}
        assert tiny.record(run).info["trained_parameters"] == 0
        one, all_ = tiny.state(run), tiny.state(leader)
        assert set(one) == set(all_) and all(torch.equal(one[k], all_[k]) for k in one)
        predictions = pd.read_csv(tiny.record(run).file("predictions.csv"))
        assert predictions["patient_id"].tolist() == tiny.dataset(run.dataset).splits.test(1)
    assert tiny.record(leader).info["trained_parameters"] > 0
    assert table["external_c_index"].notna().all()


def test_joint_trains_on_everybodys_training_patients(tiny, monkeypatch):
    leader = Run(next(iter(tiny.study.datasets)), "joint", 0, 42)
    data, patients = tiny.training_set(leader)
    expected = {f"{d}/{p}" for d in tiny.study.datasets for p in tiny.dataset(d).splits.train(0)}
    assert set(patients) == expected and len(patients) == len(expected)
    assert len(data.labels(patients)) == len(patients)
    with spied(monkeypatch, "pieces") as looked_at:
        data.batch(patients[::40])
    assert {f"{dataset}/{patient}" for dataset, patient in looked_at} == set(patients[::40])


def test_joint_of_one_data_set_is_that_cancers_own_model(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    alone = Workbench(tiny.study.model_copy(update={"datasets": {"SARC": tiny.study.datasets["SARC"]}}))
    one, other = Run("SARC", "joint", 1, 42), Run("SARC", "vanilla", 1, 42)
    run_all(alone, [one, other], workers=1)
    states = alone.state(one), alone.state(other)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])


def test_keys_of_joint_follow_every_data_set(tiny, monkeypatch):
    leader, *others = [Run(name, "joint", 1, 42) for name in tiny.study.datasets]
    keys = {run: tiny.key(run) for run in (leader, *others)}
    vanilla = Run(leader.dataset, "vanilla", 1, 42)
    before = tiny.key(vanilla)
    again = Workbench("tiny")
    again._fingerprints[others[-1].dataset] = "of other splits"
    assert all(again.key(run) != key for run, key in keys.items())
    assert again.key(vanilla) == before
