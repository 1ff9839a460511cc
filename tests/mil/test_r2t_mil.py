"""steph.mil.r2t_mil against the paper's numbers and against a computation region by region, head by head."""

import math

import pytest
import torch
from torch.nn import functional as F

from steph.mil.r2t_mil import HEADS, KERNEL, R2TMIL, REPRESENTATIVES

DIM = 16


@pytest.fixture
def network(float64):
    torch.manual_seed(0)
    return R2TMIL(6, DIM, 4).eval()


def regions_by_hand(n):
    """The patches of each region, -1 where there is none: a square, row by row, in 8 x 8 blocks."""
    edge = math.ceil(math.ceil(math.sqrt(n)) / 8)
    side = 8 * edge
    number = [[r * side + c if r * side + c < n else -1 for c in range(side)] for r in range(side)]
    return [
        [number[r][c] for r in range(i * edge, (i + 1) * edge) for c in range(j * edge, (j + 1) * edge)]
        for i in range(8)
        for j in range(8)
    ]


def attend_by_hand(attention, tokens):
    """Multi-head self-attention of tokens (n, dim), with the position encoding where there is one."""
    query, key, value = attention.inputs(tokens).chunk(3, dim=1)
    width, found = DIM // HEADS, []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / math.sqrt(width)
        if attention.position is not None:
            kernel, half = attention.position.weight[head].view(-1), KERNEL // 2
            around = F.pad(scores, (0, 0, half, half))
            encoded = sum(kernel[i] * around[i : i + len(scores)] for i in range(KERNEL))
            scores = scores + encoded + attention.position.bias[head]
        found.append(torch.softmax(scores, dim=1) @ value[:, part])
    return attention.out(torch.cat(found, 1))


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 100, 257])
def test_agrees_with_a_computation_region_by_region(network, n):
    bag, regions = torch.randn(n, 6), regions_by_hand(n)

    def taken(values, region):
        return torch.stack([values[i] if i >= 0 else torch.zeros(DIM) for i in region])

    x = F.relu(network.embed(bag))
    normal, within = network.within.norm(x), x.clone()
    for region in regions:
        found = attend_by_hand(network.within.attention, taken(normal, region))
        for place, i in enumerate(region):
            if i >= 0:
                within[i] = x[i] + found[place]

    normal, across = network.across.norm(within), within.clone()
    tokens = [taken(normal, region) for region in regions]
    scores = [t @ network.across.representatives for t in tokens]  # (p, k) each
    summed = torch.stack([torch.softmax(s, 0).T @ t for s, t in zip(scores, tokens, strict=True)])  # (64, k, dim)
    spoken = torch.stack(
        [attend_by_hand(network.across.attention, summed[:, k]) for k in range(REPRESENTATIVES)], dim=1
    )
    for r, region in enumerate(regions):
        low, high = scores[r].min(0).values, scores[r].max(0).values
        share = torch.softmax(scores[r], 1) * (scores[r] - low) / (high - low + 1e-8)
        for place, i in enumerate(region):
            if i >= 0:
                across[i] = within[i] + share[place] @ spoken[r]

    patches = network.norm(across)
    attention = torch.softmax(network.score(torch.tanh(network.pool(patches))).squeeze(1), 0)
    torch.testing.assert_close(network.attention(bag), attention, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(network.encode([bag])[0], attention @ patches, rtol=1e-9, atol=1e-11)


def test_a_region_of_one_score_has_clean_gradients():
    """Where a region has one score, nothing is shared, and no gradient comes back: not even the rounding of 1 / 0."""
    torch.manual_seed(0)
    network = R2TMIL(6, DIM, 4, dropout=0)
    for bag in (torch.randn(30, 6), torch.randn(1, 6).expand(576, 6)):  # regions of one patch; of equal patches
        network.zero_grad()
        network([bag]).square().sum().backward()
        assert network.across.representatives.grad.abs().max() == 0
    network.zero_grad()
    network([torch.randn(130, 6)]).square().sum().backward()
    assert network.across.representatives.grad.abs().max() > 0
