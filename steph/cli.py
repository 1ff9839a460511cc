"""The command `steph`: it parses, calls, prints. Everything it does can be called from Python too."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from typer.core import TyperGroup

from steph import Refused

AGAIN = 0.05
"""Seconds after which an interruption that was dropped comes again."""


@contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    """Refusals and interruptions end in a sentence and an exit code, not in a traceback."""
    try:
        with _interruptible():
            yield
    except Refused as reason:
        print(f"steph: {reason}", file=sys.stderr)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        print(f"steph: the package {error.name} is not installed. `make env` makes the environment.", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("steph: interrupted. What is finished is kept; the same command goes on from there.", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does. Python drops what is raised while an object is being deleted: an interruption
    that comes at such a moment comes again."""
    for name in ("SIGTERM", "SIGALRM"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    before = sys.unraisablehook

    def dropped(what: Any) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt) and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            before(what)

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)  # it came too late: what it was to stop is done


class Commands(TyperGroup):
    """The commands of `steph`, each of which ends in a sentence."""

    def invoke(self, ctx: Any) -> Any:
        with ending_in_a_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
data_app = typer.Typer(no_args_is_help=True, help="Labels, features and stores of a study.")
study_app = typer.Typer(no_args_is_help=True, help="Runs of a study.")
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")

Option = typer.Option
StudyOption = Annotated[str, Option("--study", help="a study of data_manifest/, or the path of a manifest")]
DatasetsOption = Annotated[list[str] | None, Option("--dataset", help="repeat for several; default: all")]
MethodsOption = Annotated[list[str] | None, Option("--method", help="repeat for several; default: all")]
FoldsOption = Annotated[list[int] | None, Option("--fold", help="repeat for several; default: all")]
PrecisionOption = Annotated[str, Option("--precision", help="auto, fp32, fp64, bf16 or tf32")]
WorkersOption = Annotated[int | None, Option("--workers", min=1, help="processes on the CPU; default: one per core")]
DeviceOption = Annotated[str, Option("--device", help="cpu, cuda or cuda:N")]


@app.command("doctor")
def doctor(
    study: StudyOption = "demo",
    device: DeviceOption = "cpu",
    form: Annotated[Literal["text", "json"], Option("--format", help="text for people, json for programs")] = "text",
) -> None:
    """Check the environment, the machine and a study; say what is wrong and how to mend it. Exit code 1 for a FAIL."""
    from steph.book.doctor import as_json, as_text, examine

    findings = examine(study, device)
    print(as_json(findings, study, device) if form == "json" else as_text(findings))
    if any(finding.status == "FAIL" for finding in findings):
        raise typer.Exit(1)


