"""A drafted manifest says what the files say, and passes the check of its data."""

import pandas as pd
import pytest

from steph import Refused
from steph.data.cohort import cohort_from
from steph.data.draft import draft
from steph.data.manifest import load_study
from tests.helpers.command import steph as call
from tests.helpers.fabricate import fabricate


@pytest.fixture
def clinic(tmp_path, monkeypatch):
    """Slides in TRIDENT's layout below a job's folder, and a table in months without a project."""
    rows = [(f"P{i:03}", f"P{i:03}-A", "GASTRIC", 30.44 * (i + 1), i % 2) for i in range(20)]
    table = pd.DataFrame(rows, columns=["patient_id", "slide_id", "project", "time_days", "event"])
    fabricate(cohort_from(table, "GASTRIC", "here"), tmp_path / "job", "trident", 8, 5)
    months = table.assign(time_days=range(1, 21)).drop(columns="project").rename(columns={"time_days": "time"})
    months.to_csv(tmp_path / "months.csv", index=False)
    monkeypatch.delenv("STEPH_DATA", raising=False)
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    monkeypatch.chdir(tmp_path)
    return table


def test_a_drafted_study_passes_the_check_of_its_data(clinic, tmp_path):
    options = ["--dataset", "GASTRIC", "--features", "job", "--labels", "months.csv"]
    done = call("init", "clinic.yaml", *options, "--endpoint", "OS", "--unit", "months")
    assert done.exit_code == 0 and "steph data check --study clinic.yaml" in done.output, done.output
    study = load_study(tmp_path / "clinic.yaml")
    assert study.features.dim == 8 and study.endpoint.name == "OS" and study.data == tmp_path / "clinic"
    assert "One data set" in done.output
    written = pd.read_csv(study.data / "labels" / "GASTRIC.csv")
    assert written["time_days"].tolist() == pytest.approx(clinic["time_days"].tolist())
    done = call("data", "check", "--study", "clinic.yaml")
    assert done.exit_code == 0 and "20 slides, all usable" in done.output, done.output
    assert "is there already" in call("init", "clinic.yaml", *options, "--endpoint", "OS", "--unit", "days").output


def test_what_nobody_can_know_is_refused(clinic, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="no slide files"):
        draft(tmp_path / "a.yaml", [("A", tmp_path / "empty", tmp_path / "months.csv")], "OS", "days")
    assert not list(tmp_path.glob("a*"))
