import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from steph import Refused
from steph.data import RaggedBatch
from steph.data.manifest import Network, Recipe
from steph.merging.steph import RELEASED_NAMES as STEPH_NAMES
from steph.merging.steph import STEPH
from steph.merging.steph import convert_released as convert_steph
from steph.mil import ABMIL, FineTuned, Model, convert_released
from steph.mil.abmil import RELEASED_NAMES
from steph.mil.state import load_into, state_of
from steph.study.execute import run_all
from steph.study.runs import Run
from steph.survival import concordance_index
from steph.training import engine, memory
from steph.training.device import Compute, single_thread
from steph.training.engine import Trainer, fit, predict, seed_everything
from tests.conftest import assert_states_close
from tests.helpers.made_pool import Pool, adamerging, released_pool
from tests.mil.test_roupkt import small


@pytest.mark.parametrize(
    ("case", "steps", "warmup"), [("S7_warm1", 7, 1), ("S1_warm1", 1, 1), ("S51_warm1", 51, 1), ("S7_warm0", 7, 0)]
)
def test_schedule_is_the_releases(reference, case, steps, warmup):
    numbers = reference("i_lr_groups")
    expected = numbers[f"lr_{case}"]
    recipe = Recipe(epochs=int(numbers["epochs"]), warmup_epochs=warmup)
    found = [engine.learning_rate_factor(update, steps, recipe) for update in range(len(expected) + 1)]
    np.testing.assert_allclose(np.array(found[:-1]) * float(numbers["base_lr"]), expected, rtol=1e-12, atol=1e-20)
    assert found[-1] == pytest.approx(0, abs=1e-15)