@app.command("run")
def run_notebook(
    notebook: Annotated[str, typer.Argument(help="a notebook of notebooks/ (01_baselines or baselines), or a path")],
    parameter: Annotated[list[str] | None, Option("--parameter", "-p", help="name=value, as YAML; repeat")] = None,
    study: Annotated[str | None, Option("--study", help="short for -p study=...")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="where the executed copy goes")] = None,
) -> None:
    """Execute a notebook with parameters, all of them checked before any work."""
    from steph.book import notebooks

    chosen = dict(_assignment(text) for text in parameter or [])
    if study is not None:
        chosen["study"] = study
    print(notebooks.execute(notebooks.find(notebook), chosen, output, progress=sys.stderr.isatty()))


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise Refused(f"-p {text!r}: expected name=value, such as -p dataset=SARC.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise Refused(f"-p {text!r}: {value!r} is not a readable value.") from None


@study_app.command("run")
def study_run(
    study: StudyOption = "demo",
    dataset: DatasetsOption = None,
    method: MethodsOption = None,
    fold: FoldsOption = None,
    seed: Annotated[list[int] | None, Option("--seed", help="repeat for several; default: the study's")] = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    workers: WorkersOption = None,
) -> None:
    """Carry out the runs that are not finished yet, and print the mean C-index of all."""
    from steph.study.execute import run_all
    from steph.study.runs import Workbench, plan
    from steph.training.device import precision_for

    bench = Workbench(study)
    runs = plan(bench.study, dataset, method, fold, seed, precision_for(precision, device))
    _print_means(run_all(bench, runs, device=device, workers=workers))


@study_app.command("plan")
def study_plan(
    study: StudyOption = "demo",
    dataset: DatasetsOption = None,
    method: MethodsOption = None,
    fold: FoldsOption = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    by_method: Annotated[bool, Option("--by-method", help="hours by method too")] = False,
) -> None:
    """What runs there are and what they take, before anything starts; what no finished run tells is measured, once."""
    from steph.analysis.cost import planning
    from steph.study.runs import Workbench, plan
    from steph.training.device import check_device, precision_for

    check_device(device)
    bench = Workbench(study)
    kind = precision_for(precision, device)
    table = planning.work(bench, plan(bench.study, dataset, method, fold, None, kind))
    taken = planning.seconds(bench, table, device, kind)
    print("\n".join(planning.report(bench, table, taken, device, kind, by_method)))


@app.command("results")
def show_results(
    study: StudyOption = "demo",
    csv: Annotated[Path | None, Option("--csv", help="write all rows to this file")] = None,
) -> None:
    """Print the mean C-index of every finished run, by data set and method."""
    from steph.files.atomic import atomic_path
    from steph.study.runs import results

    table = results(study)
    if table.empty:
        raise Refused(f"study {study} has no finished run yet: steph study run --study {study}")
    if csv:
        with atomic_path(csv) as temporary:
            table.to_csv(temporary, index=False)
    _print_means(table)


def _print_means(table: Any) -> None:
    for row in table[table["problem"] != ""].itertuples():
        print(f"no C-index: {row.dataset} {row.method} fold {row.fold}: {row.problem}")
    defined = table[table["problem"] == ""]
    if len(defined):
        counts = sorted(set(defined.groupby(["dataset", "method"]).size()))
        means = defined.pivot_table(index="dataset", columns="method", values="c_index", sort=False)
        print(f"mean C-index over {', '.join(map(str, counts))} runs each")
        print(means.round(4).to_string(na_rep=""))


@app.command("export")
def export_model(
    dataset: Annotated[str, Option("--dataset", help="the target cancer")],
    out: Annotated[Path, Option("--out", help="a new folder")],
    study: StudyOption = "demo",
    method: Annotated[str, Option("--method")] = "steph",
    fold: Annotated[int, Option("--fold")] = 0,
    seed: Annotated[int | None, Option("--seed", help="default: the study's")] = None,
    drop_unused: Annotated[bool, Option("--drop-unused", help="leave out sources that no patient has in use")] = False,
    device: DeviceOption = "cpu",
    precision: Annotated[str, Option("--precision", help="that of the run; auto goes by the device")] = "auto",
) -> None:
    """Write a finished run's model to a folder that predicts without the study."""
    from steph.deploy.export import export
    from steph.study.runs import Run, Workbench
    from steph.training.device import precision_for

    bench = Workbench(study)
    run = Run(dataset, method, fold, bench.study.seed if seed is None else seed, precision_for(precision, device))
    config = export(bench, run, out, drop_unused, device)
    print(f"{out}: {config.name}")
    if config.dropped:
        print(config.dropped.text)


@app.command("predict")
def predict_patient(
    model: Annotated[Path, Option("--model", help="a folder that `steph export` made")],
    features: Annotated[list[Path] | None, Option("--features", help="a slide's feature file, .h5 or .pt")] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="more slides of the same patient")] = None,
    table: Annotated[
        Path | None, Option("--table", help="many patients: a CSV with patient_id and path, a row per slide")
    ] = None,
    out: Annotated[Path | None, Option("--out", help="a new folder for the report; with --table a CSV")] = None,
    patient: Annotated[str | None, Option("--patient", help="default: the first slide's name")] = None,
    patch_px: Annotated[
        int | None, Option("--patch-px", min=1, help="edge of a patch in level-0 pixels; default: as found")
    ] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Predict for one patient from all of the patient's slides, or for the patients of a table."""
    from steph.deploy import load_model
    from steph.deploy.report import summary, write_report
    from steph.files.atomic import atomic_path, refuse_taken

    slides = [*(features or []), *(more or [])]
    if (table is None) == (not slides):
        raise Refused("give either --features, the slides of one patient, or --table, a CSV of many.")
    if out is not None:
        refuse_taken(out)
    loaded = load_model(model, device)
    if table is not None:
        if out is None:
            raise Refused("--table needs --out, the name of a new CSV file.")
        rows = loaded.predict_table(table)
        with atomic_path(out) as temporary:
            rows.to_csv(temporary, index=False)
        print(f"{out}: {len(rows)} patients")
        return
    prediction = loaded.predict(slides, patient, patch_px)
    print(summary(prediction))
    if out is not None:
        write_report(prediction, out)
        print(f"report: {out / 'report.html'}")


