"""The files around the code agree with each other: one truth for versions, pins, licences and the book's contents."""

import ast
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import steph
from steph import PROJECT
from steph.data.manifest import load_study

WHOLE = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
PYPROJECT, TOOLS = WHOLE["project"], WHOLE["tool"]
EXTRAS = PYPROJECT["optional-dependencies"]
DIRECT = [Requirement(line) for group in (PYPROJECT["dependencies"], *EXTRAS.values()) for line in group]
TEXT_SUFFIXES = {".py", ".md", ".yml", ".yaml", ".toml", ".ipynb", ".cff", ".txt", ".bib", ".css", ".csv", ""}


def read(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def tracked(pattern: str = "*") -> list[Path]:
    """Files in git that match; outside a checkout there is nothing to compare."""
    listing = subprocess.run(["git", "ls-files", pattern], cwd=PROJECT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [PROJECT / line for line in listing.stdout.splitlines() if (PROJECT / line).is_file()]


def constraints() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9_.!+-]+)", line) for line in lines]
    assert all(pins), "a line is not name==version"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins}


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_direct_dependency_has_a_lower_bound_that_the_constraints_meet(requirement):
    assert any(part.operator in (">=", "==", "~=") for part in requirement.specifier), "no lower bound"
    pinned = constraints().get(canonicalize_name(requirement.name))
    assert pinned, f"constraints.txt lacks {requirement.name}"
    assert requirement.specifier.contains(pinned), f"constraints.txt pins {pinned}"


def test_constraints_suit_every_platform():
    pins = constraints()
    local = {name: version for name, version in pins.items() if "+" in version}
    assert not local, "a local version exists on one index only: it would take the GPU from people, or the CPU build"
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "pywin")) or name in ("triton", "steph")]
    assert "uv" in pins, "the Makefile installs uv with these constraints"


def test_makefile_takes_torch_from_the_constraints():
    makefile = read("Makefile")
    assert "s/^torch==//p' constraints.txt" in makefile
    assert not re.search(r"torch==\d", makefile), "a second pin of torch would drift"
    least = next(str(r.specifier).removeprefix(">=") for r in DIRECT if r.name == "torch")
    assert f">= ({least.replace('.', ', ')})" in makefile, "the Makefile accepts another torch than pyproject"


