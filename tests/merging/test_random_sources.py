"""Random sources: as long as the sources' task vectors, and of nothing else."""

import pytest
import torch

from steph.merging import task_vector
from steph.merging.random_sources import random_sources
from steph.merging.task_vectors import Layout
from steph.mil import ABMIL
from tests.helpers.made_pool import Pool


@pytest.fixture
def models():
    pool = Pool(lambda: ABMIL(32, 40, 24, 8))
    pool.sources["c"]["gate_tanh.bias"] = pool.null["gate_tanh.bias"].clone()  # a parameter that did not move
    return pool.null, pool.sources


def vectors(null, states):
    return {name: task_vector(state, null) for name, state in states.items()}


def test_every_parameter_moves_as_far_as_the_sources_did(models):
    null, states = models
    noisy = random_sources(null, states, 42)
    assert torch.equal(noisy["c"]["gate_tanh.bias"], null["gate_tanh.bias"]) and noisy["c"].origin == null.origin
    found = vectors(null, noisy)
    for name, tau in vectors(null, states).items():
        for parameter, value in tau.items():
            noise = found[name][parameter]
            assert (noise.shape, noise.dtype) == (value.shape, value.dtype)
            assert noise.norm().item() == pytest.approx(value.norm().item(), rel=1e-5, abs=1e-7)


def test_noise_is_related_to_nothing(models):
    """Cosines with sources, with their noise and with that of another seed are those of chance, about 1 / sqrt(P)."""
    null, states = models
    layout = Layout({k: tuple(v.shape) for k, v in null.items() if k != "gate_tanh.bias"})
    sets = [vectors(null, s) for s in (states, random_sources(null, states, 42), random_sources(null, states, 43))]
    flat = torch.stack([layout.flatten(tau) for taus in sets for tau in taus.values()])
    flat = torch.nn.functional.normalize(flat, dim=1)
    cosines = (flat @ flat.T)[3:][:, :]
    cosines = cosines[~torch.eye(9, dtype=torch.bool)[3:]]
    assert cosines.abs().max() < 5 / layout.size**0.5


def test_noise_follows_seed_and_name_alone(models):
    null, states = models
    plain, alone = random_sources(null, states, 42), random_sources(null, {"b": states["b"]}, 42)
    torch.randn(7)  # nor does it use or disturb the global generator
    before = torch.get_rng_state()
    turned = random_sources(null, dict(reversed(states.items())), 42)
    assert torch.equal(torch.get_rng_state(), before)
    for name in null:
        assert torch.equal(plain["b"][name], alone["b"][name]) and torch.equal(plain["a"][name], turned["a"][name])
    assert list(turned) == ["c", "b", "a"]
    assert not torch.equal(plain["a"]["embed.weight"], random_sources(null, states, 1)["a"]["embed.weight"])
    same = random_sources(null, {"a": states["a"], "z": states["a"]}, 42)
    assert not torch.equal(same["a"]["embed.weight"], same["z"]["embed.weight"])
