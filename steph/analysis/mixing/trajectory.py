"""Trajectories of task vector mixup over the loss landscape (the paper's Fig. 8): where STEPH with one source stands in
the plane M_0 + C_s tau_s + C_t tau_t after each epoch of its training.

As in the paper, a point is made of the means of w and lambda over training patients: C_s = w (1 - lambda), C_t = w
lambda. Two things are to be known when reading it. STEPH gives every patient coefficients of their own, so that no
single point is the trained model. And it trains a prediction head of its own, while the landscape has the target's:
the loss at a point is not STEPH's loss, which is told beside it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from steph.analysis.mixing import dynamics
from steph.analysis.mixing.landscape import landscape
from steph.analysis.mixing.pairs import check_sources
from steph.study.runs import Run, Workbench, plan


def runs(bench: Workbench, dataset: str, sources: Sequence[str], fold: int, seeds: Sequence[int]) -> list[Run]:
    """STEPH with each of the sources alone, from each start. Raises as `check_sources`."""
    check_sources(bench.study, dataset, sources, fold)
    return plan(bench, [dataset], [f"steph@{source}" for source in sources], [fold], seeds)


def shown(
    bench: Workbench, dataset: str, fold: int, seeds: Sequence[int], sources: Sequence[str] | None = None
) -> list[Run]:
    """The trainings that a chapter on a target shows: with each of a few sources from the first start, then with the
    first source from the other starts. sources: None takes three of `dynamics.chosen_sources`, of the finished STEPH
    run with the first of the seeds."""
    if sources is None:
        course = dynamics.dynamics(bench, dynamics.runs(bench, dataset, fold, seeds[:1]))
        sources = list(dynamics.chosen_sources(course, n=2)["source"])
    from_one_start = runs(bench, dataset, sources, fold, seeds[:1])
    return [*from_one_start, *runs(bench, dataset, sources[:1], fold, seeds)[1:]]


def trajectories(bench: Workbench, runs: Iterable[Run]) -> pd.DataFrame:
    """The courses of runs with one source in the plane: source, seed, epoch (1, 2, ...), w, lambda, c_s, c_t, and the
    losses of `landscape` at that very point, not read off the grid. Raises `Refused` for a run that is not finished."""
    tables = []
    for run in runs:
        course = dynamics.dynamics(bench, [run])
        course["c_s"], course["c_t"] = course["w"] * (1 - course["lambda"]), course["w"] * course["lambda"]
        points = landscape(bench, run, points=course[["c_s", "c_t"]].to_numpy())
        tables.append(course.join(points.drop(columns=["c_s", "c_t"])))
    return pd.concat(tables, ignore_index=True)


def ends(bench: Workbench, runs: Iterable[Run]) -> pd.DataFrame:
    """Where trajectories begin and end, a row per run: source, seed; w, lambda, c_s, c_t after the last epoch;

    - target_loss: test loss of M_t;
    - first_loss, last_loss: of the point after the first and the last epoch, under the target's head, as landscapes;
    - own_head_loss: of the last point under the head that STEPH trained;
    - steph_loss: STEPH's own, each patient under coefficients of their own;
    - steps_in: is the last point's loss less than M_t's, the paper's question;
    - dead: did w become 0 for every training patient, so that the encoder is M_0's and no gradient can change it.

    Empty for no runs.
    """
    rows = []
    for run in runs:
        course = trajectories(bench, [run])
        last, place = course.iloc[-1], course[["c_s", "c_t"]].to_numpy()[-1:]
        of_target = landscape(bench, run, points=np.array([[0.0, 1.0]]))
        losses = {
            "target_loss": of_target["loss_test"].item(),
            "first_loss": course["loss_test"].iloc[0],
            "last_loss": last["loss_test"],
            "own_head_loss": landscape(bench, run, head=run, points=place)["loss_test"].item(),
            "steph_loss": bench.finished(run).info["metrics"]["loss"],
        }
        rows.append({**last[["source", "seed", "w", "lambda", "c_s", "c_t"]], **losses})
    table = pd.DataFrame(rows)
    return table.assign(steps_in=table["last_loss"] < table["target_loss"], dead=table["w"] == 0) if rows else table


def ends_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `ends` for display."""
    names = {
        "source": "source", "seed": "seed", "w": "w", "lambda": "λ", "target_loss": "M_t", "first_loss": "first epoch",
        "last_loss": "last epoch", "own_head_loss": "last, STEPH's head", "steph_loss": "STEPH itself",
    }  # fmt: skip
    below = np.where(table["steps_in"], "yes", "no")
    return table[list(names)].rename(columns=names).assign(**{"below M_t": below})
