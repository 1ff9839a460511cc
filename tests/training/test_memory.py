"""steph.training.memory: what is predicted on shapes is what a process then takes; what does not fit is refused before."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.mil import ABMIL, FineTuned, gated_attention
from steph.training import memory

WIDE = {"dim_in": 256, "dim_emb": 256, "dim_attn": 192}


class People:
    """A data set of which only bag sizes are known."""

    name, dim = "COHORT", 256

    def __init__(self, sizes):
        self.sizes = np.array(sizes)

    def n_patches(self, patient_ids):
        return self.sizes[list(patient_ids)]


def ask(model, sizes, max_patches=None, together=2, trains=True, dtype=torch.float32):
    memory.check(model, People(sizes), range(len(sizes)), max_patches, together, "cpu", dtype, trains)


@pytest.fixture
def little(monkeypatch):
    """`little(gigabytes)`: so much memory is left."""
    monkeypatch.setattr(gated_attention, "KEPT", dict(gated_attention.KEPT))  # put back afterwards
    monkeypatch.setattr(memory, "_lines_of", {})
    return lambda gigabytes: monkeypatch.setattr(memory, "available", lambda device: int(gigabytes * 1e9))


TAKEN = """
import sys, torch
from steph.data.bags import RaggedBatch
from steph.mil import ABMIL
from steph.training.memory import needed
torch.set_num_threads(1)
model, n = ABMIL(256, 256, 192).train(), int(sys.argv[1])
def step(n):
    model(RaggedBatch(torch.randn(n, 256), (0, n))).sum().backward()
def status(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
step(2100)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(n)
print(status("VmHWM") - before, needed(model, [n], 256, torch.float32, "cpu", True))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what a process takes")
def test_what_is_needed_is_what_a_process_takes():
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", TAKEN, "20000"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    taken, needed = map(int, done.stdout.split())
    assert 0.8 * taken < needed < 2.2 * taken


def test_what_is_alive_at_one_time_is_counted():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100, 1))

        def forward(self, patches: RaggedBatch) -> torch.Tensor:
            one = patches.features + 1  # 1 alive
            two = one * 2  # 2
            del one
            three = two[:, :1] + patches.features  # 2, a view costs nothing
            del two
            return three @ self.weight  # 1 and a column

    bags = RaggedBatch(torch.zeros(64, 100), (0, 64))
    assert memory.live_bytes(Chain(), bags) == 2 * 64 * 100 * 4
    # On the way back: what the product keeps, its result, and gradients of the sum, the product's and the weight.
    assert memory.live_bytes(Chain(), bags, backward=True) == 2 * 64 * 100 * 4


def test_a_copy_on_shapes_holds_no_number_and_leaves_the_model_alone():
    model = ABMIL(**WIDE)
    model.seen = torch.ones(3, requires_grad=True) * 2  # what a forward pass leaves cannot be copied as it is
    copy = memory.on_shapes(model)
    assert all(p.is_meta and p.requires_grad for p in copy.parameters()) and copy.seen.is_meta
    assert not any(p.is_meta for p in model.parameters()) and isinstance(copy.embed.weight, nn.Parameter)


def test_what_fits_passes_without_counting(little, monkeypatch):
    little(100)
    monkeypatch.setattr(memory, "_counted", lambda *_, **__: pytest.fail("counted"))
    ask(ABMIL(**WIDE), [100, 200])


def test_a_bag_larger_than_memory_is_refused_with_what_to_do(little):
    little(0.5)
    ask(ABMIL(**WIDE), [1000] * 8)
    with pytest.raises(Refused) as refused:
        ask(ABMIL(**WIDE), [1000] * 7 + [900_000])
    for words in ("COHORT: an update by ABMIL takes about", "0.5 GB are free", "901,000 patches", "900,000 of them",
                  "recipe.max_patches", "recipe.bags_per_step", "on cpu"):  # fmt: skip
        assert words in str(refused.value)
    ask(ABMIL(**WIDE), [1000] * 7 + [900_000], max_patches=2000)
    with pytest.raises(Refused, match="a prediction by ABMIL") as refused:
        ask(ABMIL(**WIDE), [900_000], together=1, trains=False)
    assert "bags_per_step" not in str(refused.value)


