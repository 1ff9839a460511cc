"""Memory: what is counted on shapes is what a process then takes; what does not fit is refused before."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.mil import ABMIL, FineTuned
from steph.mil.base import ForwardPass, Model
from steph.training import memory
from steph.training.device import Compute

WIDE = {"dim_in": 256, "dim_emb": 256, "dim_attn": 192}
UPDATE = (256, Compute(), True)
GB = 10**9


class People:
    """A data set of which only bag sizes are known."""

    name, dim = "COHORT", 256

    def __init__(self, sizes):
        self.sizes = np.array(sizes)

    def n_patches(self, patient_ids):
        return self.sizes[list(patient_ids)]


def check(model, sizes, max_patches=None, together=2, trains=True):
    memory.check(model, People(sizes), range(len(sizes)), together, Compute(max_patches=max_patches), trains)


@pytest.fixture
def free(monkeypatch):
    """`free(bytes)`: so much memory is left."""
    return lambda n: monkeypatch.setattr(memory, "available", lambda device: int(n))


TAKEN = """
import sys, torch
from steph.data.bags import RaggedBatch
from steph.mil import ABMIL
from steph.training.device import Compute
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
print(status("VmHWM") - before, needed(model, [n], 256, Compute(), True))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what a process takes")
def test_what_is_needed_is_what_a_process_takes():
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", TAKEN, "20000"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    taken, needed = map(int, done.stdout.split())
    assert 0.8 * taken < needed < 2.2 * taken


def test_what_is_alive_at_one_time_is_counted():
    class Chain(Model):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100, 1))

        def forward_pass(self, bags, frozen=None):
            one = bags.features + 1  # 1 alive
            two = one * 2  # 2
            del one
            three = two[:, :1] + bags.features  # 2, a view costs nothing
            del two
            return ForwardPass(three @ self.weight)  # 1 and a column

    bags = RaggedBatch(torch.zeros(64, 100), (0, 64))
    assert memory.live_bytes(Chain(), bags) == 2 * 64 * 100 * 4
    # On the way back: what the product saves, its result, and gradients of the sum, the product's and the weight.
    assert memory.live_bytes(Chain(), bags, backward=True) == 2 * 64 * 100 * 4


def test_what_fits_by_far_passes_without_counting(free, monkeypatch):
    free(100 * GB)
    monkeypatch.setattr(memory, "needed", lambda *_: pytest.fail("counted"))
    check(ABMIL(**WIDE), [100, 200])


def test_a_bag_larger_than_memory_is_refused_with_what_to_do(free):
    free(0.5 * GB)
    model = ABMIL(**WIDE)
    check(model, [1000] * 8)
    with pytest.raises(Refused) as refused:
        check(model, [1000] * 7 + [900_000])
    for words in ("COHORT: an update by ABMIL takes about", "0.5 GB are free", "901,000 patches", "900,000 of them",
                  "recipe.max_patches", "recipe.bags_per_step", "on cpu"):  # fmt: skip
        assert words in str(refused.value)
    assert not any(p.is_meta for p in model.parameters()), "the model itself is left alone"
    check(model, [1000] * 7 + [900_000], max_patches=2000)
    with pytest.raises(Refused, match="a prediction by ABMIL") as refused:
        check(model, [900_000], together=1, trains=False)
    assert "bags_per_step" not in str(refused.value)


def test_with_little_memory_activations_are_computed_again_and_numbers_stay(free, capsys):
    def gradient(model):
        torch.manual_seed(1)
        model(RaggedBatch(torch.randn(5000, 256), (0, 3000, 5000))).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def same_model():
        torch.manual_seed(0)
        return ABMIL(**WIDE).train()

    model, sizes = same_model(), [30_000] * 4
    saved, again = (memory.needed(model, sizes[:2], *UPDATE, recompute) for recompute in (False, True))
    assert saved > 1.5 * again
    free((saved + again) / 2)
    check(model, sizes)
    assert model.recompute and "computed twice" in capsys.readouterr().err
    assert torch.equal(gradient(model), gradient(same_model()))


def test_workers_share_the_memory(free, monkeypatch):
    undivided = memory.available("cpu")
    monkeypatch.setattr(memory, "processes", 4)
    assert 10**7 < memory.available("cpu") == pytest.approx(undivided / 4, rel=0.1)
    free(0.1 * GB)
    with pytest.raises(Refused, match=r"shared by 4 processes.*fewer --workers"):
        check(ABMIL(**WIDE), [900_000] * 2)


def test_the_largest_update_is_one_that_training_may_meet():
    sizes = np.array([10] * 30 + [1000])
    assert sorted(memory.largest_batch(sizes, 4)) == [10, 10, 10, 1000]
    assert memory.largest_batch(sizes, 1) == [1000] and memory.largest_batch(sizes[:2], 16) == [10, 10]


@pytest.mark.parametrize("declared", [True, False])
def test_a_model_that_shapes_cannot_run_counts_as_its_networks(declared):
    class NeedsNumbers(Model):
        runs_on_shapes = declared

        def __init__(self):
            super().__init__()
            self.network = ABMIL(**WIDE)

        def forward_pass(self, bags, frozen=None):
            logits = self.network(bags)
            return ForwardPass(logits if logits.sum() > 0 else -logits)

    sizes = [4000, 4000]
    plain = memory.needed(ABMIL(**WIDE), sizes, *UPDATE)
    assert memory.needed(NeedsNumbers(), sizes, *UPDATE) == plain
    assert memory.needed(FineTuned(ABMIL(**WIDE), False), sizes, *UPDATE) < plain / 2


@pytest.mark.parametrize(
    ("version", "group", "expected"),
    [(1, "/job", 3 * GB), (2, "/job/step", 3 * GB), (2, "/outside", 7 * GB), (0, "", None)],
)
def test_limits_of_control_groups_count(tmp_path, version, group, expected):
    """A limit of 8 GB on everything, of 4 GB on a job: 3 GB are used there, of which 2 GB are pages of files."""
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}
    limits = {"": 8 * GB, "job": 4 * GB, "job/step": 2 * GB}
    if version:
        membership.write_text(f"0::{group}\n" if version == 2 else f"9:name=systemd:/\n4:memory:{group}\n0::/\n")
        for name, limit in limits.items():
            folder = root / ("memory" if version == 1 else "") / name
            folder.mkdir(parents=True, exist_ok=True)
            limit_name, used, cache = names[version]
            (folder / f"memory.{limit_name}").write_text(f"{limit}\n")
            (folder / f"memory.{used}").write_text(f"{3 * GB if name == 'job' else 1 * GB}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{cache} {2 * GB if name == 'job' else 0}\n")
    if group == "/job/step":
        (root / "job/step/memory.max").write_text("max\n")  # no limit of its own: the job's counts
    groups = memory.control_groups("memory", root, membership)
    left = [n for folder in groups for n in memory.left_by_group(folder)]
    assert min(left, default=None) == expected
