"""What CONTRIBUTING.md promises to whoever adds something: a network, a method, a data set, a chapter.

Each is added to a copy of the project as told there; results, plan, export, prediction, scorecard and book take it
without a further edit.
"""

import json
import shutil
import subprocess

import nbformat
import pytest
import yaml

from steph import PROJECT
from tests.conftest import in_copy

NETWORK = '''"""Max pooling over embedded patches."""

import torch
from torch import nn

from steph.mil.base import MIL, one_bag, takes_half


class MaxMIL(MIL):
    pools_by_attention = False

    def __init__(self, dim_in, dim_emb, n_bins):
        super().__init__()
        self.embed = nn.Linear(dim_in, dim_emb)
        self.head = nn.Linear(dim_emb, n_bins)

    @takes_half
    def encode(self, batch):
        return torch.stack([bag.amax(0) for bag in self.embed(batch.features).relu().split(batch.sizes)])

    def attention(self, bag):
        n = one_bag(bag).sizes[0]
        return torch.full((n,), 1 / n)
'''

METHODS = '''"""Methods of our own: a network that has a name, and a model of a class of its own."""

import torch
from torch import nn

from steph.methods.base import Method
from steph.methods.cancer_specific import vanilla
from steph.mil import ForwardPass, Frozen, Model


class Scaled(Model):
    """The target's own model, its logits scaled by one trained number."""

    def __init__(self, network):
        super().__init__()
        self.whole = Frozen(network)
        self.scale = nn.Parameter(torch.ones(()))

    def forward_pass(self, bags, frozen=None):
        return ForwardPass(self.scale * self.whole.head(self.whole.encode(bags)))

    def pooling_network(self, batch):
        return self.whole.network.pooling_network(batch)

    def architecture(self):
        return {"kind": self.kind, "network": self.whole.network.architecture()}

    @classmethod
    def rebuild(cls, architecture, part):
        return cls(part(architecture["network"]))


def scaled(x):
    return Scaled(x.network(x.own_state))


METHODS = {
    "max_mil": Method("MaxMIL", "own", vanilla, "max pooling in place of ABMIL's", network="max_mil"),
    "scaled": Method("Scaled", "own", scaled, "the own model, its logits scaled", needs_target=True),
}
'''

DATA_SET = """
extends: tiny
name: more
title: "Tiny, with one made-up cancer more"
datasets:
  LIHC: { projects: [DEMO-LIHC], patients: 355, slides: 362, survival_rate_pct: 77.5, mean_patches: 8875 }
  SARC: { projects: [DEMO-SARC], patients: 248, slides: 591, survival_rate_pct: 68.5, mean_patches: 27346 }
  SKCM: { projects: [DEMO-SKCM], patients: 300, slides: 310, survival_rate_pct: 70.0, mean_patches: 9000 }
"""

CHAPTER = [
    nbformat.v4.new_markdown_cell("# A new chapter\n\n**Is it in the book?**"),
    nbformat.v4.new_code_cell(
        '# Parameters\nstudy = "demo"\ndataset = "SKCM"\nfolds = [0]\nseed = 7', metadata={"tags": ["parameters"]}
    ),
    nbformat.v4.new_code_cell("from steph.book.notebooks import start\np = start(globals())"),
]

USED = """
import json
import h5py
import pandas as pd
from steph.analysis.cost import operations, planning
from steph.book import build, pages
from steph.deploy.export import export
from steph.scorecard import Evidence, scorecard
from steph.study import Run, Workbench, plan, results, run_all, tables

bench, new = Workbench("more"), ["max_mil", "scaled"]
everything = plan(bench)
runs = plan(bench, ["SKCM"], ["vanilla", *new], [0])
work = planning.work(bench, runs)
run_all(bench, runs, workers=1)
table = results(bench)
shown = tables.c_index_table(table, ["vanilla", *new])
counted = operations.counted(bench)
scorecard(Evidence(bench.study, table))
for name in new:
    export(bench, Run("SKCM", name, 0, bench.study.seed), bench.study.build / name)
data = bench.dataset("SKCM")
(slide,) = data.slides(data.splits.test(0)[0])
with h5py.File(bench.study.build / "slide.h5", "w") as file:
    file["features"] = data.store.bag([slide])
chapters = build.chapters(bench.study)
print(json.dumps({
    "plan": sorted({run.method for run in everything}),
    "work": sorted(work["method"].unique()),
    "table": [str(column) for column in shown.columns] + [str(row) for row in shown.index],
    "operations": sorted(counted["method"]),
    "registry": pages.methods_page(),
    "chapters": [chapter.name for chapter in chapters],
    "needed": [str(run) for run in build.needed_runs(bench) if run.seed == 7],
    "contents": pages.contents({}, []),
}))
"""


