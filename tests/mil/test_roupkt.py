import numpy as np
import pytest
import torch

from steph import Refused
from steph.mil import ABMIL, ROUPKT, convert_released
from steph.mil.roupkt import BALANCE, Z
from steph.mil.state import load_into

EXACT = {"rtol": 1e-10, "atol": 1e-13}


def roupkt_of_release(numbers, top_k):
    """The reference's router, experts and head; its experts' features come from outside, so its models are blank."""
    models = {name: ABMIL(24, 16, 12, 8) for name in numbers["expert_order"].tolist()}
    model = ROUPKT(ABMIL(24, 16, 12, 8, dropout=0.0), models, top_k=top_k)
    released = numbers.state("param_MLP")
    router = {k: v for k, v in released.items() if not k.startswith(("router", "experts", "pred_head"))}
    trained = {f"router.{k}": v for k, v in convert_released(router).items()}
    trained |= {"router.head.weight": released["router.weight"]}
    trained |= {k.replace("pred_head", "head"): v for k, v in released.items() if k.startswith("pred_head")}
    trained |= {k.replace(".0.", "."): v for k, v in released.items() if k.startswith("experts")}
    load_into(model, trained)
    return model


@pytest.mark.parametrize("top_k", [3, 5, 6])
def test_roupkt_is_the_releases(reference, float64, top_k):
    numbers = reference("h_roupkt")
    model = roupkt_of_release(numbers, top_k)
    bag, features = numbers.tensor("X"), numbers.tensor("X_tfl").unsqueeze(0)
    tag = f"MLP_K{top_k}"
    router_logits = model.router([bag])
    torch.testing.assert_close(router_logits[0], numbers.tensor(f"{tag}_router_logits"), **EXACT)
    torch.testing.assert_close(model.router.encode([bag])[0], numbers.tensor(f"{tag}_router_rep"), **EXACT)
    torch.testing.assert_close(model.router.attention(bag), numbers.tensor(f"{tag}_router_attention"), **EXACT)
    mixed = model.mixed(torch.softmax(router_logits, 1), features)[0]
    torch.testing.assert_close(mixed, numbers.tensor(f"{tag}_moe_output"), **EXACT)
    logits, loss, monitored = model.forward_pass([bag], features)
    torch.testing.assert_close(logits[0], numbers.tensor(f"{tag}_logits"), **EXACT)
    balance, z = float(numbers[f"{tag}_balance_loss"]), float(numbers[f"{tag}_router_z_loss"])
    weights = float(numbers["loss_balance_weight"]), float(numbers["loss_router_z_weight"])
    assert weights == (BALANCE, Z)
    assert loss.item() == pytest.approx(weights[0] * balance + weights[1] * z, rel=1e-11)
    assert model.monitored == [f"p_{name}" for name in numbers["expert_order"].tolist()]
    np.testing.assert_allclose(monitored, numbers[f"{tag}_probs"], rtol=1e-11)


def test_one_expert_works_here(reference, float64):
    """The release fails with K = 1 (it squeezes a dimension too many)."""
    numbers = reference("h_roupkt")
    assert "cannot be multiplied" in str(numbers["MLP_K1_released_fails"])
    model = roupkt_of_release(numbers, 1)
    features = numbers.tensor("X_tfl").unsqueeze(0)
    first = int(numbers["MLP_K5_topk_idx"][0])
    value = torch.relu(model.experts[first](features[0, first])) * float(numbers["MLP_K5_probs"][first])
    logits = model.forward_pass([numbers.tensor("X")], features).logits
    torch.testing.assert_close(logits[0], model.head(value), **EXACT)


def small(top_k):
    return ROUPKT(ABMIL(5, 8, 4, 8), {name: ABMIL(5, 8, 4, 8) for name in ("own", "a", "b")}, top_k)


def test_an_expert_that_nobody_chose_gets_no_gradient():
    model = small(1)
    model.mixed(torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.8, 0.2]]), torch.randn(2, 3, 8)).sum().backward()
    assert [expert.weight.grad is not None for expert in model.experts] == [False, True, False]


@pytest.mark.parametrize("top_k", [0, 4])
def test_a_k_that_cannot_be_is_refused(top_k):
    with pytest.raises(Refused, match=f"top_k = {top_k} of 3 experts; choose 1 to 3"):
        small(top_k)
