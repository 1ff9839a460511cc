"""No patient twice in a study: told by `steph data check` and `steph doctor`, refused by runs."""

import json
import shutil

import pandas as pd
import pytest
import yaml

from steph.data.cohort import COLUMNS, cohort_from
from steph.data.manifest import load_study
from steph.data.twice import find_twice
from tests.helpers.command import steph
from tests.helpers.fabricate import fabricate

PATIENTS = {"KIRC": range(0, 14), "KIPAN": range(8, 22), "LIHC": range(30, 44)}  # the first two share six


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that makes a real study in miniature of some numbers of patients, labels and slide files in place; it
    returns the manifest's path."""
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("STEPH_DATA", raising=False)

    def make(patients=PATIENTS):
        for name, numbers in patients.items():
            rows = [(f"P{i:02}", f"{name}-{i:02}-S{s}", name, 100 * i + 9, i % 2) for i in numbers for s in range(2)]
            table = pd.DataFrame(rows, columns=COLUMNS)
            labels_of(name).parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(labels_of(name), index=False)
            fabricate(cohort_from(table, name, "made"), tmp_path / "data" / "features", "mahmoodlab", 4, 10)
        values = {
            "extends": "tcga", "name": "overlapping", "data_root": str(tmp_path / "data"), "folds": 2,
            "features": {"dim": 4}, "steph": {"top_k": 1},
            "datasets": {name: {"projects": [name]} for name in patients},
        }  # fmt: skip
        (tmp_path / "overlapping.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "overlapping.yaml"

    def labels_of(name):
        return tmp_path / "data" / "labels" / f"{name}.csv"

    make.labels_of = labels_of
    return make


def checked(manifest, *more):
    """Exit code and output of `steph data check`."""
    done = steph("data", "check", "--study", manifest, *more)
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def doctors(manifest):
    """Status and text of what the doctor says of patients."""
    report = json.loads(steph("doctor", "--study", manifest, "--format", "json").stdout)
    return [(f["status"], f["found"]) for f in report["findings"] if f["check"] == "patients"]


def test_patients_in_two_data_sets_fail_the_check_and_the_doctor_and_runs_are_refused(study):
    manifest, message = study(), "6 patient id(s) stand in KIRC and KIPAN: P08, P09, P10, P11, P12, and 1 more. "
    code, output = checked(manifest)
    assert code == 1 and f"\n{message}" in output and output.count("all usable") == 3
    assert "Drop them from the labels of KIRC or KIPAN, or make one data set of both" in output
    assert [checked(manifest, "--dataset", name)[0] for name in PATIENTS] == [1, 1, 0]
    assert [(status, found.startswith(message)) for status, found in doctors(manifest)][:1] == [("FAIL", True)]

    assert steph("data", "pack", "--study", manifest).exit_code == 0
    done = steph("study", "run", "--study", manifest, "--dataset", "KIRC", "--method", "model_average")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "have trained the model of KIPAN, fold 0" in done.output and "Drop them from the labels of" in done.output


def test_ids_are_compared_in_one_spelling_and_by_case(study):
    manifest = study({"KIRC": range(9), "KIPAN": range(8, 20), "LIHC": range(8, 12)})
    for name, old, new in (("KIPAN", "P08,", " P0\u200b8\u00a0,"), ("LIHC", "P", "p")):
        table = study.labels_of(name)
        table.write_text(table.read_text().replace(f"\n{old}", f"\n{new}"))
    assert [each.found.split(".")[0] for each in find_twice(load_study(manifest))] == [
        "1 patient id(s) stand in KIRC and KIPAN: P08"
    ]


def test_who_stands_in_three_is_told_once(study):
    manifest = study({"KIRC": range(9), "KIPAN": range(7, 20), "LIHC": range(8, 12)})
    code, output = checked(manifest)
    assert code == 1 and output.count("P08") == 1 and "1 patient id(s) stand in KIRC and KIPAN and LIHC: P08." in output
    assert "3 patient id(s) stand in KIPAN and LIHC: P09, P10, P11." in output


def test_the_same_slide_under_two_names_is_a_warning_once_it_is_packed(study, tmp_path):
    manifest = study({"KIRC": range(8), "LIHC": range(30, 38)})
    features = tmp_path / "data" / "features" / "TCGA"
    for source, copy in (("LIHC-31-S0", "LIHC-31-S1"), ("KIRC-02-S1", "LIHC-30-S0")):
        shutil.copy(features / f"TCGA-{source[:4]}" / f"{source}.h5", features / f"TCGA-{copy[:4]}" / f"{copy}.h5")
    code, output = checked(manifest)
    assert code == 0 and output.count("all usable") == 2
    assert "the same features; is one a copy? (LIHC-31-S0, LIHC-31-S1)" in output
    assert doctors(manifest)[0][0] == "PASS"

    assert steph("data", "pack", "--study", manifest).exit_code == 0
    code, output = checked(manifest)
    (line,) = [line for line in output.splitlines() if line.startswith("2 slide(s) stand under two names or patients")]
    assert code == 0 and output.count("the store holds what was packed") == 2
    assert "KIRC-02-S1 of patient P02 (KIRC), LIHC-30-S0 of patient P30 (LIHC); LIHC-31-S0 of patient P31" in line
    assert "give one patient_id" in line and "`steph data pack`" in line
    assert doctors(manifest)[:1] == [("WARN", line.split(". If it is")[0])]
    assert "1 slide(s) stand" in checked(manifest, "--dataset", "KIRC")[1]


def test_what_cannot_be_read_does_not_hide_the_rest(study, tmp_path):
    manifest = study()
    assert steph("data", "pack", "--study", manifest).exit_code == 0
    (tmp_path / "data" / "stores" / "KIRC.h5").write_bytes(b"no store")
    code, output = checked(manifest)
    assert code == 1 and "6 patient id(s) stand in KIRC and KIPAN" in output and "not a whole feature store" in output
    study.labels_of("LIHC").unlink()
    study.labels_of("KIPAN").write_text("patient_id,time_days\nP08,1\n")
    code, output = checked(manifest, "--dataset", "KIPAN")
    assert code == 1 and "stand in" not in output and "KIPAN.csv: no column slide_id" in output
    assert doctors(manifest)[0][0] == "PASS"
