"""Nothing that is read runs code, no name leaves its place, and whatever is given ends in a result or in a sentence.

The last part are properties, tried on made-up input (hypothesis, always the same examples).
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import tempfile
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from typer.testing import CliRunner

from steph import PROJECT, Refused
from steph.analysis.performance.predictions import out_of_fold
from steph.book import notebooks, pages
from steph.book.build import shelve
from steph.cli import app
from steph.data.cohort import COLUMNS, cohort_from, read_cohort, write_cohort
from steph.data.dataset import open_dataset, pack_dataset
from steph.data.features import blocks, check_slides, find_slides, inspect, read
from steph.data.labels import read_outcomes, read_slides
from steph.data.manifest import load_study
from steph.data.splits import load_splits, make_splits
from steph.data.store import Store
from steph.deploy.checkpoints import read_weights
from steph.deploy.predict import load_model
from steph.deploy.report import write_report
from steph.files.records import file_sha256, read_sealed, write_sealed
from steph.files.templates import render
from steph.methods.registry import method
from steph.mil.state import load_state
from steph.plots.display import show_link, styled
from steph.study.cache import cached_table
from steph.study.runs import Run, Workbench, results
from steph.survival import bin_index, concordance_index, nll_loss, risk_score, survival_curve
from tests.helpers.fabricate import fabricate
from tests.helpers.made_model import made_folder, patches, write_slide

tried = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# ------------------------------------------------------------------------------------------------ no pickle


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def as_pickle(path, marker):
    path.write_bytes(pickle.dumps(Bomb(marker)))


def as_torch(path, marker):
    torch.save(Bomb(marker), path)


def as_old_torch(path, marker):
    torch.save({"features": Bomb(marker)}, path, _use_new_zipfile_serialization=False)


def as_numpy(path, marker):
    with path.open("wb") as file:
        np.save(file, np.array([Bomb(marker)], dtype=object), allow_pickle=True)


BOMBS = [as_pickle, as_torch, as_old_torch, as_numpy]


@pytest.mark.parametrize("plant", BOMBS)
def test_the_bombs_go_off_where_they_are_let(tmp_path, plant):
    plant(tmp_path / "bomb", tmp_path / "RAN")
    with (tmp_path / "bomb").open("rb") as file:
        if plant is as_numpy:
            np.load(file, allow_pickle=True)
        elif plant is as_pickle:
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert (tmp_path / "RAN").exists()


def real_study(folder, name="LIHC", features=True):
    """A study of real data in miniature, labelled and, if asked for, with slide files; its manifest."""
    data = folder / "data"
    rows = [(f"P{i}", f"S{i}", name, 100 * (i + 1), i % 2) for i in range(12)]
    cohort = cohort_from(pd.DataFrame(rows, columns=COLUMNS), name, "")
    write_cohort(cohort, data / "labels" / f"{name}.csv")
    if features:
        fabricate(cohort, data / "features", "mahmoodlab", dim=4, mean_patches=5)
    values = {"extends": "tcga", "name": "small", "data_root": str(data), "folds": 2, "features": {"dim": 4},
              "datasets": {name: {"projects": [name]}}}  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def slide(suffix):
    def site(folder, _):
        study = load_study(real_study(folder))
        whole = next((folder / "data" / "features").rglob("*.h5"))
        whole.unlink()
        path = whole.with_suffix(suffix)
        return path, lambda: pack_dataset(study, "LIHC", progress=False) if suffix in (".h5", ".pt") else inspect(path)

    return site


def labels(folder, _):
    study = load_study(real_study(folder))
    return study.data / "labels" / "LIHC.csv", lambda: pack_dataset(study, "LIHC", progress=False)


def splits(name):
    def site(folder, _):
        study = load_study(real_study(folder))
        pack_dataset(study, "LIHC", progress=False)
        open_dataset(study, "LIHC")
        path = study.data / "splits" / name
        path.parent.mkdir(exist_ok=True)
        if "/" in name:
            rows = [f"P{i},P{i + 6}" for i in range(6)]
            path.with_name("splits_1.csv").write_text("\n".join(["train,val", *rows]))
        return path, lambda: open_dataset(study, "LIHC")

    return site


def store(folder, _):
    study = load_study(real_study(folder))
    path = pack_dataset(study, "LIHC", progress=False).path
    return path, lambda: open_dataset(study, "LIHC")


def made_data(kind, end):
    def site(_, build):
        return build / "data" / kind / f"SARC.{end}", lambda: open_dataset(load_study("tiny"), "SARC")

    return site


def manifest(folder, _):
    return folder / "mine.yaml", lambda: load_study(folder / "mine.yaml")


def record(name):
    def site(_, build):
        bench, wanted = Workbench("tiny"), Run("SARC", "vanilla", 0, 42)
        readers = {"run.json": bench.record, "model.safetensors": bench.state}
        path = bench.folder(wanted) / name
        return path, lambda: readers.get(name, lambda run: out_of_fold(bench, [run], some_folds=True))(wanted)

    return site


def null_model(name):
    def site(_, build):
        path = next((build / "null_models").glob("abmil-*")) / name
        return path, lambda: Workbench("tiny").null_state("abmil")

    return site


def kept_table(name):
    def site(_, build):
        bench = Workbench("tiny")
        compute = lambda: pd.DataFrame({"a": [1]})  # noqa: E731
        cached_table(bench, "made", [], compute)
        return next((build / "analyses").glob("made-*")) / name, lambda: cached_table(bench, "made", [], compute)

    return site


def kept_notebook(folder, _):
    return folder / "a.ipynb", lambda: notebooks.execute(folder / "a.ipynb", {}, folder / "out.ipynb")


def executed_notebook(_, build):
    path = build / "notebooks" / "00_data.ipynb"
    path.parent.mkdir()
    path.with_suffix(".json").write_text(json.dumps({"status": "complete", "notebook": "0" * 64}))
    return path, lambda: shelve(Workbench("tiny"))


def completion(_, build):
    path = build / "notebooks" / "00_data.json"
    path.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(), path.with_suffix(".ipynb"))
    return path, lambda: notebooks.completion(path.with_suffix(".ipynb"))


def model_folder(name):
    def site(folder, _):
        made_folder(folder / "m")
        return folder / "m" / name, lambda: load_model(folder / "m")

    return site


def slide_of_a_patient(name):
    def site(folder, _):
        model = load_model(made_folder(folder / "m"))
        return folder / name, lambda: model.predict([folder / name])

    return site


def table_of_patients(folder, _):
    model = load_model(made_folder(folder / "m"))
    return folder / "t.csv", lambda: model.predict_table(folder / "t.csv")


def weights(name):
    return lambda folder, _: (folder / name, lambda: read_weights(folder / name))


SITES = {
    **{f"model folder {name}": model_folder(name) for name in ("config.json", "model.safetensors")},
    **{f"slide of a patient {name}": slide_of_a_patient(name) for name in ("s.h5", "s.pt")},
    **{f"weights {end}": weights(f"w{end}") for end in (".pth", ".pt", ".safetensors")},
    "table of patients": table_of_patients,
    **{f"slide {end}": slide(end) for end in (".h5", ".pt", ".pth", ".npy")},
    "labels": labels,
    "TCGA-CDR csv": lambda folder, _: (folder / "c.csv", lambda: read_outcomes(folder / "c.csv", "DSS")),
    "TCGA-CDR xlsx": lambda folder, _: (folder / "c.xlsx", lambda: read_outcomes(folder / "c.xlsx", "DSS")),
    "slide list": lambda folder, _: (folder / "s.txt", lambda: read_slides(folder / "s.txt")),
    "slide list csv": lambda folder, _: (folder / "s.csv", lambda: read_slides(folder / "s.csv")),
    "our splits": splits("LIHC.csv"),
    "the authors' splits": splits("tcga_lihc/splits_0.csv"),
    "store": store,
    "made store": made_data("stores", "h5"),
    "made labels": made_data("labels", "csv"),
    "made oracle": made_data("oracle", "csv"),
    "manifest": manifest,
    **{f"record {name}": record(name) for name in ("run.json", "model.safetensors", "predictions.csv")},
    **{f"null model {name}": null_model(name) for name in ("run.json", "model.safetensors")},
    **{f"kept {name}": kept_table(name) for name in ("run.json", "table.csv")},
    "notebook": kept_notebook,
    "executed notebook": executed_notebook,
    "completion record": completion,
}


@pytest.mark.parametrize("plant", BOMBS)
@pytest.mark.parametrize("site", SITES)
def test_no_file_that_is_read_is_unpickled(site, plant, build, tmp_path):
    path, reader = SITES[site](tmp_path, build)
    plant(path, tmp_path / "RAN")
    path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)  # else reading would end there
    with pytest.raises(Refused) as refused:
        reader()
    assert path.name in str(refused.value) or path.stem in str(refused.value)
    assert not (tmp_path / "RAN").exists(), "code of a pickle was run"


@pytest.mark.parametrize("plant", BOMBS)
def test_a_model_is_no_pickle_even_where_its_record_vouches_for_it(build, tmp_path, plant):
    path, reader = record("model.safetensors")(tmp_path, build)
    plant(path, tmp_path / "RAN")
    info = read_sealed(path.parent / "run.json")
    info["files"][path.name] = file_sha256(path)
    write_sealed(path.parent / "run.json", info)
    with pytest.raises(Refused, match="not a readable safetensors file"):
        reader()
    assert not (tmp_path / "RAN").exists()


OBJECTS = [
    "!!python/object/apply:os.system ['touch RAN']",
    "!!python/object/new:pathlib.Path ['RAN']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:subprocess.check_output [['touch', 'RAN']]",
]


@pytest.mark.parametrize("text", OBJECTS)
def test_yaml_makes_no_objects(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    for content in (text, f"extends: tiny\nname: mine\ntitle: {text}"):
        path.write_text(content)
        with pytest.raises(Refused, match=r"mine\.yaml is not readable YAML"):
            load_study(path)
    done = CliRunner().invoke(app, ["run", "01_baselines", "-p", f"dataset={text}"])
    assert done.exit_code == 1 and "is not a readable value" in done.output
    assert not (tmp_path / "RAN").exists()


UNSAFE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "dill.load", "joblib.load", "marshal.loads",
    "shelve.open", "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "subprocess.getoutput", "eval", "exec", "__import__", "input",
    "tempfile.mktemp", "shutil.unpack_archive",
}  # fmt: skip


def unsafe_calls(source):
    """What a piece of code calls that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in {"pickle", "marshal", "shelve", "joblib", "dill"}:
            found.append(f"from {node.module}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in UNSAFE:
            found.append(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(name)
        if name.endswith(".load") and options.get("allow_pickle", "False") != "False":
            found.append(name)
        if name.startswith("subprocess.") and options.get("shell", "False") != "False":
            found.append(name)
        if name.endswith((".extractall", ".extract")) and "tar" in name and "filter" not in options:
            found.append(name)
    return found


@pytest.mark.parametrize("path", sorted((PROJECT / "steph").rglob("*.py")), ids=lambda p: str(p.relative_to(PROJECT)))
def test_no_module_calls_what_runs_what_it_reads(path):
    assert unsafe_calls(path.read_text(encoding="utf-8")) == []


def test_no_notebook_calls_what_runs_what_it_reads():
    for path in (PROJECT / "notebooks").rglob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or unsafe_calls(cell.source) == [], path.name


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)", "from pickle import loads", "torch.load(p)", "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)", "yaml.load(t, Loader=yaml.Loader)", "eval('1')", "exec('1')",
        "os.system('ls')", "subprocess.run('ls', shell=True)", "pd.read_pickle(p)", "tar.extractall(d)",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(line):
    assert unsafe_calls(line)
    assert not unsafe_calls("torch.load(p, weights_only=True); model.eval(); np.load(p, allow_pickle=False)")


