"""Trajectories of task vector mixup over the loss landscape (the paper's Fig. 8): where STEPH with one source stands in
the plane M_0 + C_s tau_s + C_t tau_t after each epoch of its training.

As in the paper, a point is made of the means of w and lambda over training patients: C_s = w (1 - lambda), C_t = w
lambda. Two things are to be known when reading it. STEPH gives every patient coefficients of their own, so that no
single point is the trained model. And it trains a prediction head of its own, while the landscape has the target's:
the loss at a point is not STEPH's loss, which is told beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.mixing import dynamics
from steph.analysis.mixing.landscape import chosen_sources, losses, pair
from steph.data.manifest import Study
from steph.methods.registry import method
from steph.study.runs import Run, Workbench, results


def runs(
    study: Study, target: str, sources: Sequence[str], fold: int, seeds: Sequence[int], precision: str = "fp32"
) -> list[Run]:
    """STEPH with each of the sources alone, from each start.

    Raises `Refused` for a data set, source or fold that the study does not have, for none, and for a repeated one.
    """
    for name, given in (("sources", sources), ("seeds", seeds)):
        if not given or len(set(given)) < len(given):
            raise Refused(f"{name} {list(given)}: give at least one, and each once.")
    return [
        replace(pair(study, target, source, fold, precision), seed=seed) for source in sources for seed in seeds
    ]  # fmt: skip


def shown(
    bench: Workbench,
    target: str,
    fold: int,
    seeds: Sequence[int],
    sources: Sequence[str] | None = None,
    precision: str = "fp32",
) -> tuple[list[Run], list[Run]]:
    """The trainings that a chapter on a target shows: with each of a few sources from the first start, and with the
    first source from every start. sources: None takes three of `steph.analysis.mixing.landscape.chosen_sources`, of the
    finished STEPH run with the first of the seeds."""
    if sources is None:
        last = dynamics.at_the_end(
            dynamics.dynamics(bench, dynamics.runs(bench.study, target, fold, seeds[:1], precision))
        )
        sources = list(chosen_sources(last, n=2)["source"])
    walks = runs(bench.study, target, sources, fold, seeds[:1], precision)
    return walks, runs(bench.study, target, sources[:1], fold, seeds, precision)


def chapter_runs(bench: Workbench, dataset: str, fold: int, seeds: Sequence[int], precision: str) -> list[Run]:
    """All trainings of `shown`: what the chapter on a target needs once STEPH's own runs are finished."""
    walks, again = shown(bench, dataset, fold, seeds, precision=precision)
    return list(dict.fromkeys([*walks, *again]))


def trajectories(bench: Workbench, chosen: Iterable[Run], device: str = "cpu") -> pd.DataFrame:
    """The courses of runs (`runs`) in the plane: source, seed, epoch (1, 2, ...), w, lambda, c_s, c_t, and the losses
    of `steph.analysis.mixing.landscape.losses` at that very point, computed there and not read off the grid.

    Raises `Refused` for a run that is not finished, or not of one source.
    """
    parts = []
    for wanted in chosen:
        if method(wanted.method).only is None:
            raise Refused(f"{wanted} has several sources; a trajectory is drawn of one, as in steph@SOURCE.")
        course = dynamics.dynamics(bench, [wanted])
        course["c_s"], course["c_t"] = course["w"] * (1 - course["lambda"]), course["w"] * course["lambda"]
        at = losses(bench, wanted, course[["c_s", "c_t"]].to_numpy(), device)
        parts.append(course.join(at.drop(columns=["c_s", "c_t"])))
    if not parts:
        raise Refused("no runs to follow; name at least one.")
    return pd.concat(parts, ignore_index=True)


def ends(bench: Workbench, chosen: Iterable[Run], device: str = "cpu") -> pd.DataFrame:
    """Where trajectories begin and end, a row per run: source, seed; w, lambda, c_s, c_t after the last epoch;

    - target_loss: test loss of M_t;
    - first_loss, last_loss: of the point after the first and the last epoch, under the target's head, as landscapes;
    - own_head_loss: of the last point under the head that STEPH trained;
    - steph_loss: STEPH's own, each patient under coefficients of their own;
    - steps_in: is the last point's loss less than M_t's, the paper's question;
    - dead: did w become 0 for every training patient, so that the encoder is M_0's and no gradient can change it.
    """
    chosen = list(chosen)
    rows = []
    for wanted in chosen:
        course = trajectories(bench, [wanted], device)
        first, last = course.iloc[0], course.iloc[-1]
        own = losses(bench, wanted, last[["c_s", "c_t"]].to_numpy(float).reshape(1, 2), device, head=wanted)
        target = losses(bench, wanted, np.array([[0.0, 1.0]]), device)["loss_test"].item()
        rows.append(
            {
                **last[["source", "seed", "w", "lambda", "c_s", "c_t"]],
                "target_loss": target,
                "first_loss": first["loss_test"],
                "last_loss": last["loss_test"],
                "own_head_loss": own["loss_test"].item(),
                "steph_loss": bench.finished(wanted).info["metrics"]["loss"],
                "steps_in": bool(last["loss_test"] < target),
                "dead": bool(last["w"] == 0),
            }
        )
    return pd.DataFrame(rows)


def of_finished(bench: Workbench, target: str, fold: int = 0, precision: str = "fp32") -> pd.DataFrame:
    """`ends` of all runs of STEPH with one source on a target that are finished; empty where there are none."""
    found = results(bench)
    if not len(found):
        return pd.DataFrame()
    own = (found["dataset"] == target) & (found["fold"] == fold) & (found["precision"] == precision)
    these = found[own & found["method"].str.startswith("steph@")]
    return ends(bench, [Run(target, row["method"], fold, int(row["seed"]), precision) for _, row in these.iterrows()])


def ends_wide(found: pd.DataFrame) -> pd.DataFrame:
    """Format `ends` for display."""
    names = {
        "w": "w", "lambda": "λ", "target_loss": "M_t", "first_loss": "first epoch", "last_loss": "last epoch",
        "own_head_loss": "last, STEPH's head", "steph_loss": "STEPH itself",
    }  # fmt: skip
    shown = found[["source", "seed", *names]].rename(columns=names)
    shown["below M_t"] = np.where(found["steps_in"], "yes", "no")
    return shown