@app.command("book")
def build_book(study: StudyOption = "demo", device: DeviceOption = "cpu", workers: WorkersOption = None) -> None:
    """Run what is missing, execute the notebooks, build the book."""
    from steph.book import build as book
    from steph.study.runs import Workbench

    print(book.build_book(Workbench(study), device=device, workers=workers))


@app.command("convert")
def convert_weights(
    source: Annotated[Path, typer.Argument(help="weights: the authors' .pth, or our .safetensors")],
    target: Annotated[Path, typer.Argument(help="where they go, in the format of this name's ending")],
    null: Annotated[Path | None, Option("--null", help="the null model (M_0) they were trained from")] = None,
) -> None:
    """Carry weights over from the authors' checkpoints to our files, or back; bit for bit, and no pickle is loaded."""
    from steph.deploy.checkpoints import convert

    print(f"{target}: {convert(source, target, null)}")


@data_app.command("list")
def data_list(study: StudyOption = "tcga") -> None:
    """Data sets of a study, what of their data is there, and where the rest can be had."""
    from steph.data.inventory import inventory
    from steph.data.manifest import load_study

    manifest = load_study(study)
    table = inventory(manifest)
    print(f"{manifest.title}\ndata root: {manifest.data}\n")
    rows = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for source in manifest.sources:
        gate = "gated; " if source.gated else ""
        print(f"\n{source.name}: {source.provides}\n  {source.address}\n  {gate}licence: {source.licence}")


@data_app.command("fetch")
def data_fetch(
    study: StudyOption = "tcga",
    dataset: DatasetsOption = None,
    source: Annotated[
        list[str] | None, Option("--source", help="labels, splits or features; repeat; default: all")
    ] = None,
    out: Annotated[Path | None, Option("--out", help="default: the study's data root")] = None,
) -> None:
    """Download from the manifest's sources, compare with their checksums, unpack; goes on where it stopped."""
    from steph.data.fetch import fetch
    from steph.data.manifest import load_study

    for fetched in fetch(load_study(study), dataset, source, out):
        print(f"{fetched.path}: {fetched.note}")


@data_app.command("labels")
def data_labels(
    cdr: Annotated[Path, Option("--cdr", help="TCGA-CDR table, .csv or .xlsx")],
    slides: Annotated[Path, Option("--slides", help="slide list (text or CSV), or a folder of feature files")],
    out: Annotated[Path | None, Option("--out", help="default: labels/ of the study's data root")] = None,
    study: StudyOption = "tcga",
) -> None:
    """Build the label tables of a study from TCGA-CDR."""
    from steph.data.labels import build_labels
    from steph.data.manifest import load_study

    manifest = load_study(study)
    summary = build_labels(manifest, cdr, slides, out or manifest.data / "labels")
    print(summary.to_string(index=False))
    for reason, count in summary.attrs["dropped"].items():
        print(f"left out: {count} slide(s): {reason}")
    for row in summary[summary["matches"].eq(False)].itertuples():
        print(f"{row.dataset}: these counts are not those of the study's manifest; is the slide list complete?")


@data_app.command("check")
def data_check(study: StudyOption = "tcga", dataset: DatasetsOption = None) -> None:
    """List every slide file that cannot be used, and why; check the content of stores that are there."""
    from steph.data.dataset import check_dataset
    from steph.data.features import problems_message
    from steph.data.manifest import load_study
    from steph.data.store import Store

    manifest, unusable = load_study(study), 0
    for name in dataset or manifest.datasets:
        table = check_dataset(manifest, name)
        problems = (table["problem"] != "").sum()
        unusable += problems
        print(problems_message(table) if problems else f"{name}: {len(table)} slides, all usable")
        store = manifest.data / "stores" / f"{name}.h5"
        if store.is_file():
            Store.open(store).verify()
            print(f"{name}: the store holds what was packed")
    if unusable:
        raise typer.Exit(1)


@data_app.command("pack")
def data_pack(
    study: StudyOption = "tcga",
    dataset: DatasetsOption = None,
    allow_missing: Annotated[bool, Option(help="leave out missing slides of patients who keep one")] = False,
) -> None:
    """Pack slide feature files into one store per data set; it can be interrupted and goes on."""
    from steph.data.dataset import pack_dataset
    from steph.data.manifest import load_study

    manifest = load_study(study)
    for name in dataset or manifest.datasets:
        print(f"{name}: {pack_dataset(manifest, name, allow_missing).path}")


if __name__ == "__main__":
    app()
