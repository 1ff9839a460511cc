import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from steph import Refused
from steph.data import RaggedBatch
from steph.data.manifest import Network, Recipe
from steph.methods.transfer import NEAREST, best_source, nearest_source, transfer_performance
from steph.mil import ABMIL, NETWORKS, ROUPKT, FineTuned, convert_released
from steph.mil.state import load_into, state_of
from steph.survival import concordance_index
from steph.training.engine import fit, predict
from tests.training.test_engine import NETWORK, Patients

EXACT = {"rtol": 1e-10, "atol": 1e-13}


def roupkt_of_release(numbers, kind, top_k, dropout=0.0):
    """The reference's router, experts and head; its experts' features come from outside, so its models are blank."""
    n = int(numbers["n_experts"])
    models = {name: ABMIL(24, 16, 12, 8) for name in numbers["expert_order"].tolist()}
    model = ROUPKT(ABMIL(24, 16, 12, 8, dropout), models, top_k=top_k, expert=kind.lower())
    given = numbers.state(f"param_{kind}")
    router = {k: v for k, v in given.items() if not k.startswith(("router", "experts", "pred_head"))}
    trained = {f"router.{k}": v for k, v in convert_released(router).items()}
    trained |= {"router.head.weight": given["router.weight"]}
    trained |= {k.replace("pred_head", "head"): v for k, v in given.items() if k.startswith("pred_head")}
    if kind == "MLP":
        trained |= {f"experts.{i}.{p}": given[f"experts.{i}.0.{p}"] for i in range(n) for p in ("weight", "bias")}
    load_into(model, trained)
    return model


@pytest.mark.parametrize("top_k", [3, 5, 6])
@pytest.mark.parametrize("kind", ["MLP", "Identity"])
def test_roupkt_is_the_releases(reference, float64, kind, top_k):
    numbers = reference("h_roupkt")
    model = roupkt_of_release(numbers, kind, top_k)
    bag, features = numbers.tensor("X"), numbers.tensor("X_tfl").unsqueeze(0)
    tag = f"{kind}_K{top_k}"
    router_logits = model.router([bag])
    torch.testing.assert_close(router_logits[0], numbers.tensor(f"{tag}_router_logits"), **EXACT)
    torch.testing.assert_close(model.router.encode([bag])[0], numbers.tensor(f"{tag}_router_rep"), **EXACT)
    torch.testing.assert_close(model.attention(bag), numbers.tensor(f"{tag}_router_attention"), **EXACT)
    mixed = model.mixed(router_logits, features)[0]
    torch.testing.assert_close(mixed, numbers.tensor(f"{tag}_moe_output"), **EXACT)
    torch.testing.assert_close(model([bag], features)[0], numbers.tensor(f"{tag}_logits"), **EXACT)
    balance, z = float(numbers[f"{tag}_balance_loss"]), float(numbers[f"{tag}_router_z_loss"])
    weights = float(numbers["loss_balance_weight"]), float(numbers["loss_router_z_weight"])
    assert weights == (model.balance, model.z)
    assert model.auxiliary_loss().item() == pytest.approx(weights[0] * balance + weights[1] * z, rel=1e-11)
    shares = dict(zip(model.monitored, model.monitor().tolist(), strict=True))
    seen = [shares[f"p_{name}"] for name in numbers["expert_order"].tolist()]
    np.testing.assert_allclose(seen, numbers[f"{tag}_probs"], rtol=1e-11)


def test_one_expert_works_here(reference, float64):
    """The release fails with K = 1 (it squeezes a dimension too many)."""
    numbers = reference("h_roupkt")
    assert "cannot be multiplied" in str(numbers["MLP_K1_released_fails"])
    model = roupkt_of_release(numbers, "MLP", 1)
    features = numbers.tensor("X_tfl").unsqueeze(0)
    first = int(numbers["MLP_K5_topk_idx"][0])
    value = torch.relu(model.experts[first](features[0, first])) * float(numbers["MLP_K5_probs"][first])
    torch.testing.assert_close(model([numbers.tensor("X")], features)[0], model.head(value), **EXACT)


def test_learnable_parameters_at_the_papers_size():
    network = Network()
    with torch.device("meta"):
        models = {str(i): NETWORKS["abmil"](1536, network) for i in range(13)}
        model = ROUPKT(NETWORKS["abmil"](1536, network), models)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_618_913


def finished(seed, dim=5):
    torch.manual_seed(seed)
    return ABMIL(dim, 8, 4, 8)


def roupkt(**options):
    models = {name: finished(i) for i, name in enumerate(["own", "a", "b"])}
    return ROUPKT(finished(9), models, **{"top_k": 2, **options})


def test_a_batch_is_its_bags_and_known_features_change_nothing():
    model, data = roupkt().eval(), Patients()
    batch = data.batch(data.ids[:7])
    whole = model(batch)
    alone = torch.cat([model(data.batch([p])) for p in data.ids[:7]])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-6)
    assert torch.equal(model(batch, model.frozen(batch)), whole)


def test_an_expert_that_nobody_chose_gets_no_gradient():
    model = roupkt(top_k=1)
    features = torch.randn(2, 3, 8)
    model.head(model.mixed(torch.tensor([[0.0, 9.0, 1.0], [0.0, 8.0, 1.0]]), features)).sum().backward()
    assert [expert.weight.grad is not None for expert in model.experts] == [False, True, False]


@pytest.mark.parametrize("top_k", [0, 4])
def test_more_experts_than_there_are_is_refused(top_k):
    with pytest.raises(Refused, match=f"top_k = {top_k} of 3 experts; choose 1 to 3"):
        roupkt(top_k=top_k)
    with pytest.raises(Refused, match="expert = 'magic'"):
        roupkt(expert="magic")