def add_line(path, before, line):
    """Add one line to a file, before the first line that begins so."""
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, text in enumerate(lines) if text.lstrip().startswith(before))
    path.write_text("".join([*lines[:at], line + "\n", *lines[at:]]))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with one addition of each kind."""
    copy = tmp_path_factory.mktemp("extended") / "project"
    skip = shutil.ignore_patterns("build", ".*", "__pycache__", "*.egg-info", "tests")
    shutil.copytree(PROJECT, copy, ignore=skip)
    (copy / "steph" / "mil" / "max_mil.py").write_text(NETWORK)
    networks = copy / "steph" / "mil" / "__init__.py"
    add_line(networks, "from steph.mil.mean_mil", "from steph.mil.max_mil import MaxMIL")
    add_line(networks, '"mean_mil": lambda', '    "max_mil": lambda dim_in, n: MaxMIL(dim_in, n.dim_emb, n.n_bins),')
    (copy / "steph" / "methods" / "ours.py").write_text(METHODS)
    (copy / "data_manifest" / "more.yaml").write_text(DATA_SET)
    runs = {"steph": {"runs": "steph.analysis.mixing.dynamics:runs"}}
    nbformat.write(nbformat.v4.new_notebook(cells=CHAPTER, metadata=runs), copy / "notebooks" / "12_new.ipynb")
    add_line(
        copy / "_toc.yml", "- file: build/book/notebooks/10_scorecard", "      - file: build/book/notebooks/12_new"
    )
    return copy


@pytest.fixture(scope="module")
def used(project):
    done = in_copy(project, "-c", USED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "title"), [("max_mil", "MaxMIL"), ("scaled", "Scaled")])
def test_a_new_network_and_a_new_method_are_taken_everywhere(project, used, name, title):
    assert name in used["plan"] and name in used["work"] and name in used["operations"]
    assert any(title in cell for cell in used["table"])
    assert f"| `{name}` | {title} | own | — |" in used["registry"]  # and claims no row of the paper
    build = project / "build" / "more"
    done = in_copy(project, "-m", "steph.cli", "predict", "--model", build / name, "--features", build / "slide.h5")
    assert done.returncode == 0 and title in done.stdout, done.stderr


def test_a_new_chapter_stands_where_the_contents_say_gets_its_runs_and_runs(project, used):
    assert used["chapters"][-2:] == ["12_new", "10_scorecard"]
    assert "build/book/notebooks/12_new" in [
        entry["file"] for part in yaml.safe_load(used["contents"])["parts"] for entry in part["chapters"]
    ]
    assert used["needed"] and all("SKCM" in run for run in used["needed"])
    command = ["run", "new", "--study", "more", "-p", "dataset=SKCM"]
    done = in_copy(project, "-m", "steph.cli", *command)
    assert done.returncode == 0, done.stderr
    assert (project / "build" / "more" / "notebooks" / "12_new.json").is_file()


def test_what_is_added_is_all_that_differs(project):
    """Two new lines for a network, one for a chapter, none for a method or a data set."""
    found = subprocess.run(["diff", "-r", "--brief", PROJECT, project], capture_output=True, text=True).stdout
    changed = [line for line in found.splitlines() if line.startswith("Files") and "__pycache__" not in line]
    assert len(changed) == 2 and "mil/__init__.py" in changed[1] and "_toc.yml" in changed[0]
