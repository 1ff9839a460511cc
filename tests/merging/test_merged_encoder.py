import pytest
import torch

from steph.data import RaggedBatch
from steph.merging import MergedEncoder, task_vector
from steph.merging.merged_encoder import PADDING, SMALL, _groups
from steph.mil import ABMIL
from steph.mil.state import state_of
from tests.helpers.made_pool import encoder, moved


class Plain(ABMIL):
    """A network without `encode_each`: it takes the general way."""

    encodes_each = False


@pytest.fixture
def problem(float64):
    torch.manual_seed(0)
    network = ABMIL(6, 5, 4, 3).eval()
    null = state_of(network)
    vectors = [task_vector({k: v + torch.randn_like(v) for k, v in null.items()}, null) for _ in range(3)]
    bags = [torch.randn(n, 6) for n in (4, 19, 5, 1, 40)]
    return network, null, vectors, bags, torch.randn(5, 3)


def gradient(merging, coefficients, bags):
    coefficients = coefficients.clone().requires_grad_()
    features = merging(coefficients, bags)
    (features * torch.arange(features.numel()).view_as(features)).sum().backward()
    return features.detach(), coefficients.grad


def test_batched_and_looped_merging_agree(problem):
    network, null, vectors, bags, coefficients = problem
    features, d = gradient(MergedEncoder(network, null, vectors), coefficients, RaggedBatch.from_bags(bags))
    plain = MergedEncoder(Plain(6, 5, 4, 3).eval(), null, vectors)
    expected, d_expected = gradient(plain, coefficients, bags)
    torch.testing.assert_close(features, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(d, d_expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [ABMIL, Plain])
@pytest.mark.parametrize("few", [1, 10_000])
def test_one_row_of_coefficients_is_every_bags(problem, kind, few, monkeypatch):
    monkeypatch.setattr("steph.mil.abmil.FEW", few)  # by autograd, and by hand
    network, null, vectors, bags, coefficients = problem
    row = coefficients[:1]
    features, d = gradient(MergedEncoder(kind(6, 5, 4, 3).eval(), null, vectors), row, bags)
    expected, d_expected = gradient(MergedEncoder(network, null, vectors), row.expand(len(bags), -1), bags)
    torch.testing.assert_close(features, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(d, d_expected.sum(0, keepdim=True), rtol=1e-9, atol=1e-10)


def test_what_is_stacked_and_what_is_merged_lie_in_one_piece(problem):
    """A library's batched products copy what does not, in half precision most of all."""
    network, null, vectors, bags, coefficients = problem
    merging = MergedEncoder(network, null, vectors)
    gradient(merging, coefficients, bags)
    spaces = [merging.workspace(name, len(bags), torch.float64).of for name in ("weights", "gradients")]
    assert all(value.is_contiguous() for space in (merging.stacked(), *spaces) for value in space.values())
    for state, expected in zip(merging.states(), [null, *vectors], strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_memory_is_kept_between_calls_of_any_size(problem):
    network, null, vectors, bags, coefficients = problem
    merging = MergedEncoder(network, null, vectors)
    merging(coefficients, bags)
    address = merging._workspace["weights"].memory.data_ptr()
    features = merging(coefficients[:2], bags[:2])
    assert merging._workspace["weights"].memory.data_ptr() == address
    torch.testing.assert_close(features, MergedEncoder(network, null, vectors)(coefficients[:2], bags[:2]))


def test_merged_weights_are_the_looped_sum(problem):
    network, null, vectors, _, coefficients = problem
    merged = MergedEncoder(network, null, vectors).state(coefficients[1])
    expected = encoder(moved(null, vectors, coefficients[1]))
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


def test_nothing_but_the_coefficients_gets_a_gradient(problem):
    network, null, vectors, bags, coefficients = problem
    merging = MergedEncoder(network, null, vectors)
    gradient(merging, coefficients, bags)
    assert all(p.grad is None and not p.requires_grad for p in merging.parameters())


def test_a_late_backward_is_refused_not_wrong(problem):
    network, null, vectors, bags, coefficients = problem
    merging = MergedEncoder(network, null, vectors)
    first = merging(coefficients.clone().requires_grad_(), bags)
    merging(coefficients, bags)
    with pytest.raises(RuntimeError, match="workspace has been used again"):
        first.sum().backward()


@pytest.mark.parametrize(
    "sizes", [[1], [5, 5, 5], [1, 2, 4, 8, 100], [6, 7, 8, 9, 40, 41], [300, 310, 900, 2000, 2100]]
)
def test_groups_cover_all_and_waste_little(sizes):
    groups = list(_groups(sizes))
    assert [i for start, stop in groups for i in range(start, stop)] == list(range(len(sizes)))
    for start, stop in groups:
        assert sizes[stop - 1] * (stop - start) <= max(PADDING * sum(sizes[start:stop]), SMALL)
