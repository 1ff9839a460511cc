"""The command `steph`: it parses, calls, prints. Everything it does can be called from Python too."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Exit, Option, Typer
from typer.core import TyperGroup

from steph import Refused, __version__


@contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    """Refusals and interruptions (Ctrl-C and SIGTERM) end in a sentence and an exit code, not in a traceback."""
    code = 1
    try:
        with _interruptible():
            yield
        return
    except Refused as reason:
        sentence = str(reason)
    except ModuleNotFoundError as error:
        sentence = f"the package {error.name} is not installed. `make env` makes the environment."
    except KeyboardInterrupt:
        code, sentence = 130, "interrupted. What is finished is kept; the same command goes on from there."
    print(f"steph: {sentence}", file=sys.stderr)
    raise Exit(code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does. Python drops what is raised while an object is being deleted: an interruption
    that comes at such a moment comes again."""
    timed = hasattr(signal, "setitimer")  # not on Windows
    for number in (signal.SIGTERM, signal.SIGALRM) if timed else (signal.SIGTERM,):
        signal.signal(number, signal.default_int_handler)
    before = sys.unraisablehook

    def dropped(what: Any) -> None:
        if timed and issubclass(what.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            before(what)

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)  # it came too late: what it was to stop is done


class Commands(TyperGroup):
    """The commands of `steph`, each of which ends in a sentence."""

    def invoke(self, ctx: Any) -> Any:
        with ending_in_a_sentence():
            return super().invoke(ctx)


app = Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
data_app = Typer(no_args_is_help=True, help="Labels, features and stores of a study.")
study_app = Typer(no_args_is_help=True, help="Runs of a study.")
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")


def _version(asked: bool) -> None:
    if asked:
        print(f"steph {__version__}")
        raise Exit


@app.callback()
def options(
    version: Annotated[bool, Option("--version", is_eager=True, callback=_version, help="print it and end")] = False,
) -> None:
    """Options of the command itself."""


Names = list[str] | None
Paths = list[Path] | None
Study = Annotated[str, Option("--study", help="a study of data_manifest/, or the path of a manifest")]
Datasets = Annotated[Names, Option("--dataset", help="repeat for several; default: all")]
Methods = Annotated[Names, Option("--method", help="repeat for several; default: all")]
Folds = Annotated[list[int] | None, Option("--fold", help="repeat for several; default: all")]
Precision = Annotated[str, Option("--precision", help="auto, fp32, fp64, bf16 or tf32")]
Workers = Annotated[int | None, Option("--workers", min=1, help="processes on the CPU; default: all usable cores")]
Device = Annotated[str, Option("--device", help="cpu, cuda or cuda:N")]
Content = Annotated[bool, Option("--content/--headers", help="read slide files whole, or their headers alone")]
Pixels = Annotated[int | None, Option(min=1, help="edge of a patch in level-0 pixels; default: as found")]
NEXT = ("data check", "data pack", "study plan", "study run")
Table = Annotated[Path | None, Option(help="many patients: a CSV with patient_id and path, a row per slide")]


@app.command("doctor", epilog="Example: steph doctor --study tcga --dataset SARC --device cuda")
def doctor(
    study: Study = "demo",
    dataset: Datasets = None,
    device: Device = "cpu",
    form: Annotated[Literal["text", "json"], Option("--format", help="text for people, json for programs")] = "text",
) -> None:
    """Check the environment, the machine and a study; say what is wrong and how to mend it. Exit code 1 for a FAIL."""
    from steph.book.doctor import as_json, as_text, examine

    findings = examine(study, device, dataset or ())
    print(as_json(findings, study, device) if form == "json" else as_text(findings))
    if any(finding.status == "FAIL" for finding in findings):
        raise Exit(1)


