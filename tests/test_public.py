"""The names that the project promises to keep, where it promises them."""

import subprocess
import sys
from importlib import import_module

import pytest

from steph import PROJECT

PUBLIC = {
    "steph": ["run", "results", "load_model", "Refused"],
    "steph.survival": ["bin_index", "nll_loss", "risk_score", "concordance_index"],
    "steph.mil": ["ABMIL", "TransMIL", "ILRA", "R2TMIL", "PatchGCN", "NETWORKS", "convert_released", "to_released"],
    "steph.merging": ["task_vector", "apply_task_vector", "ties", "iso_c", "iso_cts", "model_average", "STEPH"],
    "steph.hypernetwork": ["STEPH", "convert_released"],
    "steph.analysis": ["subspace_alignment_ratio"],
    "steph.methods": ["METHODS", "Method", "method"],
    "steph.study": ["Workbench", "plan", "run", "run_all", "results"],
    "steph.deploy": ["load_model"],
    "steph.predict": ["load_model"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there(module):
    """In a process that has imported nothing else, so that no other import hides a missing one or a circle."""
    code = f"from {module} import {', '.join(PUBLIC[module])}"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_means_the_same_wherever_it_is_public():
    for name in ("STEPH", "load_model", "run", "results"):
        assert len({id(getattr(import_module(module), name)) for module in PUBLIC if name in PUBLIC[module]}) == 1


def test_the_command_starts_without_what_its_help_does_not_need():
    lazy = "import sys, steph; assert not [name for name in sys.modules if name.startswith('steph.')]; "
    code = lazy + "import steph.cli; print(sorted({'torch', 'pandas', 'jinja2', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
