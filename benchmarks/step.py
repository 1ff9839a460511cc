"""Training steps on 16 bags, each against the plain loop: medians of interleaved repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.plain import PlainSTEPH
from steph.data import RaggedBatch
from steph.data.manifest import Recipe
from steph.hypernetwork import STEPH
from steph.mil import ABMIL
from steph.mil.state import state_of
from steph.survival import nll_loss
from steph.training import Trainer

DIMENSIONS = {"demo": (32, 32, 24, 32), "paper": (1536, 512, 384, 512)}
"""dim_in, dim_emb, dim_attn, dim_hidden."""


def make_steph(dims: tuple[int, int, int, int], sources: int = 12, top_k: int = 5) -> STEPH:
    """A STEPH on models that are small random steps away from a common M_0."""
    dim_in, dim_emb, dim_attn, dim_hidden = dims
    torch.manual_seed(0)
    null = ABMIL(dim_in, dim_emb, dim_attn)
    states = []
    for _ in range(sources + 1):
        states.append({k: v + 0.01 * torch.randn_like(v) for k, v in state_of(null).items()})
    pool = {f"source{i}": state for i, state in enumerate(states[1:])}
    return STEPH(state_of(null), states[0], pool, top_k=top_k, dim_hidden=dim_hidden)


def compare_steps(dims: str, patches: int, repeats: int = 7, bags: int = 16) -> dict[str, float]:
    """Milliseconds of one STEPH training step, ours and plain, and their ratio."""
    steph = make_steph(DIMENSIONS[dims])
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(patches, DIMENSIONS[dims][0], generator=generator) for _ in range(bags)]
    batch, recipe = RaggedBatch.from_bags(made), Recipe()
    bins, event = torch.arange(bags) % 8, torch.arange(bags) % 2 == 0
    trainer, plain = Trainer(steph, recipe, 10**6), PlainSTEPH(steph)
    optimizer = torch.optim.AdamW([p for p in steph.parameters() if p.requires_grad], lr=1e-4)

    def plain_step() -> None:
        optimizer.zero_grad()
        (nll_loss(torch.sigmoid(plain(made)), bins, event) + plain.auxiliary_loss()).backward()
        optimizer.step()

    ours, looped = interleaved([lambda: trainer.step(batch, bins, event), plain_step], repeats)
    return {"ours_ms": ours, "plain_ms": looped, "ratio": looped / ours}


def interleaved(actions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each action; they take turns, so a busy moment hits them alike."""
    seconds: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats + 1):
        for action, taken in zip(actions, seconds, strict=True):
            started = time.perf_counter()
            action()
            if repeat:  # the first is a warm-up
                taken.append(time.perf_counter() - started)
    return [1000 * statistics.median(taken) for taken in seconds]