# ------------------------------------------------------------------------------------------------ names

EVIL = [
    "../../evil", "/tmp/evil", "..", ".", "", " ", "-rf", "a/b", "a\\b", "a\0b", "a\nb", "a\r\nb", "a\tb", 'q"uote',
    "q'uote", '"""', "$(touch evil)", "`touch evil`", "a; touch evil", "a | b", "a && b", "%s%n", "=1+1",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;", "{{ 7*7 }}", "{0.__class__}", "{x}",
    "$\\frac$", "x" * 300, "é" * 300, "\u202eevil", "a\u200bb", "\ufeffa", "ａ", "\x1b[2J", "\x7f", "nul",
    "NaN", "~", "~nobody/x", "*", "[", "**x",
]  # fmt: skip
FEW_EVIL = [
    "../../evil", ".", "", "a\0b", "a\nb", "x" * 300, "$(touch evil)", "<script>", "{x}", "~nobody/x", "-rf", "\x1b[2J",
]  # fmt: skip
PLAIN = ["A", "TCGA-3C-AALI", "patient 1", "Ä 7", "7", "O'Neil", "a,b", "007"]


def short(value):
    return ascii(value)[:24]


@pytest.mark.parametrize("name", EVIL, ids=short)
@pytest.mark.parametrize("where", ["study", "dataset", "project"])
def test_names_of_a_manifest_stay_in_the_build_folder(tmp_path, monkeypatch, name, where):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    values = {"extends": "tiny", "name": "mine", "datasets": {"LIHC": {"projects": ["L"]}}}
    if where == "study":
        values["name"] = name
    elif where == "dataset":
        values["datasets"] = {name: {"projects": ["L"]}}
    else:
        values["datasets"]["LIHC"]["projects"] = [name]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        study = load_study(path)
    except Refused as reason:
        assert str(path) in str(reason)
        return
    build = (tmp_path / "build").resolve()
    folders = [study.build, study.build / "runs" / next(iter(study.datasets)), study.data / "labels"]
    assert all(folder.resolve().is_relative_to(build) and folder.resolve() != build for folder in folders)
    assert name in ("nul", "NaN"), "only plain words are names"


