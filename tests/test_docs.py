"""What pages tell their reader to type runs, in the order of each page, on small made-up cohorts.

What cannot run here says so in the page, in a comment above its block, unseen by readers: `<!-- not run: gated -->`,
or `<!-- not run: "steph data fetch", gated -->` for the commands that hold these words.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import cache

import pytest
import typer
import yaml

from steph import PROJECT
from steph.cli import app
from tests.helpers.fabricate import clinical_table, slides_of

PAGES = {p.stem: p for p in (PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *(PROJECT / "book").glob("*.md"))}
READERS = {
    "runs": "README index running gpu_and_cluster",
    "changes": "data_and_licences own_cohort using_a_model paper_versus_release editing demo_cohort beyond "
    "troubleshooting",
}
"""Two readers and their pages with something to type, in order. Each has a folder, and types nothing twice."""
TYPED, SHOWN = ("bash", "python", "yaml"), ("json", "bibtex")
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<mark>[^>]*?) -->\s+)?^(?P<indent> *)```(?P<kind>bash|python|yaml)\n(?P<text>.*?)^ *```$",
    re.M | re.S,
)
REASONS = r"gated|network|a GPU|a cluster|minutes|hours|by hand|installs"

# What stands in for what a reader has and a test has not: a GPU (`steps`), large cohorts, weights, earlier hours.
SMALL = {
    "features": {"dim": 12},
    "network": {"dim_emb": 16, "dim_attn": 6},
    "recipe": {"epochs": 2},
    "steph": {"dim_hidden": 8, "sample_patches": 4, "top_k": 1},
    "synthetic": {"scale": 0.15, "external_patients": 20},
}
CANCERS = {
    "demo": ["BRCA", "SARC"],
    "tiny": ["CESC", "SARC"],
    "tcga": ["BRCA", "SARC"],
    "clinic": ["GASTRIC", "OESOPHAGEAL"],
}
WEIGHTS = """
import torch
from steph.mil import ABMIL, to_released
from steph.mil.state import ModelState, save_state, state_fingerprint
null = ABMIL(1536, 512, 384, 32).state_dict()
for name in ("null", "brca_fold0"):
    torch.save(to_released(null), f"{name}.pth")
for name in ("clinic", "blca", "stes"):
    save_state(ModelState(null, state_fingerprint(null)), f"{name}.safetensors")
