"""steph.data.bags: what is done to a batch is what would be done to each bag."""

import pytest
import torch

from steph import Refused
from steph.data import RaggedBatch, as_batch
from steph.data.bags import parts, sample_each


@pytest.fixture
def bags():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (4, 1, 9)]


def test_bags_come_out_as_they_went_in(bags):
    batch = RaggedBatch.from_bags([bags[0], bags[1].unsqueeze(0), bags[2]])
    assert len(batch) == 3 and batch.sizes == [4, 1, 9] and batch.offsets == (0, 4, 5, 14)
    assert all(torch.equal(batch.bag(i), bag) for i, bag in enumerate(bags))
    assert as_batch(batch) is batch and torch.equal(as_batch(bags).features, batch.features)
    assert as_batch(bags[:1]).features.data_ptr() == bags[0].data_ptr(), "a single bag is not copied"


def test_mean_and_softmax_are_those_of_each_bag(bags):
    batch = as_batch(bags)
    assert torch.allclose(batch.mean(batch.features), torch.stack([bag.mean(0) for bag in bags]), atol=1e-14)
    attention = batch.softmax(batch.features[:, 0])
    for i, bag in enumerate(bags):
        own = attention[i, batch.offsets[i] : batch.offsets[i + 1]]
        assert torch.allclose(own, torch.softmax(bag[:, 0], 0), atol=1e-14)
    assert torch.equal(attention != 0, batch.membership)


def test_huge_scores_do_not_leak_between_bags(bags):
    batch = as_batch(bags)
    scores = torch.zeros(14, dtype=torch.float64)
    scores[0] = 1e300
    attention = batch.softmax(scores)
    assert torch.isfinite(attention).all() and torch.allclose(attention.sum(1), torch.ones(3, dtype=torch.float64))
    assert attention[2, -1] == pytest.approx(1 / 9)
    scores[5:] = -1e12
    assert torch.allclose(batch.softmax(scores)[2, 5:], torch.full((9,), 1 / 9, dtype=torch.float64))


def test_to_changes_precision_and_keeps_the_rest(bags):
    batch = RaggedBatch(torch.cat(bags), (0, 4, 5, 14), torch.zeros(14, 2), (0, 4, 5, 8, 14))
    half = batch.to("cpu", torch.float16)
    assert half.features.dtype == torch.float16 and half.coords is batch.coords
    assert (half.offsets, half.slide_offsets) == (batch.offsets, batch.slide_offsets)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [*[(offsets, "do not fit offsets") for offsets in ((0, 4, 5), (1, 5, 14), (0, 14, 20))],
     ((0, 4, 4, 14), "bag 1 has no patches")],
)  # fmt: skip
def test_offsets_that_do_not_fit_and_empty_bags_are_refused(bags, offsets, message):
    with pytest.raises(Refused, match=message):
        RaggedBatch(torch.cat(bags), offsets)


def test_larger_bags_are_sampled_and_smaller_ones_are_whole(bags):
    batch = as_batch(bags)
    found = sample_each(batch, 3, seed=1)
    assert found.sizes == [3, 1, 3] and torch.equal(found.bag(1), bags[1])
    for i in (0, 2):
        at = [torch.nonzero((bags[i] == row).all(1)).item() for row in found.bag(i)]
        assert at == sorted(set(at))  # the bag's own patches, none twice, in order
    assert sample_each(batch, 9, seed=1) is batch


def test_a_bags_sample_depends_on_its_size_and_the_seed_alone(bags):
    numbered = [torch.arange(50.0).view(-1, 1).expand(-1, 6) for _ in range(2)]
    together = sample_each(as_batch([bags[2].float(), *numbered]), 5, seed=1)
    alone = sample_each(as_batch(numbered[:1]), 5, seed=1)
    assert torch.equal(together.bag(1), together.bag(2)) and torch.equal(together.bag(1), alone.bag(0))
    drawn = {tuple(sample_each(as_batch(numbered[:1]), 5, seed=s).features[:, 0].tolist()) for s in range(20)}
    assert len(drawn) > 15


def test_some_bags_of_a_batch_are_a_batch_with_their_places_and_slides(bags):
    coords = torch.arange(28).view(14, 2)
    batch = RaggedBatch(torch.cat(bags), (0, 4, 5, 14), coords, (0, 2, 4, 5, 8, 14))
    found = batch.between(1, 3)
    assert found.offsets == (0, 1, 10) and found.slide_offsets == (0, 1, 4, 10)
    assert torch.equal(found.features, batch.features[4:]) and torch.equal(found.coords, coords[4:])
    assert found.features.data_ptr() == batch.features[4:].data_ptr()
    alone = batch.single(2)
    assert torch.equal(alone.features, bags[2]) and torch.equal(alone.coords, coords[5:])
    assert alone.offsets == (0, 9) and alone.slide_offsets == (0, 3, 9)
    plain = as_batch(bags).single(0)
    assert plain.coords is None and plain.slide_offsets is None


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([4, 1, 9], 14, [(0, 3)]),
        ([4, 1, 9], 13, [(0, 2), (2, 3)]),
        ([4, 1, 9], 1, [(0, 1), (1, 2), (2, 3)]),
        ([20, 1, 1, 20], 10, [(0, 1), (1, 3), (3, 4)]),
        ([0, 0], 1, [(0, 2)]),
    ],
)
def test_parts_are_runs_of_neighbours_and_miss_nobody(sizes, most, expected):
    assert parts(sizes, most) == expected