def test_the_book_s_folder_is_no_study(tmp_path):
    for name in ("book", "Book"):
        (tmp_path / "mine.yaml").write_text(f"extends: tiny\nname: {name}")
        with pytest.raises(Refused, match="build/book is the book's folder"):
            load_study(tmp_path / "mine.yaml")


def table_of(patients, slides):
    rows = [(p, s, "X", 100.0 * (i + 1), i % 2) for i, (p, s) in enumerate(zip(patients, slides, strict=True))]
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.mark.parametrize("name", EVIL, ids=short)
def test_a_slide_is_a_file_name_or_refused(name):
    try:
        cohort = cohort_from(table_of(["A", "B"], [name, "S"]), "X", "table.csv")
    except Refused as reason:
        assert "table.csv" in str(reason) and all(line.isprintable() for line in str(reason).splitlines())
        return
    found = cohort.slides["slide_id"][0]
    assert found == Path(found).name and found.isascii() and found == name


@pytest.mark.parametrize("name", [*EVIL, *PLAIN], ids=short)
def test_a_patient_is_the_same_in_every_table_or_refused(tmp_path, name):
    patients = [name, *(f"P{i}" for i in range(7))]
    try:
        cohort = cohort_from(table_of(patients, [f"S{i}" for i in range(8)]), "X", "table.csv")
    except Refused as reason:
        assert "table.csv" in str(reason) and all(line.isprintable() for line in str(reason).splitlines())
        assert name not in PLAIN
        return
    write_cohort(cohort, tmp_path / "labels.csv")
    again = read_cohort(tmp_path / "labels.csv", "X")
    assert again.fingerprint == cohort.fingerprint and list(again.slides_of) == [name.strip(), *patients[1:]]
    made = load_splits(cohort, tmp_path / "splits", 2, 0)
    assert load_splits(again, tmp_path / "splits", 2, 0).fingerprint == made.fingerprint
    written = {path.name.removesuffix(".sha256") for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"X.csv", "labels.csv"}


