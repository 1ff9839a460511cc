"""Splits: patient-level, stratified, balanced, the same again; files checked against the cohort."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steph import Refused
from steph.data.cohort import COLUMNS, cohort_from
from steph.data.splits import load_splits, make_splits


def cohort_of(events, times=None, name="SARC"):
    """Patients P000, P001, ...; every third has two slides."""
    labels = enumerate(zip(times or range(len(events)), events, strict=True))
    rows = [(f"P{i:03}", f"P{i:03}-DX{k}", "SARC", *of) for i, of in labels for k in range(1 + (i % 3 == 0))]
    return cohort_from(pd.DataFrame(rows, columns=COLUMNS), name, "test")


@pytest.fixture
def cohort():
    return cohort_of([1, 0, 0, 1, 0] * 4 + [0, 1])


@settings(max_examples=60)
@given(data=st.data(), n_folds=st.integers(2, 6), seed=st.integers(0, 2**32))
def test_folds_are_balanced_in_size_events_and_follow_up(data, n_folds, seed):
    events = [1] * n_folds + data.draw(st.lists(st.integers(0, 1), max_size=40))
    times = data.draw(st.lists(st.integers(0, 9), min_size=len(events), max_size=len(events)))
    cohort = cohort_of(events, times)
    table = make_splits(cohort, n_folds, seed).merge(cohort.patients, on="patient_id", validate="one_to_one")
    by_fold = table.groupby("fold")["event"]
    assert sorted(by_fold.groups) == list(range(n_folds))
    assert sorted(table["patient_id"]) == sorted(cohort.patients["patient_id"])
    assert by_fold.size().max() - by_fold.size().min() <= 1
    assert by_fold.sum().max() - by_fold.sum().min() <= 1
    # In each stratum, the patients with the shortest follow-up spread over the folds too.
    ordered = table[table["event"]].sort_values(["time_days", "patient_id"])["fold"]
    for start in range(0, len(ordered) - n_folds + 1, n_folds):
        assert sorted(ordered.iloc[start : start + n_folds]) == list(range(n_folds))


def test_the_same_patients_and_seed_give_the_same_folds_in_any_row_order(cohort):
    table = make_splits(cohort, 5, 42)
    shuffled = cohort_from(cohort.slides.sample(frac=1, random_state=3), "SARC", "test")
    pd.testing.assert_frame_equal(make_splits(shuffled, 5, 42), table)
    assert not make_splits(cohort, 5, 43)["fold"].equals(table["fold"])


@pytest.mark.parametrize(("events", "n_folds"), [([1, 1, 1, 1, 0, 0, 0], 5), ([1, 1, 1], 1)])
def test_a_cohort_too_small_for_its_folds_is_refused(events, n_folds):
    message = rf"{sum(events)} events among {len(events)} patients do not make {n_folds} folds"
    with pytest.raises(Refused, match=message):
        make_splits(cohort_of(events), n_folds, 42)


@pytest.mark.parametrize("fold", [-1, 5, "0", None])
def test_a_fold_outside_the_range_is_refused(fold, cohort, tmp_path):
    splits = load_splits(cohort, tmp_path, 5, 42)
    for of in (splits.train, splits.test):
        with pytest.raises(Refused, match=r"there is no fold .*: its folds are 0 to 4"):
            of(fold)


OURS = {
    "unknown patient": (lambda t: pd.concat([t, t.tail(1).assign(patient_id="P999")]), r"1 patient.*not in .*P999"),
    "patient twice": (lambda t: pd.concat([t, t.head(1)]), r"1 patient\(s\) listed twice: P000"),
    "patient missing": (lambda t: t[2:], r"2 patient\(s\) of the cohort SARC who are missing: P000, P001"),
    "fold 5": (lambda t: t.replace({"fold": {"4": "5"}}), r"in fold '5'.*folds 0 to 4"),
    "from 1": (lambda t: t.assign(fold=(t["fold"].astype(int) + 1).astype(str)), r"Number them from 0, not from 1\.$"),
    "10 folds": (lambda t: t.assign(fold=[str(i % 10) for i in range(len(t))]), r"change `folds` in the manifest"),
    "fold 1.5": (lambda t: t.replace({"fold": {"4": "1.5"}}), r"in fold '1\.5'.*folds 0 to 4"),
    "empty test": (lambda t: t.replace({"fold": {"4": "3"}}), r"nobody tests fold 4"),
    "empty train": (lambda t: t.assign(fold="0"), r"nobody trains fold 0"),
    "no column": (lambda t: t.rename(columns={"fold": "part"}), r"no column fold; found patient_id, part"),
}


def test_a_fold_that_changed_by_itself_is_noticed(cohort, tmp_path):
    load_splits(cohort, tmp_path, 5, 42)
    text = (tmp_path / "SARC.csv").read_text().strip()
    (tmp_path / "SARC.csv").write_text(f"{text[:-1]}{(int(text[-1]) + 1) % 5}\n")
    with pytest.raises(Refused, match=r"SARC\.csv is not the table that was written.*delete .*SARC\.csv\.sha256"):
        load_splits(cohort, tmp_path, 5, 42)


def released(cohort, folder, names=("train", "val", "test"), n_folds=5):
    """The authors' layout: an index column, columns of different lengths padded with blanks."""
    patients = np.array(list(cohort.slides_of))
    folder.mkdir(parents=True)
    for k in range(n_folds):
        held, rest = patients[k::n_folds], np.delete(patients, np.s_[k::n_folds])
        columns = [rest[3:], rest[:3], held] if len(names) == 3 else [rest, held]
        table = pd.DataFrame({name: pd.Series(values) for name, values in zip(names, columns, strict=True)})
        table.to_csv(folder / f"splits_{k}.csv")


