"""steph.mil.transmil against the paper's numbers and against a straight-line computation."""

import math

import pytest
import torch
from torch.nn import functional as F

from steph.mil.transmil import HEADS, Squares, TransMIL

DIM = 16


@pytest.fixture
def network(float64):
    torch.manual_seed(0)
    return TransMIL(6, DIM, 4).eval()


def layer_by_hand(layer, tokens):
    """x + Nystrom attention(norm(x)) of tokens (n, dim), head by head, from the method's equations; and each head's
    approximated attention matrix (n, n)."""
    landmarks, width = DIM // 2, DIM // HEADS
    x = F.layer_norm(tokens, (DIM,), layer.norm.weight, layer.norm.bias)
    x = torch.cat([torch.zeros(-len(x) % landmarks, DIM), x])
    query, key, value = (x @ part.T for part in layer.inputs.weight.chunk(3))
    query = query / math.sqrt(width)

    def of_head(values, head):
        return values[:, head * width : (head + 1) * width]

    matrices, middles = [], []
    for head in range(HEADS):
        q, k = of_head(query, head), of_head(key, head)
        q_mean = torch.stack([part.mean(0) for part in q.chunk(landmarks)])
        k_mean = torch.stack([part.mean(0) for part in k.chunk(landmarks)])
        middles.append(torch.softmax(q_mean @ k_mean.T, 1))
        matrices.append((torch.softmax(q @ k_mean.T, 1), torch.softmax(q_mean @ k.T, 1)))
    # The scale of the pseudo-inverse's start is one for all heads.
    scale = max(m.sum(1).max() for m in middles) * max(m.sum(0).max() for m in middles)
    found, attention = [], []
    for head, (left, right) in enumerate(matrices):
        a, one = middles[head], torch.eye(landmarks)
        z = a.T / scale
        for _ in range(6):
            z = 0.25 * z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z)))
        v = of_head(value, head)
        attention.append(left @ z @ right)
        kernel = layer.around.weight[head].view(-1)
        around = F.pad(v, (0, 0, 16, 16))
        found.append(attention[-1] @ v + sum(kernel[i] * around[i : i + len(v)] for i in range(33)))
    n = len(tokens)
    out = torch.cat(found, 1) @ layer.out.weight.T + layer.out.bias
    return tokens + out[-n:], [matrix[-n:, -n:] for matrix in attention]


@pytest.mark.parametrize(
    ("n", "filled"), [(1, [0]), (3, [0, 1, 2, 0]), (5, [*range(5), 0, 1, 2, 3]), (16, [*range(16)])]
)
def test_agrees_with_a_straight_line_computation(network, n, filled):
    bag = torch.randn(n, 6)
    embedded = F.relu(network.embed(bag))[filled]
    tokens, _ = layer_by_hand(network.first, torch.cat([network.token, embedded]))
    side = math.isqrt(len(filled))
    square = tokens[1:].view(side, side, DIM)
    encoded = square.clone()
    for convolution in network.position.convolutions:
        k = convolution.kernel_size[0]
        around = F.pad(square, (0, 0, k // 2, k // 2, k // 2, k // 2))
        for r in range(side):
            for c in range(side):
                patch = around[r : r + k, c : c + k]  # (k, k, dim)
                encoded[r, c] += (patch * convolution.weight.squeeze(1).permute(1, 2, 0)).sum((0, 1)) + convolution.bias
    tokens, attention = layer_by_hand(network.second, torch.cat([tokens[:1], encoded.view(-1, DIM)]))
    expected = F.layer_norm(tokens[:1], (DIM,), network.norm.weight, network.norm.bias)
    torch.testing.assert_close(network.encode([bag]), expected, rtol=1e-9, atol=1e-11)

    drawn = torch.stack(attention).mean(0)[0, 1:].abs()
    shares = torch.stack([drawn[[j for j, patch in enumerate(filled) if patch == i]].sum() for i in range(n)])
    torch.testing.assert_close(network.attention(bag), shares / shares.sum(), rtol=1e-9, atol=1e-11)


def test_large_bags_meet_only_their_like(monkeypatch, network):
    """Padding small bags to large ones' squares would cost more than it saves."""
    of, seen = Squares.of, []
    monkeypatch.setattr(Squares, "of", lambda sizes, *rest: seen.append(sizes) or of(sizes, *rest))
    network([torch.randn(n, 6) for n in (70, 5, 64, 80, 65, 400)])
    assert seen == [[70, 80, 65], [5, 64], [400]]
