"""STEPH's variants as runs of a study: controls, samples of patches, other networks, a searched gamma."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from steph.data.bags import RaggedBatch
from steph.merging import task_vector
from steph.merging.steph import Hypernetwork
from steph.mil import PatchGCN
from steph.study import Run, Workbench, run, run_all
from steph.study.runs import TARGET
from steph.training.engine import predict
from steph.training.selection import INNER_FOLDS, best_value

SARC = Run("SARC", "steph", 1, 42)


def changed(study, **steph):
    return study.model_copy(update={"steph": study.steph.model_copy(update=steph)})


def test_random_sources_start_where_steph_starts(tiny):
    """The same hypernetwork, the same target vector, sources' vectors of the same norms: only directions differ."""
    real, noise = tiny.untrained(SARC), tiny.untrained(replace(SARC, method="steph_random_sources"))
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
    other_seed = tiny.untrained(replace(SARC, method="steph_random_sources", seed=7))
    assert not torch.equal(flatten(other_seed.encoder.states()[2]), flatten(others[0]))


@pytest.mark.parametrize("sample_patches", [None, 100_000])
def test_a_sample_of_all_patches_is_steph_bit_for_bit(tiny, sample_patches):
    other = Workbench(changed(tiny.study, sample_patches=sample_patches))
    this = replace(SARC, method="steph_subsampled")
    run_all(other, [this], workers=1)
    one, two = other.state(this), tiny.state(SARC)
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in two)
    tables = [b.record(r).file("predictions.csv").read_bytes() for b, r in ((other, this), (tiny, SARC))]
    assert tables[0] == tables[1]


def test_the_hypernetwork_reads_a_sample_and_the_encoder_everything(tiny, monkeypatch):
    data, other = tiny.dataset("SARC"), Workbench(changed(tiny.study, sample_patches=7))
    batch = data.batch(data.splits.train(1)[:6])
    sizes = batch.sizes
    assert min(sizes) < max(sizes) and max(sizes) > 7
    this = replace(SARC, method="steph_subsampled")
    run_all(other, other.prerequisites(this).values(), workers=1)
    model = other.untrained(this).eval()
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


def test_steph_merges_patch_gcn_models_and_gives_them_coordinates(tiny, monkeypatch):
    this = replace(SARC, method="steph_patch_gcn")
    run_all(tiny, [this], workers=1)
    needed = tiny.prerequisites(this)
    assert {run.method for run in needed.values()} == {"patch_gcn"} and set(needed) == {TARGET, "CESC", "LIHC"}
    model, data = tiny.model(this), tiny.dataset("SARC")
    assert isinstance(model.encoder.network, PatchGCN)
    null = tiny.null_state("patch_gcn")
    vector = task_vector(tiny.state(needed[TARGET]), null)
    assert all(torch.equal(value, vector[name]) for name, value in model.encoder.states()[1].items())
    coords, encode_under = [], PatchGCN.encode_under
    watched = lambda self, weights, batch: coords.append(batch.coords) or encode_under(self, weights, batch)  # noqa: E731
    monkeypatch.setattr(PatchGCN, "encode_under", watched)
    predict(model, data, data.splits.test(1)[:3])
    assert len(coords) == 3 and all(places is not None for places in coords)
    patient = data.splits.test(1)[0]
    there = data.batch([patient], coords=True)
    moved = RaggedBatch(there.features, there.offsets, there.coords.flip(0), there.slide_offsets)
    assert not torch.equal(model(there), model(moved))


def test_a_searched_gamma_gives_the_run_of_that_gamma(tiny):
    found = run(tiny.study, "SARC", "steph_gamma_search", 1)
    gamma = found.info["facts"]["gamma"]
    scores = pd.DataFrame(found.info["facts"]["inner_c_index"])
    assert len(scores) == INNER_FOLDS * 5 and gamma == best_value(scores)
    given = run(tiny.study, "SARC", f"steph_gamma{gamma:g}", 1)
    for name in ("model.safetensors", "predictions.csv"):
        assert found.info["files"][name] == given.info["files"][name]