def test_with_little_memory_activations_are_computed_again_and_numbers_stay(little, capsys):
    def gradient():
        torch.manual_seed(1)
        model = ABMIL(**WIDE).train()
        bags = RaggedBatch(torch.randn(5000, 256), (0, 3000, 5000))
        model(bags).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    sizes = [30_000] * 4
    how = (sizes[:2], 256, torch.float32, "cpu", True)
    kept, again = (memory.needed(ABMIL(**WIDE), *how, n) for n in (memory.ALL, memory.NOTHING))
    assert kept > 1.5 * again
    before = gradient()
    little((kept + again) / 2e9)
    ask(ABMIL(**WIDE), sizes)
    assert gated_attention.KEPT["cpu"] == (0, 0) and "computed twice" in capsys.readouterr().err
    assert torch.equal(gradient(), before)


def test_workers_share_the_memory(monkeypatch):
    alone = memory.available("cpu")
    monkeypatch.setattr(memory, "processes", 4)
    assert memory.available("cpu") == pytest.approx(alone / 4, rel=0.1)
    monkeypatch.setattr(memory, "available", lambda device: 10**8)
    with pytest.raises(Refused, match=r"shared by 4 processes.*fewer --workers"):
        ask(ABMIL(**WIDE), [900_000] * 2)


def test_the_heaviest_update_is_one_that_training_may_meet():
    sizes = np.array([10] * 30 + [1000])
    assert sorted(memory.heaviest(sizes, 4)) == [10, 10, 10, 1000]
    assert memory.heaviest(sizes, 1) == [1000] and memory.heaviest(sizes[:2], 16) == [10, 10]


def test_models_that_shapes_cannot_run_are_counted_by_their_networks():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = ABMIL(**WIDE)

        def forward(self, bags):
            found = self.network(bags)
            return found if found.sum() > 0 else -found  # asks for a number

    sizes = [4000, 4000]
    plain = memory.needed(ABMIL(**WIDE), sizes, 256, torch.float32, "cpu", True)
    assert memory.needed(Asks(), sizes, 256, torch.float32, "cpu", True) == plain
    assert memory.needed(FineTuned(ABMIL(**WIDE), False), sizes, 256, torch.float32, "cpu", True) < plain / 2
    numberless = nn.Bilinear(3, 3, 3)  # takes no bags: nothing but features can be foreseen
    learnt = 2 * 4 * sum(p.numel() for p in numberless.parameters())
    assert memory.needed(numberless, sizes, 256, torch.float32, "cpu", True) == 8000 * 256 * 4 + learnt


def test_a_quick_bound_is_a_bound():
    model, sizes = ABMIL(**WIDE), [500, 3000, 9000, 70_000]
    args = (256, torch.float32, "cpu", True)
    assert memory.at_most(model, sizes, *args) >= memory.needed(model, sizes, *args)


GB = 10**9


@pytest.mark.parametrize(
    ("version", "place", "expected"),
    [(1, "/job", 3 * GB), (2, "/job/step", 3 * GB), (2, "/outside", 7 * GB), (0, "", None)],
)
def test_limits_of_control_groups_count(tmp_path, version, place, expected):
    """A limit of 8 GB on everything, of 4 GB on a job: 3 GB are used there, of which 2 GB are pages of files."""
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}
    limits = {"": 8 * GB, "job": 4 * GB, "job/step": 2 * GB}
    if version:
        own.write_text(f"0::{place}\n" if version == 2 else f"9:name=systemd:/\n4:memory:{place}\n0::/\n")
        for group, limit in limits.items():
            folder = root / ("memory" if version == 1 else "") / group
            folder.mkdir(parents=True, exist_ok=True)
            limit_name, used, cache = names[version]
            (folder / f"memory.{limit_name}").write_text(f"{limit}\n")
            (folder / f"memory.{used}").write_text(f"{3 * GB if group == 'job' else 1 * GB}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{cache} {2 * GB if group == 'job' else 0}\n")
    if place == "/job/step":
        (root / "job/step/memory.max").write_text("max\n")  # no limit of its own: the job's counts
    found = list(memory._group_room(root, own))
    assert (min(found) if found else None) == expected


def test_this_machine_says_what_it_has():
    assert memory.available("cpu") > 10**7
