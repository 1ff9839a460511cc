"""Joint learning: the union of data sets is each of them, patient by patient."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.joint import JointDataset
from steph.study.runs import Workbench


@pytest.fixture(scope="module")
def parts(build_folder):
    """Data sets of the study `tiny`; nothing is run."""
    bench = Workbench("tiny")
    return [bench.dataset(name) for name in ("SARC", "CESC", "LIHC")]


@pytest.fixture
def joint(parts):
    return JointDataset(parts)


def named(data: Dataset, patients):
    return [f"{data.name}/{patient}" for patient in patients]


def test_bags_and_labels_are_those_of_each_data_set(joint, parts):
    sarc, cesc, _ = parts
    chosen = [sarc.splits.train(0)[3], cesc.splits.train(0)[1], sarc.splits.train(0)[0]]
    names = [f"SARC/{chosen[0]}", f"CESC/{chosen[1]}", f"SARC/{chosen[2]}"]
    batch, owners = joint.batch(names, coords=True, dtype=torch.float64), (sarc, cesc, sarc)
    slides = []
    for i, (data, patient) in enumerate(zip(owners, chosen, strict=True)):
        own, found = data.batch([patient], coords=True, dtype=torch.float64), batch.single(i)
        assert torch.equal(found.features, own.features) and torch.equal(found.coords, own.coords)
        assert found.slide_offsets == own.slide_offsets
        slides.append(data.labels([patient]).assign(patient_id=names[i]))
    pd.testing.assert_frame_equal(joint.labels(names), pd.concat(slides, ignore_index=True))
    assert joint.n_patches(names).tolist() == batch.sizes
    assert joint.batch(names, max_patches=5).sizes == [min(5, n) for n in batch.sizes]
    joint.check_coords(names, "Patch-GCN")


@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.parametrize("n_parts", [1, 3])
def test_training_patients_are_everybodys_and_nobodys_test_patients(parts, n_parts, fold):
    parts = parts[:n_parts]
    training = JointDataset(parts).train(fold)
    assert training == [name for data in parts for name in named(data, data.splits.train(fold))]
    assert len(set(training)) == len(training)
    tested = {name for data in parts for name in named(data, data.splits.test(fold))}
    assert tested and not tested & set(training)


def test_two_data_sets_may_use_the_same_ids_and_an_external_set_is_refused(parts):
    data = parts[0]
    same = JointDataset([data, replace(data, name="SARC2")]).train(0)
    assert len(set(same)) == 2 * len(data.splits.train(0))
    with pytest.raises(Refused, match="external set"):
        JointDataset([data.external]).train(0)


@pytest.mark.parametrize(
    ("patients", "message"),
    [
        (["P1"], r"no patient P1; patients are named <data set>/<patient_id>"),
        (["BRCA/P1"], r"no patient BRCA/P1"),
        (["SARC/nobody"], r"SARC: no patient nobody"),
    ],
)
def test_unknown_patients_are_refused(joint, patients, message):
    for ask in (joint.labels, joint.batch, joint.n_patches):
        with pytest.raises(Refused, match=message):
            ask(patients)
    with pytest.raises(Refused, match="no patient given"):
        joint.batch([])