def test_imported_packages_are_declared():
    """Each package that the library imports is a dependency or in the `book` extra; tests may use `dev` too."""
    names = {"steph": ["book"], "tests": ["book", "dev"], "benchmarks": ["book", "dev"]}
    providers = packages_distributions()
    for folder, extras in names.items():
        lines = [*PYPROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
        declared = {canonicalize_name(Requirement(line).name) for line in lines}
        for path in (PROJECT / folder).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            found |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
            for module in sorted({name.split(".")[0] for name in found} - set(sys.stdlib_module_names)):
                local = [at / module for at in (PROJECT, path.parent, path.parent.parent)]
                if any(at.is_dir() or at.with_suffix(".py").exists() for at in local):
                    continue
                known = {canonicalize_name(name) for name in providers.get(module, [module])}
                assert known & declared, f"{path} imports {module}, which pyproject does not declare"


def test_core_needs_few_packages():
    """`import steph` and its data layer work where only the core is installed (a bare GPU machine)."""
    code = (
        "import sys, steph, steph.survival, steph.files.records, steph.data\n"
        "heavy = {'lifelines', 'matplotlib', 'papermill', 'openpyxl', 'IPython', 'scipy.optimize'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert found.stdout.strip() == "[]"


def test_run_time_dependencies_allow_the_mit_licence():
    """No strong copyleft among what an installation pulls in. docutils keeps one Emacs mode under the GPL, unused."""
    direct = [Requirement(line) for line in (*PYPROJECT["dependencies"], *EXTRAS["book"])]
    waiting, checked, strong = [(needed.name, tuple(needed.extras)) for needed in direct], set(), {}
    while waiting:
        name, extras = waiting.pop()
        if canonicalize_name(name) in checked:
            continue
        checked.add(canonicalize_name(name))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        classifiers = package.metadata.get_all("Classifier", [])
        licence = " ".join([package.metadata.get("License-Expression") or "", *classifiers])
        if re.search(r"(?<!L)GPL|GNU (Affero )?General Public", licence):
            strong[canonicalize_name(name)] = licence
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((needed.name, tuple(needed.extras)))
    assert len(checked) > 50
    assert set(strong) <= {"docutils"}, strong


def test_conda_environment_installs_the_project_with_the_constraints():
    environment = yaml.safe_load(read("environment.yml"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip_lines,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    python = next(entry.removeprefix("python=") for entry in plain if entry.startswith("python="))
    assert SpecifierSet(PYPROJECT["requires-python"]).contains(f"{python}.99"), "conda takes the newest of a line"
    assert {re.split("[=<>]", entry)[0] for entry in plain} == {"python", "pip"}, "thin: the rest stands in pyproject"
    assert pip_lines[0] == "-c constraints.txt"
    match = re.fullmatch(r"-e \.\[([a-z,]+)\]", pip_lines[-1])
    assert match and set(match[1].split(",")) == set(EXTRAS)
    assert f'python: "{python}"' in read(".github/workflows/tests.yml")
    assert f'python-version: "{python}"' in read(".github/workflows/book.yml")


def test_pre_commit_uses_the_pinned_tools():
    for entry in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]:
        name = entry["repo"].rsplit("/", 1)[1].removesuffix("-pre-commit")
        assert name in ("ruff", "nbstripout") and entry["rev"].removeprefix("v") == constraints()[name]


def test_one_version_everywhere():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "references"} <= set(citation)
    assert str(citation["version"]) == PYPROJECT["version"] == steph.__version__
    assert citation["license"] == PYPROJECT["license"] == "MIT"
    assert re.search(rf"^## {re.escape(steph.__version__)}\b", read("CHANGELOG.md"), re.M), "CHANGELOG.md lacks it"


def test_readme_names_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.M))
    for name, text in texts().items():
        named = set(re.findall(r"\bmake ([a-z]+)\b(?=[^\n]*`|\s*(?:#|$))", "\n".join(code_of(text)), re.M))
        assert named <= targets, f"{name} names {sorted(named - targets)}"