@pytest.mark.parametrize("name", EVIL, ids=short)
def test_methods_and_sources_are_those_of_the_registry(build, name):
    for given_name in (name, f"steph@{name}"):
        with pytest.raises(Refused):
            method(given_name)
            Workbench("tiny").folder(Run("SARC", given_name, 0, 42))
    with pytest.raises(Refused, match="unknown data set"):
        Workbench("tiny").folder(Run(name, "vanilla", 0, 42))


@pytest.mark.parametrize("name", EVIL, ids=short)
def test_a_record_that_names_something_else_is_not_current(build, name):
    path = next(build.glob("runs/SARC/vanilla/*/run.json"))
    info = read_sealed(path)
    for part in ("dataset", "method"):
        write_sealed(path, {**info, "run": {**info["run"], part: name}})
        assert len(results("tiny")) == 2


COMMANDS = {
    "study": ["results", "--study"],
    "doctor": ["doctor", "--study"],
    "data set": ["study", "run", "--study", "tiny", "--dataset"],
    "method": ["study", "run", "--study", "tiny", "--method"],
    "device": ["study", "run", "--study", "tiny", "--device"],
    "notebook": ["run"],
    "parameter": ["run", "01_baselines", "-p"],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_commands_answer_any_name_with_a_sentence(build, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in FEW_EVIL:
        done = CliRunner().invoke(app, [*COMMANDS[what], *(["--"] if what == "notebook" else []), name])
        assert done.exit_code in (1, 2), (name, done.output)
        assert done.exception is None or isinstance(done.exception, SystemExit), (name, done.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_parameters_of_a_notebook_are_data(tmp_path, build):
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("# Parameters\nstudy = 'tiny'\npatients = 'auto'", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("import json; print(json.dumps(patients))"),
    ])  # fmt: skip
    folder = tmp_path / "{odd} <name> $x"  # papermill would fill in what stands in braces
    folder.mkdir()
    nbformat.write(notebook, folder / "a.ipynb")
    values = [*EVIL, *PLAIN, "'''", "\\n", "\\", "\\'", "# Parameters", "a\n# Parameters\nstudy = 'demo'", "\u2028"]
    done = notebooks.execute(folder / "a.ipynb", {"patients": values}, folder / "done.ipynb", progress=False)
    cells = nbformat.read(done, as_version=4).cells
    assert json.loads("".join(output.text for output in cells[-1].outputs)) == values
    assert sum("injected-parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert len(cells) == 3 and not list(tmp_path.rglob("*evil*"))


MARKUP = [name for name in EVIL if "<" in name]


def test_tables_and_pages_escape_markup(build):
    for name in MARKUP:
        table = pd.DataFrame({name: [name], "n": [1]}, index=pd.Index([name], name="patient"))
        wide = pd.DataFrame([[1]], index=pd.MultiIndex.from_tuples([(name, "a")]), columns=[["a"], [name]])
        for html in (styled(table).to_html(), styled(table, index=False).to_html(), styled(wide).to_html()):
            assert name not in html and "&lt;" in html
        assert name not in render("steph.book", "registry.md", methods=pd.DataFrame({"a": [name]}))
    study = load_study("tiny").model_copy(update={"title": MARKUP[0]})
    assert MARKUP[0] not in pages.status(Workbench(study), {}, results("tiny"))


@pytest.mark.parametrize(
    "name", [name for name in EVIL if 0 < len(name.encode()) < 250 and not set(name) & set("/\0")], ids=short
)
def test_what_a_model_says_of_a_slide_stays_in_its_folder(tmp_path, name):
    slide = write_slide(tmp_path / f"{name}.h5", patches())
    model = load_model(made_folder(tmp_path / "m"))
    before = set(tmp_path.iterdir())
    write_report(model.predict([slide], patient_id=name), model, tmp_path / "out")
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "out"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.html", "prediction.json", "attention.csv", f"{slide.stem}.geojson"}
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "onerror=alert(1)>" not in text


def test_registry_and_status_hold_no_markup_that_escaping_would_spoil():
    assert "&lt;" not in pages.methods_page()


def test_a_link_is_quoted(tmp_path, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr("IPython.display.display", lambda data, raw: said.write(data["text/html"]))
    show_link(tmp_path / 'a"><script>.csv')
    assert "<script>" not in said.getvalue() and said.getvalue().count('"') == 4


def test_links_of_an_executed_notebook_do_not_leave_the_shelf(build, tmp_path, monkeypatch):
    from steph.book.build import chapters, executed_path
    from steph.book.notebooks import completion_path

    monkeypatch.setattr("steph.book.build.SHELF", tmp_path / "shelf")
    (tmp_path / "secret.csv").write_text("secret")
    study = load_study("tiny")
    chapter = chapters(study)[0]
    executed = executed_path(study, chapter)
    executed.parent.mkdir(parents=True)
    href = "../" * 40 + str(tmp_path / "secret.csv").lstrip("/")
    data = {"text/html": f'<p class="to-file"><a href="{href}" download>CSV</a></p>'}
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data=data)])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), executed)
    write_sealed(completion_path(executed), {"status": "complete", "notebook": file_sha256(executed)})
    monkeypatch.setattr("steph.book.build.chapters", lambda _: [chapter])
    with pytest.raises(Refused, match="links to"):
        shelve(Workbench(study))
    assert (tmp_path / "secret.csv").read_text() == "secret"