@app.command(
    "init",
    epilog="Example: steph init clinic.yaml --dataset GASTRIC --features h5 --labels a.csv --unit days --endpoint OS",
)
def init_study(
    manifest: Annotated[Path, Argument(help="the manifest to be written, such as clinic.yaml")],
    dataset: Annotated[list[str], Option(help="name of a data set; repeat, with --features and --labels, for several")],
    features: Annotated[list[Path], Option(help="its folder of slide files, .h5 or .pt")],
    labels: Annotated[list[Path], Option(help="its table: patient_id, slide_id, time_days, event")],
    endpoint: Annotated[str, Option(prompt="Endpoint (DSS, OS, PFI, ...)", help="what an event is, such as DSS or OS")],
    unit: Annotated[Literal["days", "months", "years"], Option(prompt="Unit of the times", help="of the times")],
    encoder: Annotated[str | None, Option(help="where the files do not name it")] = None,
) -> None:
    """Write a study's manifest, and its label tables in days, from folders of slide files and tables of follow-up."""
    from steph.data.draft import draft

    if manifest.suffix not in {".yaml", ".yml"}:
        raise Refused(f"{manifest}: a manifest's name ends in .yaml.")
    if not len(dataset) == len(features) == len(labels):
        raise Refused("give --dataset, --features and --labels equally often, in the same order.")
    cohorts = list(zip(dataset, features, labels, strict=True))
    print("\n".join([*draft(manifest, cohorts, endpoint, unit, encoder), f"{manifest}: written. Now:"]))
    print("\n".join(f"  steph {words} --study {shlex.quote(str(manifest))}" for words in NEXT))


@app.command("run", epilog="Example: steph run 01_baselines --study tcga --dataset SARC --device cuda -p folds=0,1")
def run_notebook(
    notebook: Annotated[str, Argument(help="a notebook of notebooks/ (01_baselines or baselines), or a path")],
    parameter: Annotated[Names, Option("--parameter", "-p", help="name=value, as YAML; repeat")] = None,
    study: Annotated[str | None, Option(help="short for -p study=...")] = None,
    dataset: Annotated[str | None, Option(help="short for -p dataset=...")] = None,
    device: Annotated[str | None, Option(help="short for -p device=...")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="where the executed copy goes")] = None,
) -> None:
    """Execute a notebook with parameters, all of them checked before any work."""
    from steph.book import notebooks

    chosen = dict(map(notebooks.assignment, parameter or []))
    for name, value in {"study": study, "dataset": dataset, "device": device}.items():
        if value is not None and chosen.setdefault(name, value) != value:
            raise Refused(f"--{name} {value} and -p {name}={chosen[name]} contradict each other: give one.")
    print(notebooks.execute(notebooks.find(notebook), chosen, output))


@study_app.command("run", epilog="Example: steph study run --study tcga --dataset SARC --method steph --fold 0")
def study_run(
    study: Study = "demo",
    dataset: Datasets = None,
    method: Methods = None,
    fold: Folds = None,
    seed: Annotated[list[int] | None, Option(help="repeat for several; default: the study's")] = None,
    device: Device = "cpu",
    precision: Precision = "auto",
    workers: Workers = None,
) -> None:
    """Carry out the runs that are not finished yet, and print the mean C-index of all."""
    from steph.data.plausibility import cohorts_of, doubts
    from steph.study.execute import Workbench, plan, run_all

    bench = Workbench(study, device, precision)
    runs = plan(bench, dataset, method, fold, seed)
    for doubt, fix in doubts(bench.study, cohorts_of(bench.study, {run.dataset for run in runs})):
        print(f"{doubt}. {fix}.", file=sys.stderr)
    _print_means(run_all(bench, runs, workers))


@study_app.command("plan", epilog="Example: steph study plan --study tcga --dataset SARC --by-method")
def study_plan(
    study: Study = "demo",
    dataset: Datasets = None,
    method: Methods = None,
    fold: Folds = None,
    device: Device = "cpu",
    precision: Precision = "auto",
    by_method: Annotated[bool, Option("--by-method", help="hours by method too")] = False,
) -> None:
    """What runs there are and what they take, before anything starts; what no finished run tells is measured, once."""
    from steph.analysis.cost import planning
    from steph.study.runs import Workbench, plan
    from steph.training.device import check_device

    check_device(device)
    bench = Workbench(study, device, precision)
    table = planning.work(bench, plan(bench, dataset, method, fold))
    print("\n".join(planning.report(bench, table, planning.seconds(bench, table), by_method)))


@app.command("results", epilog="Example: steph results --study tcga --dataset SARC --method vanilla --method steph")
def show_results(
    study: Study = "demo",
    dataset: Datasets = None,
    method: Methods = None,
    csv: Annotated[Path | None, Option(help="write a row per run, of every seed, to this file")] = None,
) -> None:
    """Print mean C-indices of the finished runs of the study's seed, on folds that all methods of a table have."""
    from steph.data.manifest import refuse_unknown
    from steph.study.runs import Workbench, results

    bench = Workbench(study)
    table = results(bench)
    if table.empty:
        raise Refused(f"study {study} has no finished run yet: steph study run --study {study}")
    for column, names in (("dataset", dataset), ("method", method)):
        refuse_unknown(column, names or (), list(table[column].unique()), f"the finished runs of study {study}")
        table = table[table[column].isin(names)] if names else table
    if csv:
        _write(table, csv)
    of_seed = table[table["seed"] == bench.study.seed]
    _print_means(of_seed if len(of_seed) else table)
    if others := len(table) - len(of_seed):
        print(f"{others} runs of other seeds than {bench.study.seed}: --csv writes them too")


