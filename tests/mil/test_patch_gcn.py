"""steph.mil.patch_gcn: the paper's numbers, the graph, and training on a data set with and without coordinates."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from steph import Refused
from steph.data import RaggedBatch
from steph.data.manifest import Network, Recipe
from steph.mil import NETWORKS, patch_gcn
from steph.mil.patch_gcn import PatchGCN, graph_of, neighbours
from steph.training.device import Compute
from steph.training.engine import fit, predict, seed_everything
from tests.training.test_engine import Patients


def grid(n, width=10):
    return torch.stack([torch.arange(n) % width, torch.arange(n) // width], dim=1).to(torch.int32) * 256


@pytest.fixture
def network(float64):
    torch.manual_seed(0)
    return PatchGCN(6, 12, 8, 4).eval()


SCATTERED = [np.random.default_rng(n).permutation(100_000)[: 2 * n].reshape(n, 2) for n in (1, 2, 8, 9, 10, 200)]


@pytest.mark.parametrize("coords", [*SCATTERED, grid(100).numpy(), np.zeros((30, 2), dtype=np.int32)])
def test_neighbours_are_the_nearest(coords):
    """On a grid and at one place, too, and never the patch itself."""
    n = len(coords)
    found = neighbours(coords)
    distance = np.linalg.norm(coords[:, None] - coords[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    k = min(8, n - 1)
    assert found.shape == (n, k)
    chosen = np.take_along_axis(distance, found.astype(int), axis=1)
    np.testing.assert_allclose(chosen, np.sort(distance, axis=1)[:, :k])
    assert all(len(set(row)) == k and i not in row for i, row in enumerate(found.tolist()))


def test_the_graph_does_not_depend_on_the_order_of_patches():
    coords = grid(95).numpy()
    order = np.random.default_rng(0).permutation(95)
    turned = neighbours(coords[order])
    straight = neighbours(coords)
    for i, at in enumerate(order):
        assert set(order[turned[i]]) == set(straight[at])


def test_slides_are_graphs_of_their_own():
    batch = RaggedBatch(torch.zeros(25, 6), (0, 20, 25), grid(25), (0, 12, 13, 20, 25))
    source, target = graph_of(batch)
    slide = np.repeat([0, 1, 2, 3], [12, 1, 7, 5])
    assert (slide[source] == slide[target]).all() and (source != target).all()
    degree = np.bincount(target, minlength=25)
    assert degree.tolist() == [8] * 12 + [0] + [6] * 7 + [4] * 5
    for i in range(2):
        part = batch.single(i)
        inside = (target >= batch.offsets[i]) & (target < batch.offsets[i + 1])
        assert torch.equal(graph_of(part), torch.stack([source, target])[:, inside] - batch.offsets[i])


def test_graphs_are_kept_by_content(monkeypatch):
    calls = []
    monkeypatch.setattr(patch_gcn, "neighbours", lambda coords: calls.append(len(coords)) or neighbours(coords))
    patch_gcn._cached_neighbours.cache_clear()

    def ask(coords):
        return graph_of(RaggedBatch.from_bags([torch.zeros(len(coords), 1)], [coords]))

    assert torch.equal(ask(grid(30)), ask(grid(30).clone())) and calls == [30]
    assert torch.equal(ask(grid(30)), ask(grid(30).long())) and calls == [30, 30]  # other numbers, the same graph
    assert not torch.equal(ask(grid(30)), ask(grid(30, 5))) and calls == [30, 30, 30]  # other places, other graph


def test_agrees_with_a_straight_line_computation(network):
    n = 23
    batch = RaggedBatch(torch.randn(n, 6), (0, n), grid(n), (0, 15, n))
    with torch.no_grad():
        network.graph.conv.aggr_module.t.fill_(1.7)
    source, target = graph_of(batch)
    x = F.relu(network.embed(batch.features))
    gathered = torch.zeros_like(x)
    for i in range(n):
        messages = F.relu(x[source[target == i]]) + 1e-7
        gathered[i] = (torch.softmax(1.7 * messages, dim=0) * messages).sum(0)
    first, norm, _, _, second = network.graph.conv.mlp
    hidden = F.relu(F.layer_norm((x + gathered) @ first.weight.T, (24,), norm.weight, norm.bias))
    outer = network.graph.norm
    convolved = x + F.relu(F.layer_norm(hidden @ second.weight.T, (12,), outer.weight, outer.bias))
    patches = F.relu(network.join(torch.cat([x, convolved], 1)))
    gate = torch.tanh(network.gate_tanh(patches)) * torch.sigmoid(network.gate_sigmoid(patches))
    attention = torch.softmax(network.score(gate).squeeze(1), 0)
    torch.testing.assert_close(network.attention(batch), attention, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(network.encode(batch)[0], attention @ patches, rtol=1e-10, atol=1e-12)


def test_trains_with_coordinates_and_on_sampled_bags(tiny):
    data, study = tiny.dataset("SARC"), tiny.study
    patients = list(data.cohort.slides_of)
    limit = int(data.n_patches(patients).max()) - 1
    seed_everything(0)
    model = NETWORKS["patch_gcn"](data.dim, study.network)
    recipe = study.recipe.model_copy(update={"epochs": 1, "max_patches": limit})
    fit(model, data, patients, recipe, study.network, seed=0)
    predictions = predict(model, data, patients, Compute(max_patches=limit))
    with torch.no_grad():
        logits = model(data.batch(patients, coords=True, max_patches=limit)).double()
    survival = torch.cumprod(1 - torch.sigmoid(logits), dim=1)
    np.testing.assert_allclose(predictions["risk"], -survival.sum(1), rtol=1e-5)


def test_a_data_set_without_coordinates_is_refused_before_training():
    data = Patients()

    def refuse(patients, network):
        raise Refused(f"{network} needs the coordinates of {len(patients)} patients")

    data.check_coords = refuse
    with pytest.raises(Refused, match="PatchGCN needs the coordinates of 40 patients"):
        fit(PatchGCN(5, 12, 8, 8), data, data.ids, Recipe(epochs=1), Network(n_bins=8), 0)
    assert not data.asked