class Counting(Patients):
    """Counts how often each patient's patches are asked for."""

    def __init__(self, n=40):
        super().__init__(n)
        self.asked = dict.fromkeys(self.ids, 0)

    def batch(self, patients, *args, **kwargs):
        for patient in patients:
            self.asked[patient] += 1
        return super().batch(patients, *args, **kwargs)


class Recomputing(nn.Module):
    """The same model without `frozen`: everything is computed in every epoch."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        if hasattr(model, "auxiliary_loss"):
            self.auxiliary_loss = model.auxiliary_loss

    def forward(self, bags):
        return self.model(bags)


@pytest.mark.parametrize("make", [roupkt, lambda: FineTuned(finished(3), fresh_head=False)])
def test_frozen_features_are_computed_once_and_give_the_same_training(make):
    models, histories = [], []
    for wrap in (lambda model: model, Recomputing):
        model, data = make(), Counting(32)
        encoded = []
        watched = model.models[0] if isinstance(model, ROUPKT) else model.encoder
        watched.network.embed.register_forward_hook(lambda _, inputs, __, seen=encoded: seen.append(len(inputs[0])))
        torch.manual_seed(0)
        histories.append(fit(wrap(model), data, data.ids, Recipe(lr=0.01, epochs=3), NETWORK, 0))
        models.append((model, data, encoded))
    (model, data, encoded), (slow, _, again) = models
    assert sum(encoded) * 3 == sum(again), "each patient once, not once an epoch"
    assert set(data.asked.values()) == ({1 + 3} if isinstance(model, ROUPKT) else {1})
    pd.testing.assert_frame_equal(
        histories[0].drop(columns="seconds")[["epoch", "loss", "auxiliary_loss"]],
        histories[1].drop(columns="seconds")[["epoch", "loss", "auxiliary_loss"]],
        rtol=1e-4,
    )
    before, after = state_of(slow), state_of(model)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-5)


def test_fine_tuning_trains_a_head_and_nothing_else():
    data, network = Patients(), finished(3)
    own = state_of(network)
    model = FineTuned(network, fresh_head=False)
    assert predict(model, data, data.ids[:4]).equals(predict(network, data, data.ids[:4])), "it goes on from the head"
    fit(model, data, data.ids, Recipe(lr=0.01, epochs=2), NETWORK, 0)
    assert list(state_of(model, trainable_only=True)) == ["head.weight", "head.bias"]
    assert not torch.equal(model.head.weight, own["head.weight"])
    assert all(torch.equal(value, own[name]) for name, value in state_of(model.encoder.network).items())
    assert model.attention(data.bags[0]).sum().item() == pytest.approx(1)
    fresh = FineTuned(finished(3), fresh_head=True)
    assert not torch.equal(fresh.head.weight, own["head.weight"]) and fresh.head.weight.shape == (8, 8)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_fine_tuning_goes_over_any_network(name):
    torch.manual_seed(0)
    network = NETWORKS[name](5, Network(dim_emb=16, dim_attn=8, n_bins=8))
    coords = [torch.randint(0, 9, (12, 2), dtype=torch.int32) * 256 for _ in range(2)]
    batch = RaggedBatch.from_bags([torch.randn(12, 5), torch.randn(12, 5)], coords)
    expected = network.eval()(batch)
    model = FineTuned(network, fresh_head=False).train()
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(None, model.frozen(batch)), expected, rtol=1e-5, atol=1e-6)


class Knowing(nn.Module):
    """Hazards that follow a share of the truth: the patches' mean is the patient's log-risk."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, bags):
        mean = bags.mean(bags.features.mean(1, keepdim=True))
        return self.share * mean.expand(-1, 8) - 2


def test_the_best_source_is_found_on_the_patients_given():
    data = Patients()
    pool = {"a": Knowing(-1.0), "b": Knowing(1.0), "c": Knowing(0.0), "d": Knowing(1.0)}
    found = transfer_performance(pool, data, data.ids[:20])
    assert list(found.index) == list("abcd") and found["c"] == 0.5 and found["b"] > 0.9
    assert found["a"] == pytest.approx(1 - found["b"])
    assert best_source(found) == "b", "the first of equals"
    table = predict(pool["b"], data, data.ids[:20])
    assert found["b"] == concordance_index(table["time_days"], table["event"], table["risk"])
    with pytest.raises(Refused, match="pool is empty"):
        best_source(pd.Series(dtype=float))


def test_other_patients_labels_do_not_choose_the_source():
    """Test patients' labels turned upside down: the choice on training patients stays."""
    data, pool = Patients(), {"a": Knowing(-1.0), "b": Knowing(1.0)}
    train = data.ids[:20]
    first = transfer_performance(pool, data, train)
    days = data.table["time_days"].to_numpy().copy()
    days[20:] = days[20:][np.argsort(np.argsort(-days[20:]))]
    data.table["time_days"] = days
    pd.testing.assert_series_equal(transfer_performance(pool, data, train), first)


def test_nearest_sources_are_the_releases():
    everyone = sorted(NEAREST)
    assert len(everyone) == 13 and all(name != source and source in NEAREST for name, source in NEAREST.items())
    assert nearest_source("BRCA", everyone) == "GBMLGG"
    with pytest.raises(Refused, match="no LAML"):
        nearest_source("LAML", everyone)
    with pytest.raises(Refused, match=r"names GBMLGG .* the pool lacks it: CESC, LIHC"):
        nearest_source("BRCA", ["CESC", "LIHC"])
