"""steph.mil.ilra against the paper's numbers and against a computation bag by bag, head by head."""

import pytest
import torch
from torch.nn import functional as F

from steph.mil.ilra import HEADS, ILRA

DIM = 16


def block_by_hand(block, queries, keys):
    """Queries (q, .) attend to keys (n, .) of one bag: (q, dim) and the attention (q, n)."""
    q, k, v = block.query(queries), block.key(keys), block.value(keys)
    inputs = zip(block.attend.in_proj_weight.chunk(3), block.attend.in_proj_bias.chunk(3), (q, k, v), strict=True)
    q_in, k_in, v_in = (values @ weight.T + bias for weight, bias, values in inputs)
    found, attention = [], []
    width = DIM // HEADS
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        attention.append(torch.softmax(q_in[:, part] @ k_in[:, part].T / width**0.5, dim=1))
        found.append(attention[-1] @ v_in[:, part])
    o = q + torch.cat(found, 1) @ block.attend.out_proj.weight.T + block.attend.out_proj.bias
    o = o + F.relu(block.out(o))
    if block.gate is not None:
        gate = block.gate(queries)
        o = o * gate * torch.sigmoid(gate)
    return o, torch.stack(attention).mean(0)


@pytest.mark.parametrize("n_latents", [1, 3])
def test_agrees_with_a_computation_bag_by_bag(float64, n_latents):
    torch.manual_seed(0)
    network = ILRA(6, DIM, 4, n_latents).eval()
    bags = [torch.randn(n, 6) for n in (1, 7, 30)]
    features = network.encode(bags)
    for i, bag in enumerate(bags):
        patches = bag
        for block in network.blocks:
            gathered, _ = block_by_hand(block.to_latents, block.latents, patches)
            patches, _ = block_by_hand(block.from_latents, patches, gathered)
        expected, attention = block_by_hand(network.pool, network.query, patches)
        torch.testing.assert_close(features[i], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(network.attention(bag), attention[0], rtol=1e-10, atol=1e-12)


def test_with_one_latent_its_scores_have_no_say(float64):
    """What the class says of its weights: a softmax over one key is 1."""
    torch.manual_seed(0)
    for n_latents, idle in ((1, True), (2, False)):
        network = ILRA(6, DIM, 4, n_latents)
        network([torch.randn(9, 6), torch.randn(4, 6)]).square().sum().backward()
        for block in network.blocks:
            scoring = block.from_latents.attend.in_proj_weight.grad[: 2 * DIM]
            assert (scoring.abs().max() < 1e-14) == idle
            assert (block.from_latents.key.weight.grad.abs().max() < 1e-14) == idle
            assert block.from_latents.query.weight.grad.abs().max() > 1e-6  # also a residual connection