@pytest.mark.parametrize("name", ["$\\frac$", "$x$", "$", "a_b^c $"])
def test_a_patient_s_name_is_no_formula(name):
    from steph.plots.attention import attention_maps

    n = 9
    columns = {"patient_id": name, "slide_id": "S", "x": np.arange(n) * 256, "y": 0, "patch": range(n)}
    for model in ("vanilla", "steph"):
        columns |= {f"attention_{model}": 1 / n, f"percentile_{model}": np.linspace(0, 1, n)}
        columns |= {"difference": 0.0, f"rank_{model}": np.arange(1, n + 1)}
    figure = attention_maps([pd.DataFrame(columns)], names={"vanilla": "a", "steph": "b"})
    figure.savefig(io.BytesIO())
    assert name.replace("$", r"\$") in figure.axes[0].get_title()


# ------------------------------------------------------------------------------------------------ properties


def at_most_refused(action, *arguments):
    """The result of a call, or None where it refused with a sentence; anything else it raises is a bug."""
    try:
        return action(*arguments)
    except Refused as reason:
        assert len(str(reason)) > 10
        return None


@pytest.fixture(scope="module")
def scratch():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


IDS = st.one_of(st.sampled_from(["A", "B", "C", "A ", "nan", ""]), st.text(max_size=8))
TIMES = st.one_of(st.floats(), st.integers(-5, 10_000), st.sampled_from(["12", " 7", "x", "", None, "1e400", True]))
EVENTS = st.one_of(st.sampled_from([0, 1, "1", "0.0", "true", True, None, "dead", 2, 1.0]), st.text(max_size=3))
ROWS = st.lists(st.tuples(IDS, IDS, st.text(max_size=4), TIMES, EVENTS), max_size=6)


@st.composite
def nearly_right(draw):
    """A table that is right but for at most one cell."""
    rows = [[f"P{i // 2}", f"S{i}", "X", 10.0 * (i // 2), i // 2 % 2] for i in range(draw(st.integers(1, 6)))]
    row, column = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, 4))
    rows[row][column] = draw([IDS, IDS, st.text(max_size=4), TIMES, EVENTS][column])
    return rows


def assert_cohort(cohort):
    slides, patients = cohort.slides, cohort.patients
    assert list(slides.columns) == COLUMNS and slides["slide_id"].is_unique and len(slides) > 0
    assert np.isfinite(slides["time_days"]).all() and (slides["time_days"] >= 0).all() and slides["event"].dtype == bool
    assert patients["patient_id"].is_unique and patients["n_slides"].sum() == len(slides)
    joined = slides.merge(patients, on="patient_id")
    assert (joined["time_days_x"] == joined["time_days_y"]).all() and (joined["event_x"] == joined["event_y"]).all()
    assert len(cohort.fingerprint) == 12


@tried
@given(ROWS | nearly_right())
@example([("A", "S", "X", 1, 1), ("A", "T", "X", 1, 1)])
@example([("A", "S", "X", -1e-9, 1)])
@example([("A", "S", "X", 1, "dead")])
def test_a_table_is_a_cohort_or_refused(rows):
    cohort = at_most_refused(cohort_from, pd.DataFrame(rows, columns=COLUMNS), "X", "here")
    if cohort is not None:
        assert_cohort(cohort)
        assert {str(row[4]).strip().lower() for row in rows} <= {"1", "0", "1.0", "0.0", "true", "false"}


@tried
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
@example(b"")
@example(b"\xff\xfe")
@example(b'"')
@example(b"\0")
@example(b"S,T,X,1,1\nS,U,X,1,1\n")
@example(b"S,T,X,1\nS,U,X,1,1,1,1\n")
def test_a_label_file_is_a_cohort_or_refused(scratch, content):
    for head in (b"", b"patient_id,slide_id,project,time_days,event\n"):
        (scratch / "t.csv").write_bytes(head + content)
        cohort = at_most_refused(read_cohort, scratch / "t.csv", "X")
        if cohort is not None:
            assert_cohort(cohort)
        at_most_refused(read_outcomes, scratch / "t.csv", "DSS")
        at_most_refused(read_slides, scratch / "t.csv")
        (scratch / "t.txt").write_bytes(content)
        at_most_refused(read_slides, scratch / "t.txt")
        (scratch / "t.xlsx").write_bytes(content)
        at_most_refused(read_outcomes, scratch / "t.xlsx", "DSS")


FEW = cohort_from(table_of([f"P{i}" for i in range(6)], [f"S{i}" for i in range(6)]), "X", "")
MEMBER = st.one_of(st.sampled_from([f"P{i}" for i in range(6)]), st.sampled_from(["", "P9", " P1", "p1"]))


def assert_splits(found, cohort, n_folds):
    known = set(cohort.slides_of)
    assert found.n_folds == n_folds
    for fold in range(n_folds):
        train, test = found.train(fold), found.test(fold)
        assert train and test and not set(train) & set(test) and set(train) | set(test) <= known
        assert len(set(train)) == len(train) and len(set(test)) == len(test)


@tried
@given(
    st.permutations(range(6)), st.lists(st.tuples(MEMBER, st.sampled_from(["0", "1", "2", "x", "", "1.0"])), max_size=3)
)
def test_a_file_of_folds_divides_the_cohort_or_is_refused(scratch, order, more):
    rows = [(f"P{i}", str(k % 2)) for k, i in enumerate(order)] + more
    pd.DataFrame(rows, columns=["patient_id", "fold"]).to_csv(scratch / "X.csv", index=False)
    found = at_most_refused(load_splits, FEW, scratch, 2, 0)
    if found is not None:
        assert_splits(found, FEW, 2)
        assert sorted(p for fold in range(2) for p in found.test(fold)) == sorted(FEW.slides_of)
    assert (found is None) == bool(more)


@tried
@given(st.data())
def test_the_authors_files_divide_the_cohort_or_are_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "tcga_x"
        where.mkdir()
        for k in range(data.draw(st.integers(1, 3))):
            place = {f"P{i}": data.draw(st.sampled_from(["train", "test", "val"])) for i in range(6)}
            columns = {part: [p for p, at in place.items() if at == part] for part in ("train", "test", "val")}
            columns["train"] += data.draw(st.lists(MEMBER, max_size=1))
            dropped = data.draw(st.sampled_from([[], ["test"], ["val"], ["train"]]))
            kept_columns = {name: pd.Series(v, dtype=str) for name, v in columns.items() if name not in dropped}
            pd.DataFrame(kept_columns).to_csv(where / f"splits_{k}.csv", index=False)
        found = at_most_refused(load_splits, FEW, Path(folder), 2, 0)
        if found is not None:
            assert_splits(found, FEW, 2)


@tried
@given(st.binary(max_size=120), st.sampled_from([b"", b"patient_id,fold\n", b"train,val\n"]))
def test_any_bytes_as_splits_are_refused(scratch, content, head):
    assume(content.strip())
    (scratch / "X.csv").write_bytes(head + content)
    assert at_most_refused(load_splits, FEW, scratch, 2, 0) is None


@tried
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.booleans()), min_size=2, max_size=40),
    st.integers(2, 6),
    st.integers(0, 2**31),
    st.randoms(use_true_random=False),
)
def test_folds_that_are_made_are_even_and_do_not_follow_the_tables_order(labels, n_folds, seed, chance):
    rows = [(f"P{i}", f"S{i}", "X", time, int(event)) for i, (time, event) in enumerate(labels)]
    found = at_most_refused(make_splits, cohort_from(pd.DataFrame(rows, columns=COLUMNS), "X", ""), n_folds, seed)
    if found is None:
        assert sum(event for _, event in labels) < n_folds
        return
    event = pd.Series([e for _, e in labels], index=[f"P{i}" for i in range(len(labels))])[found["patient_id"]]
    for counts in (found["fold"].value_counts(), found["fold"][event.to_numpy()].value_counts()):
        counts = counts.reindex(range(n_folds), fill_value=0)
        assert counts.max() - counts.min() <= 1 and counts.min() >= 0
    chance.shuffle(rows)
    again = make_splits(cohort_from(pd.DataFrame(rows, columns=COLUMNS), "X", ""), n_folds, seed)
    assert again.equals(found)


