"""Whether labels can be what they say: follow-up in numbers, and what makes one doubt its unit or its projects."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np

from steph import Refused
from steph.data.cohort import Cohort, read_cohort
from steph.data.manifest import Network, Study
from steph.files.tables import shortened
from steph.survival import bin_index

UNITS = {"months": 30.44, "years": 365.25}
"""What may have been written in place of days, and how many days it has."""
MOSTLY, FEW = 0.9, 8
"""Times are doubted from this share of patients in one interval on; not of fewer patients than this."""


def cohorts_of(study: Study, names: Iterable[str] = ()) -> list[Cohort]:
    """The cohorts of data sets whose label tables are there and can be read. names: of data sets; none: all."""
    cohorts = []
    for name in names or study.datasets:
        with suppress(Refused):  # the checks of files say what is missing or cannot be read
            cohorts.append(read_cohort(study.data / "labels" / f"{name}.csv", name))
    return cohorts


def follow_up(cohort: Cohort, network: Network) -> str:
    """Events, follow-up and how many of a network's intervals somebody's follow-up ends in, as text."""
    times, events = cohort.patients["time_days"], int(cohort.patients["event"].sum())
    filled = len(np.unique(bin_index(times, network.n_bins, network.bin_width_days)))
    days = f"followed for {times.median():.0f} days (median), {times.max():.0f} (longest)"
    return f"{events} events, {days}, {filled} of {network.n_bins} intervals filled"


def doubts(study: Study, cohorts: Iterable[Cohort]) -> Iterator[tuple[str, str]]:
    """What is to be looked at in labels, and what to do about it: projects that the manifest does not name; a project
    whose times are hardly days, as nearly all lie in one interval or nobody was followed for a year."""
    for cohort in cohorts:
        patients, projects = cohort.slides.drop_duplicates("patient_id"), study.entry(cohort.dataset).projects
        if unknown := sorted({*cohort.slides["project"]} - {*projects}):
            found = f"{cohort.dataset}: its labels have project {shortened([name or '(none)' for name in unknown])}"
            yield f"{found}, the manifest {', '.join(projects)}", "Correct the table, or projects in the manifest"
        for project, times in patients.groupby("project", sort=False)["time_days"]:
            intervals = np.bincount(bin_index(times, study.network.n_bins, study.network.bin_width_days))
            most, longest = intervals.argmax(), times.max()
            if len(times) < FEW or (intervals[most] < MOSTLY * len(times) and longest >= UNITS["years"]):
                continue
            likely = [unit for unit, days in UNITS.items() if 2 * UNITS["years"] < days * longest < 40 * UNITS["years"]]
            found = f"{cohort.dataset}: {intervals[most]} of {len(times)} patients of project {project} lie in interval"
            found += f" {most + 1} of {study.network.n_bins}, and the longest follow-up is {longest:g} days"
            asked = f" (are these {' or '.join(likely)}?)" if likely else ""
            remedy = "".join(f"If they are {unit}, multiply them by {UNITS[unit]}. " for unit in likely)
            yield found + asked, f"{remedy}If they are days, choose shorter intervals (network: bin_width_days)"
