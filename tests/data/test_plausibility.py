"""Labels that cannot be what they say: times that are no days, projects that nobody named."""

import numpy as np
import pandas as pd
import pytest

from steph.data.cohort import COLUMNS, cohort_from
from steph.data.manifest import Network, Study
from steph.data.plausibility import cohorts_of, doubts, follow_up

DAYS = np.random.default_rng(0).integers(60, 4000, 24)


def study(width=365, **more):
    datasets = {"GASTRIC": {"projects": ["GASTRIC", "ESCA"]}, "OESO": {"projects": ["OESO"]}}
    return Study(
        name="small", title="small", features={"encoder": "any", "dim": 4}, datasets=datasets,
        network=Network(bin_width_days=width), **more,
    )  # fmt: skip


def cohort(times, projects=("GASTRIC",)):
    rows = [(f"P{i}", f"S{i}", projects[i % len(projects)], time, i % 2) for i, time in enumerate(times)]
    return cohort_from(pd.DataFrame(rows, columns=COLUMNS), "GASTRIC", "here")


def test_follow_up_in_words():
    text = "2 events, followed for 400 days (median), 1100 (longest), 4 of 32 intervals filled"
    assert follow_up(cohort([30, 400, 300, 1100, 800]), Network()) == text


@pytest.mark.parametrize("width", [365, 90])
@pytest.mark.parametrize(
    ("days", "unit", "found"),
    [(30.44, "months", "127.6 days (are these months?)"), (365.25, "years", "10.6 days (are these years?)")],
)
def test_months_and_years_are_recognised(days, unit, found, width):
    times = (DAYS / days).round(1)
    assert list(doubts(study(width), [cohort(DAYS)])) == []
    ((text, fix),) = doubts(study(width), [cohort(times)])
    assert text.startswith("GASTRIC: ") and text.endswith(f"the longest follow-up is {found}")
    assert ("24 of 24 patients of project GASTRIC lie in interval 1 of 32" in text) == (width == 365 or days > 100)
    assert fix.startswith(f"If they are {unit}, multiply them by {days}. If they are days, choose shorter intervals")
    assert list(doubts(study(width), [cohort(times * days)])) == []


def test_one_project_in_months_among_days_is_named():
    mixed = [time / 30.44 if i % 2 else time for i, time in enumerate([*DAYS, *DAYS])]
    ((text, _),) = doubts(study(), [cohort(mixed, ("GASTRIC", "ESCA"))])
    assert "24 of 24 patients of project ESCA" in text


def test_short_times_may_be_either_and_hours_are_neither():
    ((text, fix),) = doubts(study(), [cohort(np.linspace(1, 36, 20))])
    assert "(are these months or years?)" in text and fix.count("multiply") == 2
    ((text, fix),) = doubts(study(), [cohort(DAYS * 24 + 9000)])
    assert "lie in interval 32 of 32" in text and "multiply" not in fix


def test_projects_that_the_manifest_does_not_name_are_told():
    (found, fix), *more = doubts(study(), [cohort(DAYS, ("STAD", "GASTRIC", ""))])
    assert found == "GASTRIC: its labels have project (none), STAD, the manifest GASTRIC, ESCA" and "projects" in fix
    assert not more


def test_tables_that_cannot_be_read_are_passed_over(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "GASTRIC.csv").write_text("nonsense")
    cohort(DAYS).slides.to_csv(tmp_path / "labels" / "OESO.csv", index=False)
    small = study(data_root=str(tmp_path))
    assert [c.dataset for c in cohorts_of(small)] == ["OESO"] and cohorts_of(small, ["GASTRIC"]) == []