KINDS = st.sampled_from(["f2", "f4", "f8", ">f4", "i4", "u1", "?", "c8", "S3", "i8"])
SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def feature_files(draw):
    """What may stand in a feature file: arrays by name, and whether they are chunked."""
    names = draw(st.lists(st.sampled_from(["features", "coords", "feats", "annots"]), unique=True, max_size=3))
    n, dim = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    made = {}
    for name in names:
        own = draw(st.sampled_from([(n, dim if name == "features" else 2), (1, n, dim if name == "features" else 2)]))
        shape = draw(st.one_of(st.just(own), SHAPES))
        kind = draw(st.one_of(st.just("f4" if name == "features" else "i8"), KINDS))
        made[name] = draw(hnp.arrays(np.dtype(kind), shape))
    return made, draw(st.booleans()), draw(st.booleans())


def is_of_a_known_layout(arrays):
    """What the module says that it reads."""
    features, coords = (arrays.get(name) for name in ("features", "coords"))
    if features is None or features.dtype.kind != "f":
        return False
    n = features.shape[-2] if features.ndim > 1 else 0
    placed = coords is None or (coords.dtype.kind in "iu" and coords.shape in {(n, 2), (1, n, 2)})
    return placed and (features.ndim == 2 or (features.ndim == 3 and features.shape[0] == 1))


