"""Labels: the outcomes of TCGA-CDR joined to a list of slides, one cohort table per data set of a study.

TCGA-CDR (Liu et al., Cell 2018;173:400-416) has one row per patient: ``bcr_patient_barcode``, ``type`` (the project)
and, for each endpoint (DSS, OS, PFI, DFI), 1 = event, 0 = censored, and the time in days.
"""

from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

import pandas as pd

from steph import Refused
from steph.data.cohort import ENDINGS, cohort_from, slide_ids, write_cohort
from steph.data.features import files_in
from steph.data.manifest import Study
from steph.files.tables import read_csv, read_text, shortened

SHEET = "TCGA-CDR"
MISSING = ["", "#N/A", "NA", "NaN", "nan"]
BARCODE = r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}"
SLIDE = rf"{BARCODE}(-[A-Z0-9]+)*(\.[A-Za-z0-9-]+)?"  # X_patches, X_mask are other files of slide X
FROZEN = rf"{BARCODE}-\d{{2}}[A-Z]-\d{{2}}-[TBM]S"  # top, bottom, middle section; diagnostic slides say DX there


def build_labels(study: Study, cdr: Path, slides: Path, out: Path, names: Sequence[str] = ()) -> pd.DataFrame:
    """Write ``<out>/<data set>.csv`` (columns of `steph.data.cohort`, by patient, then slide) for a study's data sets;
    a data set that none of the slides belongs to gets no file.

    cdr: TCGA-CDR as CSV or xlsx. slides: see `read_slides`. names: of data sets; none: all. Returns one row per
    data set: dataset, patients, slides, events, survival_rate_pct (patients without an event), slides_dropped (slides
    of its projects without a label), the manifest's numbers as expected_patients, expected_slides,
    expected_survival_rate_pct, and `matches` (all three agree; missing where the manifest has none).
    ``.attrs["dropped"]`` counts the dropped slides by reason.
    Raises `Refused` as `label_slides` does, and where no slide at all gets a label.
    """
    chosen = {name: study.entry(name) for name in names or study.datasets}
    matched = label_slides(study, cdr, slides).sort_values(["patient_id", "slide_id"])
    ours, all_of = ({p for entry in of.values() for p in entry.projects} for of in (chosen, study.datasets))
    matched = matched[~matched["project"].isin(all_of - ours)]
    dropped = matched["dropped"] != ""
    reasons = matched.loc[dropped, "dropped"].value_counts().to_dict()
    if dropped.all():
        counts = "; ".join(f"{reason}: {n}" for reason, n in reasons.items())
        raise Refused(
            f"none of the {len(matched)} slides of {slides} gets a label from {cdr} in {', '.join(chosen)} of study "
            f"{study.name}: {counts}. Are the slide list and the study's projects those of the same cancers?"
        )
    # All data sets are checked before the first is written, so a refusal leaves no half of the labels behind.
    cohorts, rows = [], []
    for name, entry in chosen.items():
        of_projects = matched["project"].isin(entry.projects)
        labelled = matched[of_projects & ~dropped]
        if len(labelled):
            cohorts.append(cohort_from(labelled, name, f"{cdr} with {slides}"))
        events = labelled.drop_duplicates("patient_id")["event"]
        row = {
            "dataset": name,
            "patients": len(events),
            "slides": len(labelled),
            "events": int(events.sum()),
            "survival_rate_pct": round(100 * (1 - events.mean()), 1),
            "slides_dropped": int((of_projects & dropped).sum()),
        }
        expected = entry.model_dump(include={"patients", "slides", "survival_rate_pct"})
        matches = None if None in expected.values() else all(row[key] == value for key, value in expected.items())
        rows.append(row | {f"expected_{key}": value for key, value in expected.items()} | {"matches": matches})
    for cohort in cohorts:
        write_cohort(cohort, out / f"{cohort.dataset}.csv")
    summary = pd.DataFrame(rows).astype(
        {"expected_patients": "Int64", "expected_slides": "Int64", "matches": "boolean"}
    )
    summary.attrs["dropped"] = reasons
    return summary


def label_slides(study: Study, cdr: Path, slides: Path) -> pd.DataFrame:
    """One row per listed slide: slide_id, patient_id, project, time_days, event (1 = event), dropped: empty for a slide
    with a label in the study, else the reason. Time 0 and redacted rows of TCGA-CDR are kept.

    Raises `Refused` as `read_outcomes` and `read_slides` do, and where the slide list's project contradicts TCGA-CDR's.
    """
    outcomes = read_outcomes(cdr, study.endpoint.name)
    table = read_slides(slides).rename(columns={"project": "listed"})
    # The first 12 characters of a slide's barcode are its patient.
    table = table.assign(patient_id=table["slide_id"].str[:12], dropped="").join(outcomes, on="patient_id")
    groups = {project: name for name, entry in study.datasets.items() for project in entry.projects}
    # Feature archives say BRCA_IDC or TCGA-BRCA for BRCA; the name of a data set (KIPAN) stands for its projects.
    project = table["listed"].str.removeprefix("TCGA-").str.split("_").str[0]
    comparable = (project != "") & table["project"].notna()
    wrong = table[comparable & (project != table["project"]) & (project != table["project"].map(groups))]
    if len(wrong):
        pairs = [f"{r.slide_id} (listed {r.listed}, TCGA-CDR {r.project})" for r in wrong.itertuples()]
        raise Refused(f"{slides}: {len(wrong)} slide(s) of another project than TCGA-CDR says: {shortened(pairs)}.")
    for reason, applies in (
        (f"{study.endpoint.name} unknown", table["event"].isna() | table["time_days"].isna()),
        ("project not in the study", ~table["project"].isin(groups)),
        ("patient not in TCGA-CDR", table["project"].isna()),
        ("frozen section, not a diagnostic slide", table["slide_id"].str.match(FROZEN)),
        ("no slide by its name, but another file of its folder", ~table["slide_id"].str.fullmatch(SLIDE)),
    ):
        table.loc[applies, "dropped"] = reason  # the last reason that applies is the one nearest to the slide
    return table.drop(columns="listed")


