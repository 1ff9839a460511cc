import pytest
import torch

from steph import Refused
from steph.merging import apply_task_vector, task_vector
from steph.merging.task_vectors import Layout
from steph.mil.state import ModelState, state_fingerprint
from tests.conftest import assert_states_close


def made(seed, origin=None):
    generator = torch.Generator().manual_seed(seed)
    values = {"a.weight": torch.randn(2, 3, generator=generator), "head.bias": torch.randn(2, generator=generator)}
    return ModelState(values, origin)


def test_there_and_back():
    null, model = made(0), made(1)
    assert_states_close(apply_task_vector(null, task_vector(model, null)), dict(model), rtol=1e-5)
    partial = apply_task_vector(null, {"a.weight": torch.ones(2, 3)})
    assert torch.equal(partial["head.bias"], null["head.bias"])


def test_models_of_another_null_model_are_refused():
    null = made(0)
    null.origin = state_fingerprint(null)
    task_vector(made(1, origin=null.origin), null)
    task_vector(made(1), null)  # nobody knows where it comes from: the caller vouches for it
    with pytest.raises(Refused, match="trained from another null model"):
        task_vector(made(1, origin="somewhere else"), null)


def test_models_of_another_network_are_refused():
    null, other = made(0), dict(made(1))
    other["a.weight"] = torch.zeros(3, 3)
    with pytest.raises(Refused, match=r"different networks.*a\.weight: \(3, 3\) and \(2, 3\)"):
        task_vector(other, null)
    with pytest.raises(Refused, match=r"b\.weight"):
        apply_task_vector(null, {"b.weight": torch.zeros(1)})


def test_layout_views_are_views():
    state = made(0)
    layout = Layout.of(state)
    flat = torch.stack([layout.flatten(state), layout.flatten(made(1))])
    assert flat.shape == (2, layout.size) == (2, 8)
    views = layout.views(flat)
    assert_states_close({k: v[0] for k, v in views.items()}, dict(state))
    views["head.bias"].zero_()
    assert (flat[:, 6:] == 0).all()
