"""Runs of a study: which there are, what decides each, carrying them out once and only once, and reading them back."""

from steph.study.execute import run, run_all
from steph.study.runs import Run, Workbench, plan, results

__all__ = ["Run", "Workbench", "plan", "results", "run", "run_all"]