def read_outcomes(cdr: Path, endpoint: str) -> pd.DataFrame:
    """Outcomes by patient barcode (the index): project, event (1, 0 or missing), time_days (or missing).

    Raises `Refused` for a missing or unreadable file, missing columns, an event that is not 0 or 1, a time that is no
    number or negative, and a patient who stands twice with different outcomes.
    """
    if not cdr.is_file():
        raise Refused(f"no TCGA-CDR table at {cdr}. `steph data list --study tcga` tells where it can be had.")
    if cdr.suffix.lower() == ".xlsx":
        try:
            table = pd.read_excel(cdr, sheet_name=SHEET, dtype=str, engine="openpyxl")
        except Exception as error:  # A damaged file makes zip, XML and openpyxl raise nearly anything.
            expected = "Expected TCGA-CDR-SupplementalTableS1.xlsx; if it is that, download it again."
            raise Refused(f"{cdr}: no sheet {SHEET} that can be read ({error}). {expected}") from None
    else:
        table = read_csv(cdr)
        table = table.mask(table.isin(MISSING))
    names = {"bcr_patient_barcode": "patient_id", "type": "project", endpoint: "event", f"{endpoint}.time": "time_days"}
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise Refused(
            f"{cdr}: no column {', '.join(missing)}; found {', '.join(map(str, table.columns))}. Expected the outcome "
            f"table of TCGA-CDR (sheet {SHEET}) with {', '.join(names)}."
        )
    table = table[list(names)].rename(columns=names).dropna(how="all").apply(lambda column: column.str.strip())
    nameless = table.index[table["patient_id"].isna() | table["project"].isna()]
    if len(nameless):
        rows = shortened([str(row + 2) for row in nameless])
        raise Refused(f"{cdr}: no bcr_patient_barcode or no type in row(s) {rows}.")
    numbers = table[["event", "time_days"]].apply(pd.to_numeric, errors="coerce")
    for column, valid, expected in (
        ("event", numbers["event"].isin([0, 1]), f"{endpoint} is not 1 (event), 0 (censored)"),
        ("time_days", numbers["time_days"].between(0, 1e6), f"{endpoint}.time is not days, 0 or more,"),
    ):
        bad = table[table[column].notna() & ~valid]
        if len(bad):
            values = shortened([f"{patient} {value!r}" for patient, value in bad[["patient_id", column]].to_numpy()])
            raise Refused(f"{cdr}: {len(bad)} row(s) whose {expected} or empty: {values}.")
    table = table.assign(**numbers).drop_duplicates()
    twice = table.loc[table["patient_id"].duplicated(), "patient_id"].unique()
    if len(twice):
        raise Refused(f"{cdr}: {len(twice)} patient(s) with several, different rows: {shortened(list(twice))}.")
    return table.set_index("patient_id")


def read_slides(path: Path) -> pd.DataFrame:
    """The slide list, in its order: slide_id, project (as the list says it, else "").

    path: a text file with a slide id, a file name or a path per line; a CSV with a column slide_id or pathology_id and
    perhaps project; or a folder of slides or feature files, searched with its subfolders, in which a slide may have
    several files (other encoders', coordinates in ``*_patches.h5``). Raises `Refused` for a missing, unreadable or
    empty list, one without slides of TCGA or, if it is no folder, with anything else, and a slide that stands twice.
    """
    if path.is_dir():
        files = [file.name for file in files_in([path]) if file.suffix.lower().lstrip(".") in ENDINGS.split()]
        table = pd.DataFrame({"slide_id": sorted(name for name in files if not name.startswith("."))}, dtype=str)
    elif not path.is_file():
        raise Refused(f"no slide list at {path}. Give a text file or CSV of slides, or the folder of feature files.")
    elif path.suffix.lower() == ".csv":
        table = read_csv(path).rename(columns={"pathology_id": "slide_id"})
        if list(table.columns).count("slide_id") != 1:
            raise Refused(f"{path}: expected one column slide_id (or pathology_id); found {', '.join(table.columns)}.")
    else:
        lines = read_text(path).splitlines()
        table = pd.DataFrame({"slide_id": [line for line in lines if line.strip()]}, dtype=str)
    names = table["slide_id"].map(lambda name: PureWindowsPath(name.strip()).name)  # which knows both kinds of slashes
    ids = slide_ids(names)
    table = table.assign(slide_id=ids, project=table["project"].str.strip() if "project" in table else "")
    table = table[~ids.str.endswith("_patches")][["slide_id", "project"]]
    if table.empty:
        raise Refused(f"{path} lists no slides. Expected a slide per line, or .h5 / .pt files in a folder.")
    ids = table["slide_id"]
    strange = [repr(name) for name in ids[~ids.str.match(rf"{BARCODE}(?:[-.]|$)")]]
    if strange and (len(strange) == len(ids) or not path.is_dir()):
        raise Refused(
            f"{path}: {len(strange)} of {len(ids)} entries are no TCGA barcodes: {shortened(strange)}. Expected "
            "names like TCGA-3C-AALI-01Z-00-DX1.<UUID>. A cohort of your own needs no TCGA-CDR: write its label table."
        )
    twice = list(ids[ids.duplicated()].unique())
    if twice and not path.is_dir():
        raise Refused(f"{path}: {len(twice)} slide(s) stand twice: {shortened(twice)}. Keep one of each.")
    return table.drop_duplicates("slide_id", ignore_index=True)