def test_steps_per_epoch_drop_the_remainder(reference):
    numbers = reference("i_lr_groups")
    np.testing.assert_array_equal(numbers["n_train"] // Recipe().bags_per_step, numbers["steps_per_epoch"])


def released_names(numbers, which, table):
    layers = {**{theirs: ours for ours, theirs in RELEASED_NAMES.items()}, **table}
    return {
        f"{layers[layer]}.{kind}" if layer else layers[kind]
        for name in numbers[which].tolist()
        for layer, _, kind in [name.rpartition(".")]
    }


def test_weight_decay_groups_are_the_releases(reference):
    numbers = reference("i_lr_groups")
    null = state_of(ABMIL(4, 3, 2, 2))
    pool = {"a": null, "b": null}
    models = {
        "abmil": ABMIL(4, 3, 2, 2),
        "steph_nn": STEPH(null, null, pool, top_k=1, dim_hidden=3),
        "steph_param": STEPH(null, null, pool, top_k=1, dim_hidden=3, mix="parameter"),
        "steph_fix": STEPH(null, null, pool, top_k=1, dim_hidden=3, mix=0.5),
        "adamerging": adamerging(null, null, pool),
        "dynamic_w": adamerging(null, null, pool, weight="hypernetwork", dim_hidden=3),
    }
    merging = {**STEPH_NAMES, "vecmix_layer": "ratio_vector", "merge_weight": "weight_vector"}
    for name, model in models.items():
        table = {} if name == "abmil" else merging
        groups, names = engine.parameter_groups(model, 1e-5), {id(p): n for n, p in model.named_parameters()}
        for group, kind in zip(groups, ("nodecay", "decay"), strict=True):
            expected = released_names(numbers, f"group_{kind}__{name}", table)
            assert {names[id(p)] for p in group["params"]} == expected, (name, kind)
        assert [group["weight_decay"] for group in groups] == numbers[f"group_wd__{name}"].tolist()


@pytest.mark.parametrize("name", ["abmil", "steph", "adamerging"])
def test_five_updates_land_on_the_releases_weights(reference, float64, name):
    numbers = reference("k_train_steps")
    null, target, pool = released_pool(numbers)
    if name == "abmil":
        model, convert = ABMIL(24, 16, 12, 8, dropout=0.0), convert_released
    elif name == "steph":
        weights = {"beta": float(numbers["beta"]), "gamma": float(numbers["gamma"])}
        model = STEPH(null, target, pool, top_k=int(numbers["K"]), dim_hidden=16, dropout=0.0, **weights)
        convert = convert_steph
    else:
        model = adamerging(null, target, {"target": target, **pool})

        def convert(state):
            layers = {k: v for k, v in state.items() if k != "merge_weight"}
            return {"weight_vector": state["merge_weight"], **convert_steph(layers)}

    load_into(model, convert(numbers.state(f"{name}_init")))
    trainer = Trainer(model.train(), Recipe(), int(numbers["steps_per_epoch"]))
    for step in range(5):
        bags = [numbers.tensor(f"bag_{i}") for i in range(4 * step, 4 * step + 4)]
        bins, event = numbers.tensor("labels")[4 * step : 4 * step + 4].T
        used, numbers_of_step = trainer.step(RaggedBatch.from_bags(bags), bins, event)
        nll, _, _, total, rate = numbers[f"{name}_record_nll_merge_mix_total_lr"][step]
        assert numbers_of_step[0].item() == pytest.approx(nll, rel=1e-10)
        assert numbers_of_step[:2].sum().item() == pytest.approx(total, rel=1e-10)
        assert used == pytest.approx(rate, rel=1e-10, abs=1e-20)
        if step + 1 in (1, 2, 5):
            trained = state_of(model, trainable_only=True)
            assert_states_close(trained, convert(numbers.state(f"{name}_after{step + 1}")), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimizer_is_pytorchs_bit_for_bit_and_leaves_alone_what_has_no_gradient(dtype):
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, 77, dtype=dtype).view(7, 11).clone()) for _ in range(3)]
                    + [nn.Parameter(torch.ones(5, dtype=dtype))] for _ in range(2))  # fmt: skip
    groups = [[{"params": p[3:], "weight_decay": 0.0}, {"params": p[:3], "weight_decay": 0.1}] for p in (ours, theirs)]
    optimizer, reference = engine.AdamW(groups[0]), torch.optim.AdamW(groups[1], lr=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    for update in range(6):
        rate = 0.01 * update
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            skipped = i == update % 4
            grad = None if skipped else torch.randn(pair[0].shape, generator=generator, dtype=dtype)
            pair[0].grad = pair[1].grad = grad
        for group in reference.param_groups:
            group["lr"] = rate
        optimizer.step(rate)
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), update
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours) and not torch.equal(ours[0], ours[1])