def _write(table: Any, path: Path) -> None:
    from steph.files.atomic import atomic_path

    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def _print_means(table: Any) -> None:
    from steph.study.health import notes
    from steph.study.tables import BELOW, like_with_like

    for note in notes(table):
        print(note)
    for row in table[table["problem"] != ""].itertuples():
        print(f"no C-index: {row.dataset} {row.method} fold {row.fold}: {row.problem}")
    for folds, means in like_with_like(table):
        print(f"\nmean C-index on {folds}\n{means.to_string(line_width=100)}")
    print(f"{BELOW}: worse than a coin")


@app.command("export", epilog="Example: steph export --study demo --dataset BRCA --method steph --fold 0 --out brca")
def export_model(
    dataset: Annotated[str, Option(help="the target cancer")],
    out: Annotated[Path, Option(help="a new folder")],
    study: Study = "demo",
    method: Annotated[str, Option(help="the method whose model is taken")] = "steph",
    fold: Annotated[int, Option(help="the fold whose model is taken")] = 0,
    seed: Annotated[int | None, Option(help="default: the study's")] = None,
    drop_unused: Annotated[bool, Option("--drop-unused", help="leave out sources that no patient has in use")] = False,
    device: Device = "cpu",
    precision: Annotated[str, Option(help="that of the run; auto goes by the device")] = "auto",
) -> None:
    """Write a finished run's model to a folder that predicts without the study."""
    from steph.deploy.export import export
    from steph.study.runs import Workbench

    bench = Workbench(study, device, precision)
    config = export(bench, bench.run_of(dataset, method, fold, seed), out, drop_unused)
    print(f"{out}: {config.name}")
    if config.dropped:
        print(config.dropped.text)


@app.command("predict", epilog="Example: steph predict --model brca --features slide.h5 --out report")
def predict_patient(
    model: Annotated[Path, Option(help="a folder that `steph export` made")],
    features: Annotated[Paths, Option(help="a slide's feature file, .h5 or .pt")] = None,
    more: Annotated[Paths, Argument(help="more slides of the same patient")] = None,
    table: Table = None,
    out: Annotated[Path | None, Option(help="a new folder for the report; with --table a CSV")] = None,
    patient: Annotated[str | None, Option(help="default: the first slide's name")] = None,
    patch_px: Pixels = None,
    device: Device = "cpu",
) -> None:
    """Predict for one patient from all of the patient's slides, or for the patients of a table."""
    from steph.deploy import load_model
    from steph.deploy.report import summary, write_report
    from steph.files.atomic import refuse_taken

    slides = [*(features or []), *(more or [])]
    if (table is None) == (not slides):
        raise Refused("give either --features, the slides of one patient, or --table, a CSV of many.")
    if out is not None:
        refuse_taken(out)
    elif table is not None:
        raise Refused("--table needs --out, the name of a new CSV file.")
    loaded = load_model(model, device)
    if table is not None and out is not None:
        rows = loaded.predict_table(table)
        _write(rows, out)
        print("\n".join([f"{out}: {len(rows)} patients", *loaded.config.warnings]))
        return
    prediction = loaded.predict(slides, patient, patch_px)
    print(summary(prediction))
    if out is not None:
        write_report(prediction, out)
        print(f"report: {out / 'report.html'}")


@app.command("book", epilog="Example: steph book --study demo --workers 2")
def build_book(study: Study = "demo", device: Device = "cpu", workers: Workers = None) -> None:
    """Run what is missing, execute the notebooks, build the book."""
    from steph.book import build as book
    from steph.study.runs import Workbench

    print(book.build_book(Workbench(study, device), workers))


@app.command("convert", epilog="Example: steph convert authors.pth own.safetensors --null null.pth")
def convert_weights(
    source: Annotated[Path, Argument(help="weights: the authors' .pth, or our .safetensors")],
    target: Annotated[Path, Argument(help="where they go, in the format of this name's ending")],
    null: Annotated[Path | None, Option(help="the null model (M_0) they were trained from")] = None,
) -> None:
    """Carry weights over from the authors' checkpoints to our files, or back; bit for bit, and no pickle is loaded."""
    from steph.deploy.checkpoints import convert

    print(f"{target}: {convert(source, target, null)}")