@pytest.mark.parametrize("columns", [["train", "val", "test"], ["train", "test"], ["train", "val"]])
@pytest.mark.parametrize("folder", ["SARC", "tcga_sarc"])
def test_the_authors_files_are_used_and_val_patients_beside_a_test_set_are_set_aside(folder, columns, cohort, tmp_path):
    load_splits(cohort, tmp_path, 5, 42)  # ours is there as well; the authors' count
    released(cohort, tmp_path / folder, columns)
    splits, patients = load_splits(cohort, tmp_path, 5, 42), list(cohort.slides_of)
    assert splits.origin == "authors" and splits.n_folds == 5
    for k in range(5):
        assert splits.test(k) == patients[k::5]
        rest = [patient for patient in patients if patient not in patients[k::5]]
        assert splits.train(k) == rest[3 * (len(columns) == 3) :]


def put(column, row, value):
    def change(table):
        table.loc[row, column] = value
        return table

    return change


def nobody_tests(table):
    held = pd.concat([table["val"].dropna(), table["test"].dropna()], ignore_index=True)
    return pd.DataFrame({"train": table["train"], "val": held, "test": None})


AUTHORS = {
    "unknown patient": (put("val", 3, "TCGA-XX-0000"), r"1 patient\(s\) who are not in the cohort SARC: TCGA-XX-0000"),
    "train and test": (put("test", 10, "P021"), r"1 patient\(s\) who train and are held out as well: P021"),
    "train and val": (put("val", 10, "P021"), r"1 patient\(s\) who train and are held out as well: P021"),
    "val and test": (put("val", 10, "P002"), r"1 patient\(s\) listed twice: P002"),
    "twice": (put("train", 30, "P021"), r"1 patient\(s\) listed twice: P021"),
    "missing": (put("test", 0, ""), r"1 patient\(s\) of the cohort SARC who are missing: P002"),
    "no test": (nobody_tests, r"nobody tests"),
    "no train column": (lambda t: t.rename(columns={"train": "fit"}), r"no column train; found .*fit, val, test"),
}


BAD = {"SARC.csv": OURS, "SARC/splits_2.csv": AUTHORS}


@pytest.mark.parametrize(("file", "case"), [(file, case) for file, cases in BAD.items() for case in cases])
def test_a_bad_file_is_refused(file, case, cohort, tmp_path):
    spoil, message = BAD[file][case]
    path = tmp_path / file
    if file == "SARC.csv":
        make_splits(cohort, 5, 42).to_csv(path, index=False)
    else:
        released(cohort, tmp_path / "SARC")
    spoil(pd.read_csv(path, dtype=str)).to_csv(path, index=False)
    with pytest.raises(Refused, match=message) as refused:
        load_splits(cohort, tmp_path, 5, 42)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("n_files", "repeats", "message"),
    [
        (3, 1, r"splits_2\.csv.*; expected splits_0\.csv to splits_4\.csv"),
        (10, 1, r"splits_2\.csv.*; expected splits_0\.csv to splits_4\.csv"),
        (5, 2, r"SARC holds the authors' splits, one cross-validation.*repeats it 2 times"),
    ],
)
def test_another_number_of_the_authors_files_is_refused(n_files, repeats, message, cohort, tmp_path):
    released(cohort, tmp_path / "SARC", n_folds=n_files)
    with pytest.raises(Refused, match=message):
        load_splits(cohort, tmp_path, 5, 42, repeats=repeats)


# ------------------------------------------------------------------------------------------------ repeats