def test_training_does_not_import_a_compiler():
    """PyTorch's own optimizers do, which takes every process more than a second."""
    code = (
        "import sys, torch; from steph.mil import ABMIL; from steph.training.engine import Trainer; "
        "from steph.data.manifest import Recipe; bags = [torch.ones(3, 5), torch.ones(2, 5)]\n"
        "Trainer(ABMIL(5, 4, 3, 8), Recipe(), 3).step(bags, torch.tensor([1, 2]), torch.tensor([True, False]))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Patients:
    """A data set in memory: what the engine asks of `Dataset`, and how often each patient's patches were asked for."""

    name, dim = "made", 5

    def __init__(self, n=40, events=True):
        generator = torch.Generator().manual_seed(0)
        self.risk = torch.randn(n, generator=generator)
        self.bags = [torch.randn(3 + i % 4, 5, generator=generator) + r for i, r in enumerate(self.risk)]
        self.ids, self.asked = [f"P{i:02}" for i in range(n)], Counter()
        days = 800 * torch.exp(-self.risk) + 1
        self.table = pd.DataFrame({"patient_id": self.ids, "time_days": days.numpy(), "event": events})

    def labels(self, patients):
        return self.table.set_index("patient_id", drop=False).loc[list(patients)].reset_index(drop=True)

    def n_patches(self, patients):
        return np.array([len(self.bags[self.ids.index(p)]) for p in patients])

    def prefetch(self, patients):
        pass

    def batch(self, patients, device="cpu", dtype=torch.float32, coords=False, max_patches=None):
        self.asked.update(patients)
        return RaggedBatch.from_bags([self.bags[self.ids.index(p)] for p in patients]).to(device, dtype)


NETWORK = Network(dim_emb=8, dim_attn=4, n_bins=8)


def trained(data, seed=0, **recipe):
    seed_everything(1)
    model = ABMIL(5, 8, 4, 8)
    history = fit(model, data, data.ids, Recipe(**{"lr": 0.02, "epochs": 8, **recipe}), NETWORK, seed)
    return model, history


def test_training_learns_what_is_there():
    data = Patients()
    model, history = trained(data, epochs=60)
    assert history["loss"].iloc[-1] < 0.7 * history["loss"].iloc[0]
    assert history["epoch"].tolist() == list(range(1, 61)) and not model.training
    found = predict(model, data, data.ids)
    assert concordance_index(found["time_days"], found["event"], found["risk"]) > 0.8


def test_same_seed_same_bits_and_another_seed_others():
    data = Patients()
    one, other, different = (state_of(trained(data, seed=seed)[0]) for seed in (0, 0, 1))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert not all(torch.equal(one[k], different[k]) for k in one)


def test_predictions_are_aligned_by_patient_whatever_the_order_and_who_is_predicted_together():
    data = Patients()
    model, _ = trained(data, epochs=1)
    straight = predict(model, data, data.ids).set_index("patient_id")
    turned = predict(model, data, data.ids[::-1]).set_index("patient_id")
    pd.testing.assert_frame_equal(turned.loc[data.ids], straight)
    for together in (4, len(data.ids) + 1):
        found = predict(model, data, data.ids, together=together).set_index("patient_id")
        pd.testing.assert_frame_equal(found, straight, rtol=1e-5)
    curves = straight.filter(like="survival_").to_numpy()
    assert curves.shape == (40, 8) and (np.diff(curves) <= 0).all() and (curves <= 1).all()
    np.testing.assert_allclose(straight["risk"], -curves.sum(1), rtol=1e-12)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(Refused, match="15 training patients and an update takes 16"):
        trained(Patients(15))
    with pytest.raises(Refused, match="no event among 40 training patients"):
        trained(Patients(events=False))
    with pytest.raises(Refused, match=r"training loss is nan .* lower recipe\.lr"):
        data = Patients()
        data.bags[3][0] = torch.nan
        trained(data, epochs=1, bags_per_step=40)


def test_single_thread_gives_the_threads_back():
    torch.set_num_threads(2)
    with single_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["vanilla", "steph", "patch_gcn", "surgery_am"])
def test_training_in_half_precision_is_a_run_of_its_own(tiny, name):
    table = run_all(tiny, [Run("SARC", name, 0, tiny.study.seed, p) for p in ("fp32", "bf16")], workers=1)
    assert table["key"].nunique() == 2
    assert table["loss"].astype(float).diff().abs().iloc[1] < 0.1 * float(table["loss"].iloc[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_prefetched_comes_in_order(device):
    assert list(engine.prefetched(lambda x: 2 * x, range(5), Compute(device))) == [0, 2, 4, 6, 8]


def test_a_step_without_memory_is_repeated_without_the_held_features(monkeypatch):
    calls, targets = [], ("bins", "event")

    def step(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("full")
        return "done"

    monkeypatch.setattr(engine, "release", lambda device, refuse: True)
    assert engine._with_memory(step, "batch", targets, "cuda", "SARC") == "done"
    assert calls == [("batch", *targets)] * 2
    calls.clear()
    monkeypatch.setattr(engine, "release", lambda device, refuse: False)
    batch = RaggedBatch.from_bags([torch.ones(7, 2), torch.ones(3, 2)])
    with pytest.raises(Refused, match="cuda has too little memory for a step with a bag of 7 patches"):
        engine._with_memory(step, batch, targets, "cuda", "SARC")


def test_what_does_not_fit_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10)
    data = Patients()
    with pytest.raises(Refused, match=r"an update by ABMIL takes about .* recipe.max_patches"):
        fit(ABMIL(5, 8, 4, 8), data, data.ids, Recipe(epochs=1), NETWORK, 0)
    with pytest.raises(Refused, match="a prediction by ABMIL takes"):
        predict(ABMIL(5, 8, 4, 8), data, data.ids)


def stepped(make, batch, part, monkeypatch):
    """The numbers of an update and the gradients of it, where at most so many patches go through together."""
    monkeypatch.setitem(engine.PART, "cpu", part)
    torch.manual_seed(0)
    model = make().double().train()
    trainer = Trainer(model, Recipe(lr=0.1, warmup_epochs=0), 10)
    numbers = trainer.step(batch, torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 0, 1, 0, 1]).bool())[1]
    return numbers, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def small_abmil():
    return ABMIL(6, 5, 4, 8, dropout=0.0)


