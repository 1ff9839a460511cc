"""No patient twice in a study: patient ids that stand in two data sets, and slide content under two names."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import NamedTuple

from steph import Refused
from steph.data.cohort import read_cohort
from steph.data.manifest import Study
from steph.data.store import Store
from steph.files.tables import shortened


class Twice(NamedTuple):
    """Somebody, or a slide, that is there twice. leaks: runs are refused for it. found: who and where. fix: what to
    do."""

    leaks: bool
    found: str
    fix: str


def find_twice(study: Study, names: Collection[str] = ()) -> Iterator[Twice]:
    """What stands twice in a study, as far as its label tables and stores are there and can be read; nothing is made.

    Patient ids are compared in one spelling (`steph.data.cohort.patient_ids`). Slides are compared by the
    hash of their features and coordinates in the stores (`steph.data.store`): bit for bit, so a slide that was
    extracted twice with other patches is not found. names: report only what concerns one of these data sets.
    """
    places: dict[str, list[str]] = defaultdict(list)
    slides: dict[bytes, dict[tuple[str, str], str]] = defaultdict(dict)  # by content: slide and patient -> data set
    for name in study.datasets:
        with suppress(Refused):  # what is missing or cannot be read, the checks of files say
            cohort = read_cohort(study.data / "labels" / f"{name}.csv", name)
            for patient in cohort.slides_of:
                places[patient].append(name)
            store = Store.open(study.data / "stores" / f"{name}.h5")
            for slide, patient in cohort.slides[["slide_id", "patient_id"]].itertuples(index=False):
                if slide in store.places:
                    content = store.hashes[store.places[slide][0]].tobytes()
                    slides[content].setdefault((slide, patient), name)
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient, in_sets in places.items():
        shared[tuple(in_sets)].append(patient)
    for where, patients in shared.items():
        if len(where) > 1 and (not names or {*where} & {*names}):
            found = f"{len(patients)} patient id(s) stand in {' and '.join(where)}: {shortened(patients)}"
            yield Twice(True, f"{found}. Runs whose models trained on those who test them are refused", remedy(*where))
    same = [
        shortened([f"{slide} of patient {patient} ({name})" for (slide, patient), name in group.items()], 3)
        for group in slides.values()
        if len(group) > 1 and (not names or {*group.values()} & {*names})
    ]
    if same:
        yield Twice(
            False,
            f"{len(same)} slide(s) stand under two names or patients, with the same features at the same places: "
            f"{'; '.join(same[:5])}{f'; and {len(same) - 5} more' if len(same) > 5 else ''}",
            "If it is one patient, give one patient_id and keep one of the rows; if a file bears a wrong name, put the "
            "right one there and pack again (`steph data pack`)",
        )


def remedy(*names: str) -> str:
    """What to do about patients whom these data sets share."""
    return (
        f"Drop them from the labels of {' or '.join(dict.fromkeys(names))}, or make one data set of both; where one id "
        "means two people, give them ids that tell them apart"
    )
