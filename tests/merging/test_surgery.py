import pytest
import torch
from torch.nn import functional as F

from steph.data.manifest import Recipe
from steph.merging import Surgery
from steph.merging.surgery import Adapter
from steph.mil import ABMIL
from steph.mil.state import load_into, state_of
from steph.training.engine import fit
from tests.helpers.made_pool import adamerging
from tests.training.test_engine import NETWORK, Patients


def test_adapter_is_the_originals(reference, float64):
    numbers = reference("j_surgery")
    adapter = Adapter(16, rank=4)
    torch.testing.assert_close(adapter.up.weight.detach(), numbers.tensor("up_init"))
    feature = numbers.tensor("feature")
    assert torch.equal(adapter(feature), feature), "it starts as the identity"
    load_into(adapter, {"down.weight": numbers.tensor("down_weight"), "up.weight": numbers.tensor("up_weight")})
    torch.testing.assert_close(feature - adapter(feature), numbers.tensor("feature_sub"), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(adapter(feature), numbers.tensor("feature_out"), rtol=1e-11, atol=1e-13)
    loss = F.l1_loss(adapter(feature), numbers.tensor("individual_feature"))
    assert loss.item() == pytest.approx(float(numbers["l1_loss"]), rel=1e-12)
    assert Adapter(512).down.weight.shape == (int(numbers["default_rank"]), 512)


def made():
    """A merged model of three cancers, and surgery on it."""
    torch.manual_seed(0)
    null, target, one, two = (state_of(ABMIL(5, 8, 4, 8)) for _ in range(4))
    merged = adamerging(null, target, {"target": target, "one": one, "two": two}, dropout=0.25)
    target_model = ABMIL(5, 8, 4, 8)
    load_into(target_model, target)
    return Surgery(merged, target_model)


def test_only_the_adapter_is_trained_and_labels_train_nothing():
    data, other = Patients(), Patients()
    other.table = other.table.assign(time_days=other.table["time_days"].to_numpy()[::-1].copy())
    models = [made(), made()]
    before = state_of(models[0])
    for model, patients in zip(models, (data, other), strict=True):
        history = fit(model, patients, patients.ids, Recipe(lr=0.02, epochs=30), NETWORK, 0)
    after = state_of(models[0])
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "adapter.down.weight", "adapter.up.weight"
    }  # fmt: skip
    same = state_of(models[1])
    assert all(torch.equal(after[name], same[name]) for name in after)
    assert history["auxiliary_loss"].iloc[-1] < 0.8 * history["auxiliary_loss"].iloc[0]


def test_the_loss_is_the_distance_from_the_features_of_the_target_without_dropout():
    model, data = made().train(), Patients()
    batch = data.batch(data.ids[:6])
    frozen = model.frozen_features(batch)
    merged, target = (part.network.eval().encode(batch) for part in (model.merged, model.target))
    assert torch.equal(frozen, torch.stack([merged, target], 1))
    expected = (model.adapter(merged) - target).abs().mean()
    assert model.forward_pass(None, frozen).auxiliary_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.forward_pass(batch).auxiliary_loss is None, "the target's own model was not asked"
