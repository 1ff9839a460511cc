import pytest
import torch

from steph.data import RaggedBatch
from steph.merging import MergedEncoder, task_vector
from steph.merging.merged_encoder import PADDING, SMALL, _groups
from steph.mil import ABMIL
from steph.mil.state import state_of


class Plain(ABMIL):
    """A network without `encode_each`: it takes the general way."""

    encodes_each = False


@pytest.fixture
def problem(float64):
    """A state and three task vectors, bags, and coefficients for each bag."""
    torch.manual_seed(0)
    null = state_of(ABMIL(6, 5, 4, 3))
    vectors = [task_vector({k: v + torch.randn_like(v) for k, v in null.items()}, null) for _ in range(3)]
    return (null, vectors), [torch.randn(n, 6) for n in (4, 19, 5, 1, 40)], torch.randn(5, 3)


def merging_encoder(models, kind=ABMIL):
    return MergedEncoder(kind(6, 5, 4, 3).eval(), *models)


def gradient(merging, coefficients, bags):
    """Bag features, and the gradient of the coefficients; nothing else gets one."""
    coefficients = coefficients.clone().requires_grad_()
    features = merging(coefficients, bags)
    (features * torch.arange(features.numel()).view_as(features)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in merging.parameters())
    return features.detach(), coefficients.grad


def test_batched_and_looped_merging_agree(problem):
    models, bags, coefficients = problem
    features, d = gradient(merging_encoder(models), coefficients, RaggedBatch.from_bags(bags))
    expected, d_expected = gradient(merging_encoder(models, Plain), coefficients, bags)
    torch.testing.assert_close(features, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(d, d_expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [ABMIL, Plain])
@pytest.mark.parametrize("few", [1, 10_000])
def test_one_row_of_coefficients_is_every_bags(problem, kind, few, monkeypatch):
    monkeypatch.setattr("steph.mil.abmil.FEW", few)  # by autograd, and by hand
    models, bags, coefficients = problem
    row = coefficients[:1]
    features, d = gradient(merging_encoder(models, kind), row, bags)
    expected, d_expected = gradient(merging_encoder(models), row.expand(len(bags), -1), bags)
    torch.testing.assert_close(features, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(d, d_expected.sum(0, keepdim=True), rtol=1e-9, atol=1e-10)


def test_what_is_stacked_and_what_is_merged_lie_in_one_piece(problem):
    """A library's batched products copy what does not, in half precision most of all."""
    (null, vectors), bags, coefficients = problem
    merging = merging_encoder((null, vectors))
    gradient(merging, coefficients, bags)
    spaces = [merging.workspace(name, len(bags), torch.float64) for name in ("weights", "gradients")]
    spaces = [space.of for space in (*spaces, merging.fixed(torch.float64))]
    assert all(value.is_contiguous() for space in (merging.stacked(), *spaces) for value in space.values())
    for state, expected in zip(merging.states(), [null, *vectors], strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_memory_is_used_again_by_calls_of_any_size(problem):
    models, bags, coefficients = problem
    merging = merging_encoder(models)
    merging(coefficients, bags)
    address = merging._workspace["weights"].memory.data_ptr()
    features = merging(coefficients[:2], bags[:2])
    assert merging._workspace["weights"].memory.data_ptr() == address
    torch.testing.assert_close(features, merging_encoder(models)(coefficients[:2], bags[:2]))


def test_a_late_backward_is_refused_not_wrong(problem):
    models, bags, coefficients = problem
    merging = merging_encoder(models)
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