@data_app.command("list", epilog="Example: steph data list --study tcga")
def data_list(study: Study = "demo") -> None:
    """Data sets of a study, what of their data is there, and where the rest can be had."""
    from steph.data.inventory import inventory
    from steph.data.manifest import load_study

    manifest = load_study(study)
    print(f"{manifest.title}\ndata root: {manifest.data}\n")
    rows = inventory(manifest).T.reset_index().T  # the names of columns as the first row
    padded = rows.apply(lambda column: column.str.ljust(column.str.len().max()))
    print("\n".join("  ".join(row).rstrip() for row in padded.to_numpy()))
    for source in manifest.sources:
        gate = "gated; " if source.gated else ""
        print(f"\n{source.name}: {source.provides}\n  {source.address}\n  {gate}licence: {source.licence}")


@data_app.command("fetch", epilog="Example: steph data fetch --study tcga --dataset SARC --source features")
def data_fetch(
    study: Study = "demo",
    dataset: Datasets = None,
    source: Annotated[Names, Option(help="labels, splits or features; repeat; default: all")] = None,
    out: Annotated[Path | None, Option(help="default: the study's data root")] = None,
) -> None:
    """Download from the manifest's sources, compare with their checksums, unpack; goes on where it stopped."""
    from steph.data.fetch import fetch
    from steph.data.manifest import load_study

    for path, note in fetch(load_study(study), dataset, source, out).items():
        print(f"{path}: {note}")


@data_app.command("labels", epilog="Example: steph data labels --study tcga --cdr cdr.xlsx --slides slides.txt")
def data_labels(
    cdr: Annotated[Path, Option(help="TCGA-CDR table, .csv or .xlsx")],
    slides: Annotated[Path, Option(help="slide list (text or CSV), or a folder of slides or feature files")],
    study: Study = "demo",
    dataset: Datasets = None,
    out: Annotated[Path | None, Option(help="default: labels/ of the study's data root")] = None,
) -> None:
    """Build the label tables of a study from TCGA-CDR."""
    from steph.data.labels import build_labels
    from steph.data.manifest import load_study

    manifest = load_study(study)
    summary = build_labels(manifest, cdr, slides, out or manifest.data / "labels", dataset or ())
    print(summary.to_string(index=False))
    for reason, count in summary.attrs["dropped"].items():
        print(f"left out: {count} slide(s): {reason}")
    for dataset in summary.loc[summary["matches"].eq(False), "dataset"]:
        print(f"{dataset}: these counts are not those of the study's manifest; is the slide list complete?")


@data_app.command("check", epilog="Example: steph data check --study clinic.yaml --dataset GASTRIC")
def data_check(study: Study = "demo", dataset: Datasets = None, content: Content = True) -> None:
    """List who stands in two data sets and every slide file that cannot be used; check the content of stores."""
    from steph.data.dataset import check_dataset, open_dataset
    from steph.data.manifest import load_study
    from steph.data.plausibility import cohorts_of, doubts, follow_up
    from steph.data.preflight import problems_message
    from steph.data.twice import find_twice

    manifest, unusable = load_study(study), False
    cohorts = cohorts_of(manifest, dataset or ())
    for cohort in cohorts:
        print(f"{cohort.dataset}: {len(cohort)} patients, {follow_up(cohort, manifest.network)}")
    for doubt, fix in doubts(manifest, cohorts):
        print(f"{doubt}. {fix}.")
    for twice in find_twice(manifest, dataset or ()):
        print(f"{twice.found}. {twice.fix}.")
        unusable |= twice.leaks
    for name in dataset or manifest.datasets:
        try:
            if not manifest.synthetic:
                table = check_dataset(manifest, name, content)
                problems = problems_message(table)
                unusable |= bool(problems)
                lines = problems or f"{len(table)} slides, all usable", *table.attrs["remarks"]
                print("\n".join(f"{name}: {line}" for line in lines))
            if (manifest.data / "stores" / f"{name}.h5").is_file():
                open_dataset(manifest, name, write=False).store.verify()
                print(f"{name}: the store holds what was packed")
        except Refused as reason:
            unusable = True
            print(f"{name}: {reason}")
    if unusable:
        raise Exit(1)


@data_app.command("pack", epilog="Example: steph data pack --study clinic.yaml --allow-missing")
def data_pack(
    study: Study = "demo",
    dataset: Datasets = None,
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