"""
SLIDE = "import h5py, numpy\nh5py.File('slide.h5', 'w')['features'] = numpy.random.rand(9, 12)"
BEFORE = {
    "running": [("steph", "steph study run --study demo --dataset SARC --method vanilla --fold 0")],
    "README": [("steph", "steph study run --study demo --dataset BRCA --method steph --fold 0"), ("python", SLIDE)],
    "using_a_model": [("steph", "steph study run --study demo --dataset SARC --method steph --fold 0")],
    "data_and_licences": [("python", WEIGHTS)],
}
"""What a page takes for done: `make book`, weights from elsewhere."""


def blocks(page):
    """The blocks of a page that can be typed: kind, commands that run, commands that do not."""
    for block in BLOCK.finditer(PAGES[page].read_text(encoding="utf-8")):
        text = re.sub(rf"^{block['indent']}", "", block["text"], flags=re.M)
        lines = re.findall(r"^for.*?^done$|^[^\n]+$", re.sub(r"\\\n", " ", text), re.M | re.S)
        commands, words = lines if block["kind"] == "bash" else [text], []
        if mark := block["mark"]:
            assert re.search(REASONS, mark), f"{page}: `not run: {mark}` gives none of the reasons {REASONS}"
            words = re.findall(r'"(.+?)"', mark) or [""]
            assert all(word in text for word in words), f"{page}: `not run: {mark}` stands above no such command"
        left_out = [command for command in commands if any(word in command for word in words)]
        yield block["kind"], [command for command in commands if command not in left_out], left_out


def steps(page):
    """What a reader of a page does, as kind and text."""
    yield from BEFORE.get(page, ())
    for kind, commands, _ in blocks(page):
        for text in commands:
            text = re.sub(r"\bdevice([ =])cuda\b", r"device\1cpu", text)
            if kind == "yaml":
                path = text.splitlines()[0].removeprefix("# ")  # a manifest begins with its path
                write = f"open({path!r}, 'w').write({text!r})"
                yield "python", f"{write}\nfrom steph.data.manifest import load_study\nload_study({path!r})"
            elif kind == "python":
                yield kind, text
            else:
                text = re.sub(r" +# .*", "", text)
                yield "steph" if re.fullmatch(r"steph [^|&;<>]+", text) else kind, text


def smaller(path):
    """A manifest as somebody in a hurry would write it: fewer cancers, folds and epochs, narrower networks."""
    manifest = yaml.safe_load(path.read_text()) | {"folds": 2}
    manifest["datasets"] = {name: manifest["datasets"][name] for name in CANCERS[path.stem]}
    for section in SMALL if "synthetic" in manifest else SMALL.keys() - {"synthetic"}:
        manifest[section] = manifest.get(section, {}) | SMALL[section]
    path.write_text(yaml.safe_dump(manifest))


def what_a_reader_has(folder, root):
    """Features and the clinical table of TCGA, as they are fetched; slides as TRIDENT leaves them, and their tables."""
    hub = root / "features", "mahmoodlab"
    tables = [slides_of(n, *hub, f"TCGA-{n[:2]}-{{:04}}", "-01Z-00-DX{}.AAAA") for n in CANCERS["tcga"]]
    (root / "labels").mkdir()
    clinical_table(tables).to_excel(root / "labels" / "TCGA-CDR-SupplementalTableS1.xlsx", sheet_name="TCGA-CDR")
    for name in CANCERS["clinic"]:
        table = slides_of(name, folder / "clinic" / "features" / name, "trident", name[0] + "{:03}", "-A{}")
        table.to_csv(folder / f"{name.lower()}.csv", index=False)


@contextmanager
def reading(who, folder):
    """A function that carries out a step in a reader's copy of the project."""
    copy, home = folder / "project", folder / "home"
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns("build", ".*", "__pycache__", "*.egg-info", "tests"))
    (copy / ".venv").symlink_to(sys.prefix)
    what_a_reader_has(copy, home / "steph-data" / "tcga")
    for name in ("demo", "tiny", "tcga"):
        smaller(copy / "data_manifest" / f"{name}.yaml")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STEPH_")}
    environment |= {"PYTHONPATH": str(copy), "HOME": str(home), "PATH": f"{copy}/.venv/bin:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    program = [sys.executable, PROJECT / "tests" / "helpers" / "reader.py", str(list(READERS).index(who))]
    with subprocess.Popen(program, cwd=copy, env=environment, stdin=-1, stdout=-1, text=True) as process:

        @cache
        def carry_out(kind, text):
            process.stdin.write(json.dumps([kind, text]) + "\n")
            process.stdin.flush()
            done = json.loads(process.stdout.readline())
            if text.startswith("steph init"):
                smaller(copy / "clinic.yaml")
            return done

        yield carry_out


@pytest.mark.parametrize("who", READERS)
def test_what_pages_tell_their_reader_to_type_runs(who, tmp_path):
    with reading(who, tmp_path) as carry_out:
        for page in READERS[who].split():
            for kind, text in steps(page):
                code, output = carry_out(kind, text)
                assert code == 0 or (text.startswith("steph doctor") and "FAIL" in output), (
                    f"{page}.md: {text}\n{output}"
                )
    for notebook in tmp_path.glob("project/build/*/notebooks/*.ipynb"):
        assert ("Synthetic demo cohort" in notebook.read_text()) == (notebook.parts[-3] in ("demo", "tiny"))


def test_every_block_of_a_page_is_typed_or_says_why_not_and_its_options_exist():
    for page, path in PAGES.items():
        text, found = path.read_text(encoding="utf-8"), list(blocks(page))
        kinds = {kind for kind in re.findall(r"^ *```(.*)$", text, re.M)[::2] if not re.match(r"\{\w+\}", kind)}
        assert kinds <= {*TYPED, *SHOWN}, f"{page}.md has blocks of {kinds}; typed are {TYPED}, shown {SHOWN}"
        assert text.count("<!-- not run") == sum(bool(left_out) for *_, left_out in found), (
            f"{page}: a mark above no block"
        )
        assert page in " ".join(READERS.values()).split() or not list(steps(page)), f"{page}.md has no reader"
        for command in (command for *_, left_out in found for command in left_out if command.startswith("steph ")):
            of_steph, words = typer.main.get_command(app), shlex.split(command, comments=True)[1:]
            while hasattr(of_steph, "commands"):
                of_steph = of_steph.commands[words.pop(0)]
            of_steph.make_context(command, words)
