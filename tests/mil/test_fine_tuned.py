import torch

from steph.data.manifest import Recipe
from steph.mil import ABMIL, FineTuned
from steph.mil.state import state_of
from steph.training.engine import fit, predict
from tests.training.test_engine import NETWORK, Patients


def test_fine_tuning_trains_a_head_and_nothing_else():
    torch.manual_seed(3)
    data, network = Patients(), ABMIL(5, 8, 4, 8)
    before = state_of(network)
    model = FineTuned(network, fresh_head=False)
    assert predict(model, data, data.ids[:4]).equals(predict(network, data, data.ids[:4])), "it goes on from the head"
    fit(model, data, data.ids, Recipe(lr=0.01, epochs=2), NETWORK, 0)
    assert list(state_of(model, trainable_only=True)) == ["head.weight", "head.bias"]
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert all(torch.equal(value, before[name]) for name, value in state_of(model.encoder.network).items())
    fresh = FineTuned(network, fresh_head=True)
    assert not torch.equal(fresh.head.weight, before["head.weight"]) and fresh.head.weight.shape == (8, 8)