def same(a, b):
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@tried
@given(feature_files())
@example(({"features": np.ones((1, 3, 2), "f4"), "coords": np.ones((1, 3, 2), "i8")}, True, False))
@example(({"features": np.ones((1, 2), "f4"), "coords": np.ones((1, 2), "i8")}, False, False))
@example(({"features": np.ones((1, 1, 2), "f4"), "coords": np.ones((1, 1, 2), "i8")}, False, False))
def test_a_feature_file_is_read_as_it_is_or_refused(scratch, made):
    arrays, chunked, grouped = made
    path = scratch / "slide.h5"
    with h5py.File(path, "w") as file:
        if grouped and "features" not in arrays:
            file.create_group("features")
        for name, value in arrays.items():
            whole = chunked and value.size > 0 and value.ndim > 0
            file.create_dataset(name, data=value, **({"chunks": True, "compression": "gzip"} if whole else {}))
    info = at_most_refused(inspect, path)
    assert (info is not None) == is_of_a_known_layout(arrays)
    table = check_slides(["slide"], {"slide": path}, 2)
    assert (table["problem"][0] == "") == (info is not None and info.dim == 2 and info.n_patches > 0)
    if info is None:
        return
    features, coords = (arrays.get(name) for name in ("features", "coords"))
    expected = features.reshape(features.shape[-2:])
    assert (info.n_patches, info.dim) == expected.shape and info.has_coords == (coords is not None)
    values, places = read(path)
    assert same(values, expected)
    assert (places is None and coords is None) or same(places, coords.reshape(-1, 2))
    pieces = list(blocks(path))
    assert not pieces or same(np.concatenate([piece for piece, _ in pieces]), expected)


@st.composite
def tensors(draw):
    """What may stand in a .pt file."""
    shape = draw(st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 3)), SHAPES))
    kind = draw(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
    )
    value = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape).to(kind)
    form = draw(
        st.sampled_from(["plain", "plain", "dict", "list", "sparse", "parameter", "number", "none", "transposed"])
    )
    forms = {"dict": {"features": value}, "list": [value], "number": 3.0, "none": None}
    if form in forms:
        return forms[form], None
    if form == "sparse":
        return value.to_sparse(), None
    if form == "parameter" and value.is_floating_point():
        return torch.nn.Parameter(value), None
    return (value.mT, value.mT) if form == "transposed" and value.ndim >= 2 else (value, value)


@tried
@given(tensors(), st.booleans())
def test_a_tensor_file_is_read_as_it_is_or_refused(scratch, made, legacy):
    value, expected = made
    torch.save(value, scratch / "slide.pt", _use_new_zipfile_serialization=not legacy)
    info = at_most_refused(inspect, scratch / "slide.pt")
    if info is not None and expected is not None:
        found, coords = read(scratch / "slide.pt")
        assert coords is None and same(found, expected.reshape(expected.shape[-2:]).float().numpy().astype(found.dtype))
        assert (info.n_patches, info.dim) == found.shape


@tried
@given(st.binary(max_size=300), st.integers(0, 4000), st.sampled_from(["slide.h5", "slide.pt", "store.h5", "state"]))
def test_damaged_files_are_refused_or_what_they_were(scratch, junk, at, name):
    """Bytes overwritten somewhere, or the file cut there."""
    study = scratch / "study"
    if not study.exists():
        study.mkdir()
        pack_dataset(load_study(real_study(study)), "LIHC", progress=False)
    whole = study / name
    if not whole.exists():
        if name == "slide.h5":
            whole.write_bytes(next(iter(find_slides([study / "data" / "features"]).values())).read_bytes())
        elif name == "slide.pt":
            torch.save(torch.ones(5, 4), whole)
        elif name == "store.h5":
            whole.write_bytes((study / "data" / "stores" / "LIHC.h5").read_bytes())
        else:
            from safetensors.torch import save_file

            save_file({"a": torch.ones(5, 4)}, whole)
    content = whole.read_bytes()
    at %= len(content)
    damaged = content[:at] + junk + content[at + len(junk) :] if len(junk) % 2 else content[:at]
    path = scratch / f"damaged-{name}"
    path.write_bytes(damaged)
    if name == "state":
        at_most_refused(load_state, path)
    elif name == "store.h5":
        opened, was = at_most_refused(Store.open, path), Store.open(whole)
        if opened is not None and at_most_refused(lambda: opened.verify() or True):
            assert opened.slide_ids == was.slide_ids and opened.fingerprint == was.fingerprint
            assert same(opened.features, was.features) and same(opened.coords, was.coords)
    else:
        at_most_refused(read, path)


YAMLS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["name", "title", "synthetic", "data_root", "endpoint", "features", "datasets", "folds", "repeats", "book_folds",
        "seed", "network", "recipe", "steph", "sources", "extends", "nonsense"]  # fmt: skip


@tried
@given(st.dictionaries(st.sampled_from(KEYS), YAMLS, max_size=3))
@example({"features": {"folders": ["~nobody/x"]}, "synthetic": None})
@example({"features": {"folders": ["**x", "a\0b", ""]}, "synthetic": None})
@example({"data_root": "~nobody"})
@example({"extends": "x" * 300})
@example({"extends": ["a"]})
def test_a_manifest_is_a_study_or_refused(scratch, values):
    path = scratch / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "tiny", "name": "mine", **values}), encoding="utf-8")
    study = at_most_refused(load_study, path)
    if study is not None:
        assert study.n_folds >= 2 and study.datasets
        at_most_refused(lambda: (study.data, study.build))
        at_most_refused(open_dataset, study, "NONE")
        if not study.synthetic:
            at_most_refused(pack_dataset, study, next(iter(study.datasets)))


@tried
@given(st.text(max_size=60))
@example("a: 2024-13-45")
@example("a: !!int x")
@example("a: !!bool x")
@example("a: !!timestamp x")
@example("a: 0x_")
@example("? {a: 1}\n: 2")
@example("[" * 5000)
@example("a: &a [*a]")
@example("\0")
def test_any_text_as_a_manifest_is_refused(scratch, text):
    (scratch / "text.yaml").write_text(text, encoding="utf-8")
    assert at_most_refused(load_study, scratch / "text.yaml") is None