def test_in_each_repeat_every_patient_tests_once_and_trains_otherwise_in_table_order(cohort, tmp_path):
    cohort = cohort_from(cohort.slides.sample(frac=1, random_state=3), "SARC", "test")
    splits, order = load_splits(cohort, tmp_path, 5, 42, repeats=3), list(cohort.slides_of)
    assert splits.n_folds == 15
    for repeat in range(3):
        folds = range(5 * repeat, 5 * repeat + 5)
        assert sorted(patient for k in folds for patient in splits.test(k)) == sorted(order)
        for k in folds:
            train, test = splits.train(k), splits.test(k)
            assert sorted(train + test) == sorted(order)
            assert train == [p for p in order if p in train] and test == [p for p in order if p in test]
        alone = load_splits(cohort, tmp_path / f"alone{repeat}", 5, 42 + repeat)
        assert splits.folds[folds.start : folds.stop] == alone.folds
    assert len({frozenset(splits.test(k)) for k in range(15)}) == 15


def test_splits_are_written_once_and_reused_and_more_repeats_leave_them_as_they_are(cohort, tmp_path):
    once = load_splits(cohort, tmp_path, 5, 42)
    written = (tmp_path / "SARC.csv").read_bytes()
    again = load_splits(cohort, tmp_path, 5, 7)  # another seed: what is written counts
    assert (once.origin, again.origin, once.n_folds) == ("ours", "ours", 5)
    assert once.folds == again.folds and once.fingerprint == again.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SARC.csv", "SARC.csv.sha256"]
    assert load_splits(cohort, tmp_path / "other", 5, 7).fingerprint != once.fingerprint
    three = load_splits(cohort, tmp_path, 5, 42, repeats=3)
    assert three.folds[:5] == once.folds
    assert (tmp_path / "SARC.csv").read_bytes() == written
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["SARC.csv", "SARC.repeat1.csv", "SARC.repeat2.csv"]
    assert set(pd.read_csv(tmp_path / "SARC.repeat2.csv")["fold"]) == set(range(10, 15))
    again = load_splits(cohort, tmp_path, 5, 42)  # and fewer repeats look at fewer files
    assert again.fingerprint == once.fingerprint
    assert load_splits(cohort, tmp_path, 5, 7, repeats=3).folds == three.folds  # what is written counts


def test_the_folds_of_a_seed_and_their_fingerprint_do_not_change(tmp_path):
    """Keys of finished runs stand on them."""
    cohort = cohort_of([1, 0] * 10)
    assert "".join(map(str, make_splits(cohort, 5, 42)["fold"])) == "42243011033204102341"
    assert load_splits(cohort, tmp_path, 5, 42).fingerprint == "4a44e2958480"


def test_a_repeat_with_folds_of_another_is_refused(cohort, tmp_path):
    load_splits(cohort, tmp_path, 5, 42)
    (tmp_path / "SARC.repeat1.csv").write_bytes((tmp_path / "SARC.csv").read_bytes())
    with pytest.raises(Refused, match=r"SARC\.repeat1\.csv: P000 in fold '\d'.*folds 5 to 9 there"):
        load_splits(cohort, tmp_path, 5, 42, repeats=2)


MEMBER = st.sampled_from([*(f"P{i:03}" for i in range(6)), "", "P9", " P001", "p001"])


@given(
    st.permutations(range(6)), st.lists(st.tuples(MEMBER, st.sampled_from(["0", "1", "2", "x", "", "1.0"])), max_size=3)
)
def test_a_file_of_folds_divides_the_cohort_or_is_refused(order, more):
    cohort = cohort_of([0, 1] * 3, name="X")
    rows = [(f"P{i:03}", str(k % 2)) for k, i in enumerate(order)] + more
    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame(rows, columns=["patient_id", "fold"]).to_csv(Path(folder) / "X.csv", index=False)
        if more:
            with pytest.raises(Refused, match=r"X\.csv"):
                load_splits(cohort, Path(folder), 2, 0)
            return
        splits = load_splits(cohort, Path(folder), 2, 0)
    for fold in range(2):
        assert sorted(splits.train(fold) + splits.test(fold)) == list(cohort.slides_of)
        assert set(splits.test(fold)) == {patient for patient, of in rows if of == str(fold)}


def test_ids_and_folds_are_read_as_spreadsheets_write_them(cohort, tmp_path):
    made = load_splits(cohort, tmp_path, 5, 42)
    table = pd.read_csv(tmp_path / "SARC.csv", dtype=str)
    (tmp_path / "SARC.csv.sha256").unlink()
    table.assign(patient_id="\u200b" + table["patient_id"] + "\u00a0", fold=table["fold"] + ".0").to_csv(
        tmp_path / "SARC.csv"
    )
    assert load_splits(cohort, tmp_path, 5, 42).fingerprint == made.fingerprint


def test_authors_files_numbered_from_1_are_told(cohort, tmp_path):
    released(cohort, tmp_path / "SARC")
    for k in reversed(range(5)):
        (tmp_path / "SARC" / f"splits_{k}.csv").rename(tmp_path / "SARC" / f"splits_{k + 1}.csv")
    with pytest.raises(Refused, match=r"expected splits_0\.csv to splits_4\.csv.*Number them from 0, not from 1\.$"):
        load_splits(cohort, tmp_path, 5, 42)