def small_steph():
    pool = Pool(small_abmil)
    return STEPH(pool.null, pool.target, pool.sources, top_k=2, dim_hidden=7, dropout=0.0)


@pytest.mark.parametrize("make", [small_abmil, small_steph])
@pytest.mark.parametrize("part", [1, 40])
def test_an_update_in_parts_has_the_gradient_of_the_whole(make, part, monkeypatch):
    batch = RaggedBatch.from_bags([torch.randn(n, 6, dtype=torch.float64) for n in (4, 60, 5, 1, 30)])
    numbers, gradients = stepped(make, batch, 10**6, monkeypatch)
    in_parts, others = stepped(make, batch, part, monkeypatch)
    torch.testing.assert_close(in_parts, numbers, rtol=1e-12, atol=1e-14)
    assert sum(g.abs().sum() for g in gradients.values()) > 0
    assert_states_close(others, gradients, rtol=1e-9)


def test_only_a_part_of_an_update_is_in_memory(monkeypatch):
    """Bags of 40 patches, two at a time: no layer ever sees more."""
    batch = RaggedBatch.from_bags([torch.randn(40, 6, dtype=torch.float64) for _ in range(5)])
    seen, encode = [], ABMIL.encode
    monkeypatch.setattr(ABMIL, "encode", lambda self, bags: seen.append(len(bags.features)) or encode(self, bags))
    stepped(small_abmil, batch, 80, monkeypatch)
    assert seen == [80, 80, 40]


def test_the_next_batch_is_announced_while_one_is_worked_on(monkeypatch):
    data, calls = Patients(40), []
    batch = data.batch
    monkeypatch.setattr(data, "prefetch", lambda patients: calls.append(("prefetch", patients)))
    monkeypatch.setattr(data, "batch", lambda patients, *a: calls.append(("batch", patients)) or batch(patients, *a))
    fit(ABMIL(5, 8, 4, 8), data, data.ids, Recipe(epochs=1), NETWORK, 0)
    first, second = (patients for what, patients in calls if what == "batch")
    assert calls == [("prefetch", second), ("batch", first), ("batch", second)]


class Recomputing(Model):
    """The same model without frozen features: everything is computed in every epoch."""

    def __init__(self, model):
        super().__init__()
        self.model, self.monitored = model, model.monitored

    def forward_pass(self, bags, frozen=None):
        return self.model.forward_pass(bags)


@pytest.mark.parametrize("make", [lambda: small(2), lambda: FineTuned(ABMIL(5, 8, 4, 8), fresh_head=False)])
def test_frozen_features_are_computed_once_and_give_the_same_training(make):
    states, histories = [], []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model, data = make(), Patients(32)
        fitted = Recomputing(model) if wrapped else model
        histories.append(fit(fitted, data, data.ids, Recipe(lr=0.01, epochs=3), NETWORK, 0).drop(columns="seconds"))
        states.append(state_of(model, trainable_only=True))
        assert set(data.asked.values()) == {3 if wrapped else 1 + 3 * model.reads_patches}
    pd.testing.assert_frame_equal(*histories, rtol=1e-4)
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-5)