def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for key in ("title", "datasets", "sources", "nonsense"):
        (tmp_path / "mine.yaml").write_text("\n".join([*lines, "extends: tiny", "name: mine", f"{key}: *a11"]))
        with pytest.raises(Refused) as refused:
            load_study(tmp_path / "mine.yaml")
        assert len(str(refused.value)) < 100_000


@tried
@given(st.one_of(st.binary(max_size=120), YAMLS.map(lambda value: json.dumps(value, default=str).encode())))
@example(b"[" * 100_000)
@example(b'{"cells": {"a": 1}}')
@example(b'{"cells": [1]}')
@example(b'{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "# Parameters\\na = ' + b"-" * 5000 + b'1"}]}')
@example(b'{"cells": [{"metadata": {"tags": ["parameters"]}, "source": 3}]}')
@example(b'{"cells": [{"metadata": null}]}')
@example(b'{"status": "complete", "files": {"a": 1}, "run": []}')
def test_json_that_is_none_of_ours_is_refused(scratch, content):
    (scratch / "a.ipynb").write_bytes(content)
    assert at_most_refused(notebooks.declared, scratch / "a.ipynb") is None
    (scratch / "a.json").write_bytes(content)
    assert at_most_refused(notebooks.completion, scratch / "a.ipynb") is None


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "[]", '{"status": "complete", "files": {}}', '{"status": "complete", "files": {}, "run": []}',
     '{"status": "complete", "files": {}, "run": {"dataset": "SARC"}, "metrics": {}}'],
    ids=short,
)  # fmt: skip
def test_a_record_that_is_none_of_ours_is_refused_with_its_path(build, text):
    path = next(build.glob("runs/SARC/vanilla/*/run.json"))
    path.write_text(text)
    with pytest.raises(Refused, match=r"run\.json") as refused:
        results("tiny")
    assert str(path.parent) in str(refused.value)
    if text.startswith("{"):  # even where its checksum is right
        write_sealed(path, json.loads(text))
        with pytest.raises(Refused, match=r"run\.json is no record of a run"):
            results("tiny")


DAYS = st.lists(st.floats(), max_size=20)


@tried
@given(DAYS, st.integers(1, 40), st.floats(1, 1e6))
@example([0.0, 5e-324, 1.7e308], 32, 365.0)
def test_every_time_has_one_interval_or_is_refused(days, n_bins, width):
    found = at_most_refused(bin_index, days, n_bins, width)
    valid = all(np.isfinite(day) and day >= 0 for day in days)
    assert (found is not None) == valid
    if found is not None:
        assert found.dtype == np.int64 and found.shape == (len(days),)
        assert ((found >= 0) & (found < n_bins)).all()
        order = np.argsort(days, kind="stable")
        assert (np.diff(found[order]) >= 0).all(), "longer is never an earlier interval"


@st.composite
def patients(draw):
    n = draw(st.integers(0, 12))
    time = draw(st.lists(st.one_of(st.integers(0, 5), st.floats(0, 1e6)), min_size=n, max_size=n))
    event = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    risk = draw(st.lists(st.one_of(st.integers(-3, 3), st.floats(-100, 100)), min_size=n, max_size=n))
    return np.array(time, float), np.array(event, bool), np.array(risk, float)


@tried
@given(patients(), st.sampled_from([None, np.nan, np.inf]))
def test_concordance_counts_pairs_or_is_refused(made, bad):
    time, event, risk = made
    if bad is not None and len(risk):
        risk[0] = bad
        assert at_most_refused(concordance_index, time, event, risk) is None
        return
    score = pairs = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                close = abs(risk[i] - risk[j]) <= 1e-8
                score += 0.5 if close else float(risk[i] > risk[j])
    found = at_most_refused(concordance_index, time, event, risk)
    assert (found is None) == (pairs == 0)
    if found is not None:
        assert found == pytest.approx(score / pairs) and 0 <= found <= 1
        assert concordance_index(time, event, -risk) == pytest.approx(1 - found)


@tried
@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0, 1)),
    st.randoms(use_true_random=False),
    st.floats(0, 1),
)
@example(np.zeros((2, 3)), None, 0.5)
@example(np.ones((2, 3)), None, 0.5)
def test_losses_and_risks_of_any_hazards_are_finite(hazards, chance, alpha):
    n, bins = hazards.shape
    where = torch.tensor([chance.randrange(bins) if chance else 0 for _ in range(n)])
    event = torch.tensor([chance.random() < 0.5 if chance else i % 2 == 0 for i in range(n)])
    given_hazards = torch.from_numpy(hazards)
    each = nll_loss(given_hazards, where, event, alpha, reduction="none")
    assert each.shape == (n,) and torch.isfinite(each).all() and (each >= -1e-9).all()
    assert nll_loss(given_hazards, where, event, alpha).item() == pytest.approx(each.mean().item())
    curve, risk = survival_curve(given_hazards), risk_score(given_hazards)
    assert (curve >= 0).all() and (curve <= 1).all() and (curve[:, 1:] <= curve[:, :-1]).all()
    assert (risk <= 0).all() and (risk >= -bins).all()
