import pytest
import torch
from torch.nn import functional as F

from steph import Refused
from steph.data.manifest import Recipe
from steph.merging import Surgery
from steph.merging.surgery import Adapter
from steph.mil import ABMIL
from steph.mil.state import load_into, state_of
from steph.survival import nll_loss
from steph.training.engine import fit, predict
from tests.merging.test_adamerging import adamerging
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


def made(seed=0, **options):
    """A merged model of three cancers, and surgery on it."""
    torch.manual_seed(seed)
    null, target, one, two = (state_of(ABMIL(5, 8, 4, 8)) for _ in range(4))
    merged = adamerging(null, target, {"target": target, "one": one, "two": two}, dropout=0.25)
    own = ABMIL(5, 8, 4, 8)
    load_into(own, target)
    return Surgery(merged, own, **options)


def test_it_starts_as_the_merged_model():
    model, data = made(), Patients()
    expected = predict(model.merged.network, data, data.ids[:5])
    found = predict(model, data, data.ids[:5])
    assert found.equals(expected)


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


def test_the_engine_follows_features_of_networks_without_dropout():
    """What is handed back during training is what the frozen networks say of a bag in evaluation."""
    model, data = made(rank=3), Patients()
    model.train()
    assert not model.merged.network.training and not model.target.network.training
    batch = data.batch(data.ids[:6])
    frozen = model.frozen(batch)
    expected = torch.stack([model.merged.network.eval().encode(batch), model.target.network.eval().encode(batch)], 1)
    assert torch.equal(frozen, expected)
    assert torch.equal(model(None, frozen), model(batch))
    model(None, frozen)
    wanted = (model.adapter(frozen[:, 0]) - frozen[:, 1]).abs().mean()
    assert model.auxiliary_loss().item() == pytest.approx(wanted.item(), rel=1e-6)


def test_which_head_reads_is_an_option():
    data = Patients()
    batch = data.batch(data.ids[:3])
    model, original = made(), made(head="target")
    features = model.merged.encode(batch)
    assert torch.equal(model(batch), model.merged.network.head(features))
    assert torch.equal(original(batch), original.target.network.head(features))
    with pytest.raises(Refused, match="head = 'magic'"):
        made(head="magic")


def test_there_is_no_loss_without_the_targets_features():
    model, data = made(), Patients()
    logits = model(data.batch(data.ids[:2]))
    assert torch.isfinite(nll_loss(torch.sigmoid(logits), torch.tensor([0, 1]), torch.tensor([1, 0])))
    with pytest.raises(Refused, match="`frozen` features"):
        model.auxiliary_loss()