def code_of(markdown: str) -> list[str]:
    """Code spans and fenced blocks of a Markdown text."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.M | re.S)
    return blocks + [f"{span}`" for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", markdown)]


def test_notebooks_in_git_are_clean():
    notebooks = tracked("notebooks/*.ipynb")
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), f"{path} has outputs"
        tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
        assert tags.count("parameters") == 1, f"{path.name} needs one cell tagged `parameters`"


def test_no_path_of_somebodys_machine():
    paths = [path for path in tracked() if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 2_000_000]
    assert paths
    machine = re.compile(r"(?<![\w.~}])/(?:home|Users|root|work|farm)/\w")
    found = [str(path.relative_to(PROJECT)) for path in paths if machine.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_book_is_whole_and_asks_nothing_of_the_network():
    config, toc = yaml.safe_load(read("_config.yml")), yaml.safe_load(read("_toc.yml"))
    entries = [toc["root"]] + [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    written = [PROJECT / f"{entry}.md" for entry in entries if not entry.startswith("build/")]
    assert len(written) > 5 and all(path.is_file() for path in written)
    assert {*(PROJECT / "book").glob("*.md")} == {path for path in written if path.parent.name == "book"}, "off the TOC"

    assert config["execute"]["execute_notebooks"] == "off"
    sphinx = config["sphinx"]["config"]
    (static,) = sphinx["html_static_path"]
    assert (PROJECT / static / sphinx["mathjax_path"]).is_file()
    assert (PROJECT / static / "mathjax" / "LICENSE").is_file()
    assert sphinx["nb_ipywidgets_js"] == {}, "widgets would pull require.js from a network"
    assert not config["launch_buttons"].get("thebe", False)


@pytest.mark.parametrize("page", sorted((PROJECT / "book").glob("*.md")), ids=lambda page: page.stem)
def test_page_opens_with_its_question_and_closes_with_a_take_away(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(re.findall(r"^# ", text, re.M)) == 1, "one title"
    if page.stem not in ("index", "glossary", "bibliography"):
        assert "?" in text.split("\n## ")[0], "no question before the first section"
        assert ":class: tip" in text, "no take-away"


def texts() -> dict[str, str]:
    """What people read about the project, by file: Markdown pages, and the Markdown cells of notebooks."""
    pages = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "book").glob("*.md"))]
    written = {page.name: page.read_text(encoding="utf-8") for page in pages}
    for path in sorted((PROJECT / "notebooks").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        written[path.name] = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return written


TO_BE_WRITTEN = re.compile(r"12_NAME|data_manifest/(clinic|demo_seed1|tcga_repeated)")
"""Files that the text asks its reader to write."""


@pytest.mark.parametrize(("page", "text"), texts().items(), ids=texts())
def test_modules_functions_and_files_in_the_text_exist(page, text):
    settings = {f"steph.{name}" for name in load_study("demo").steph.model_dump()}  # of a manifest
    for name in set(re.findall(r"\bsteph(?:\.[A-Za-z_]\w*)+", text)) - settings:
        pkgutil.resolve_name(name)
    folders = "steph|tests|notebooks|book|data_manifest|workflow|benchmarks"
    for name in set(re.findall(rf"(?<![\w/.~])(?:{folders})/[\w./*-]*\w", text)):
        assert TO_BE_WRITTEN.search(name) or list(PROJECT.glob(name)), f"{page} names {name}, which is not there"


def test_the_readme_draws_every_room():
    tree = read("README.md").split("`steph/` is a handful of rooms.")[1].split("How to change things")[0]
    rows = [line[4:].split("  ") for line in tree.splitlines() if line.startswith("    ")]
    drawn = {name.strip() for row in rows for name in row[:2] if re.fullmatch(r"[a-z]+(/|\.py)", name.strip())}
    modules = [path for path in (PROJECT / "steph").iterdir() if not path.name.startswith(("_", "py.typed"))]
    assert drawn == {f"{path.name}/" if path.is_dir() else path.name for path in modules}


def test_commands_in_the_text_exist():
    """Each `steph ...` line of a code block names a command and options that the command line has."""
    import typer

    from steph.cli import app

    checked = 0
    for page, written in texts().items():
        text = "\n".join(code_of(written)).replace("\\\n", " ")
        for line in re.findall(r"^\s*(?:\.venv/bin/)?steph ([^#`\n]*)", text, re.M):
            words, command = shlex.split(line), typer.main.get_command(app)
            while words and hasattr(command, "commands") and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            assert not hasattr(command, "commands") or line.split()[0] == "...", f"{page}: no `steph {line}`"
            known = {name for parameter in command.params for name in parameter.opts}
            unknown = {word for word in words if word.startswith("-")} - known
            assert not unknown, f"{page}: `steph {line}` has no option {sorted(unknown)}"
            checked += 1
    assert checked > 5


def test_an_installed_package_finds_studies_and_notebooks_and_writes_where_one_stands(tmp_path):
    source, there, stands = tmp_path / "source", tmp_path / "installed", tmp_path / "I stand here"
    for path in tracked():
        copy = source / path.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    stands.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", there, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (there / "steph" / "py.typed").is_file()
    code = """
import steph
from steph.book.notebooks import find
from steph.data.manifest import load_study
from steph.study.paper import paper_table
print(steph.__file__, find("01_baselines"), load_study("tiny").build, len(paper_table("table1")), sep="\\n")"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STEPH_")} | {"PYTHONPATH": str(there)}
    done = subprocess.run([sys.executable, "-c", code], cwd=stands, env=environment, capture_output=True, text=True)
    file, notebook, build, rows = done.stdout.splitlines() or [done.stderr] * 4
    assert file.startswith(str(there)) and notebook.startswith(str(there)) and int(rows) > 0, done.stderr
    assert build == str(stands / "build" / "tiny")
