"""steph.data.dataset: bags, labels and risks keep to their patients, whatever the order."""

import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from steph import Refused
from steph.data import dataset as datasets
from steph.data import patients as readers
from steph.data.bags import sampled
from steph.data.cohort import read_cohort, write_cohort
from steph.data.dataset import check_dataset, dataset_fingerprint, feature_folders, open_dataset, pack_dataset
from steph.data.features import find_slides
from steph.data.manifest import Study
from tests.data.test_features import DIM, cohort_of, write_h5
from tests.helpers.fabricate import fabricate, read

SLIDES = 2


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A real study in miniature: 12 patients of one data set with two projects, labels and slide files in place."""
    monkeypatch.setenv("STEPH_DATA", str(tmp_path))
    cohort = cohort_of(12, SLIDES)
    cohort.slides.loc[cohort.slides.index >= 10, "project"] = "LUSC"
    write_cohort(cohort, tmp_path / "labels/LUNG.csv")
    fabricate(cohort, tmp_path / "features", "mahmoodlab", DIM, 30)
    return Study.model_validate(
        {
            "name": "mini",
            "title": "in miniature",
            "folds": 3,
            "features": {
                "encoder": "UNI2-h", "dim": DIM, "precision": "float16", "folders": ["features/TCGA/TCGA-{project}*"],
            },
            "datasets": {"LUNG": {"projects": ["LUAD", "LUSC"]}, "BLCA": {"projects": ["BLCA"]}},
        }
    )  # fmt: skip


@pytest.fixture
def dataset(study):
    pack_dataset(study, "LUNG")
    return open_dataset(study, "LUNG")


# ------------------------------------------------------------------------------------------------ alignment


def test_a_bag_is_the_patients_slides_in_table_order(study, dataset):
    files = find_slides(feature_folders(study, "LUNG"))
    for patient in dataset.cohort.slides_of:
        values, coords = zip(*(read(files[f"{patient}-DX{s}.AB-{patient[1:]}{s}"]) for s in range(SLIDES)), strict=True)
        batch = dataset.batch([patient], coords=True)
        expected = torch.from_numpy(np.concatenate(values).astype(np.float16).astype(np.float32))
        assert torch.equal(batch.features, expected)
        assert np.array_equal(batch.coords, np.concatenate(coords))
        assert np.diff(batch.slide_offsets).tolist() == [len(of_slide) for of_slide in values]


def test_any_order_and_repetition_gives_each_patient_the_same_bag_and_label(dataset):
    alone = {p: dataset.batch([p], coords=True) for p in dataset.cohort.slides_of}
    order = [*np.random.default_rng(0).permutation(list(alone)).tolist(), "P3", "P3"]
    batch, labels = dataset.batch(order, coords=True), dataset.labels(order)
    assert labels["patient_id"].tolist() == order and dataset.n_patches(order).tolist() == batch.sizes
    table = dataset.cohort.slides.drop_duplicates("patient_id").set_index("patient_id")
    for i, patient in enumerate(order):
        bag = batch.single(i)
        assert torch.equal(bag.features, alone[patient].features) and torch.equal(bag.coords, alone[patient].coords)
        assert bag.slide_offsets == alone[patient].slide_offsets
        assert labels["time_days"][i] == table["time_days"][patient] == 100 * (int(patient[1:]) + 1)
        assert labels["event"][i] == table["event"][patient]
    assert labels["event"].dtype == bool


def test_a_batch_is_a_copy_in_the_precision_asked_for(dataset):
    for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
        batch = dataset.batch(["P1"], dtype=dtype)
        assert batch.features.dtype == dtype
        batch.features.zero_()  # Would crash or spoil the store were it the map.
    assert dataset.batch(["P1"]).features.abs().sum() > 0
    dataset.store.verify()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_batch_on_the_gpu_is_the_same(dataset):
    order = ["P5", "P0"]
    there, here = dataset.batch(order, device="cuda"), dataset.batch(order)
    assert there.features.is_cuda and torch.equal(there.features.cpu(), here.features)


def test_unknown_patients_are_refused(dataset):
    for ask in (dataset.batch, dataset.labels, dataset.n_patches):
        with pytest.raises(Refused, match="no patient NOBODY"):
            ask(["P1", "NOBODY"])
    with pytest.raises(Refused, match="no patient given"):
        dataset.batch([])


def test_slides_left_out_are_listed_and_not_in_the_bag(study):
    gone = next(iter(find_slides(feature_folders(study, "LUNG")).values()))
    gone.unlink()
    problems = check_dataset(study, "LUNG").set_index("slide_id")["problem"]
    assert len(problems) == 24 and problems[problems != ""].to_dict() == {gone.stem: "missing"}
    with pytest.raises(Refused, match=f"missing: 1 slide.*\n.*{gone.stem}"):
        pack_dataset(study, "LUNG")
    pack_dataset(study, "LUNG", allow_missing=True)
    dataset = open_dataset(study, "LUNG")
    patient = gone.stem.split("-")[0]
    assert dataset.slides(patient) == [s for s in dataset.cohort.slides_of[patient] if s != gone.stem]
    assert dataset.batch([patient]).sizes == dataset.n_patches([patient]).tolist()


# ------------------------------------------------------------------------------------------------ sampling


def test_sampling_takes_the_same_patches_in_order_each_time(study, dataset):
    everyone = list(dataset.cohort.slides_of)
    limit = int(np.median(dataset.n_patches(everyone)))
    again = open_dataset(study, "LUNG")
    turned = again.batch(everyone[::-1], coords=True, max_patches=limit)
    cut = 0
    for i, patient in enumerate(everyone):
        whole = dataset.batch([patient], coords=True)
        part = dataset.batch([patient], coords=True, max_patches=limit)
        assert part.sizes == [min(limit, len(whole.features))]
        assert torch.equal(part.features, turned.bag(len(everyone) - 1 - i))
        if len(whole.features) <= limit:  # untouched, bit for bit
            assert torch.equal(part.features, whole.features) and torch.equal(part.coords, whole.coords)
            assert part.slide_offsets == whole.slide_offsets
            continue
        cut += 1
        kept = sampled(len(whole.features), limit, study.seed, patient)
        assert (np.diff(kept) > 0).all()
        assert torch.equal(part.features, whole.features[kept]) and torch.equal(part.coords, whole.coords[kept])
        slide = np.searchsorted(whole.slide_offsets, kept, side="right")
        assert part.slide_offsets == (0, *np.cumsum(np.unique(slide, return_counts=True)[1]).tolist())
    assert 0 < cut < len(everyone)
    single = dataset.batch(everyone, coords=True, max_patches=1)
    assert single.sizes == [1] * 12 and single.slide_offsets == single.offsets, "a slide without a patch is none"


def test_what_is_sampled_depends_on_seed_and_patient_alone():
    one = sampled(1000, 100, 42, "P1").tolist()
    assert one == sampled(1000, 100, 42, "P1").tolist()
    assert len({tuple(one), tuple(sampled(1000, 100, 43, "P1")), tuple(sampled(1000, 100, 42, "P2"))}) == 3
    counts = np.bincount(np.concatenate([sampled(50, 10, 0, f"P{i}") for i in range(2000)]), minlength=50)
    assert abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8), "every patch has the same chance"


def test_slides_without_coordinates_are_refused_by_name(study, dataset):
    dataset.check_coords(list(dataset.cohort.slides_of), "Patch-GCN")
    for path in find_slides(feature_folders(study, "LUNG")).values():
        if path.stem.startswith("P3-DX1"):
            features, _ = read(path)
            write_h5(path, features=features, coords=None)
    pack_dataset(study, "LUNG")
    dataset = open_dataset(study, "LUNG")
    dataset.check_coords(["P1", "P2"], "Patch-GCN")
    with pytest.raises(Refused, match=r"Patch-GCN needs patches' coordinates, and 1 of 4 slides of LUNG have.*P3-DX1"):
        dataset.check_coords(["P2", "P3"], "Patch-GCN")


# ------------------------------------------------------------------------------------------------ opening


def test_splits_labels_and_fingerprint(study, dataset, tmp_path):
    assert sorted(dataset.splits.train(0) + dataset.splits.test(0)) == sorted(dataset.cohort.slides_of)
    assert dataset.external is None and dataset.oracle is None
    assert open_dataset(study, "LUNG").fingerprint == dataset_fingerprint(study, "LUNG") == dataset.fingerprint
    written = [path.rename(path.with_suffix(".away")) for path in (tmp_path / "splits").iterdir()]
    assert dataset_fingerprint(study, "LUNG") == dataset.fingerprint
    assert sorted((tmp_path / "splits").iterdir()) == sorted(written), "asking for the fingerprint has written splits"
    table = pd.read_csv(tmp_path / "labels/LUNG.csv")
    table.loc[table["patient_id"] == "P4", "time_days"] += 1
    table.to_csv(tmp_path / "labels/LUNG.csv", index=False)
    with pytest.raises(Refused, match=r"LUNG\.csv is not the table that was written"):
        open_dataset(study, "LUNG")
    (tmp_path / "labels/LUNG.csv.sha256").unlink()
    assert open_dataset(study, "LUNG").fingerprint != dataset.fingerprint


def test_missing_files_are_named_with_the_command_that_makes_them(study, tmp_path):
    with pytest.raises(Refused, match="steph data pack --study mini --dataset LUNG") as refused:
        open_dataset(study, "LUNG")
    assert str(tmp_path / "stores/LUNG.h5") in str(refused.value)
    with pytest.raises(Refused, match="steph data labels") as refused:
        open_dataset(study, "BLCA")
    assert str(tmp_path / "labels/BLCA.csv") in str(refused.value)
    with pytest.raises(Refused, match="Did you mean LUNG"):
        open_dataset(study, "LUNGS")
    write_cohort(cohort_of(3, name="BLCA", project="BLCA"), tmp_path / "labels/BLCA.csv")
    for ask in (pack_dataset, check_dataset):
        with pytest.raises(Refused, match=r"no slide feature files of BLCA.*TCGA-\{project\}"):
            ask(study, "BLCA")


def test_a_store_of_other_files_is_refused_and_packed_anew(study, dataset, tmp_path):
    path = next(iter(find_slides(feature_folders(study, "LUNG")).values()))
    write_h5(path, n=99)
    with pytest.raises(Refused, match="1 source file") as refused:
        open_dataset(study, "LUNG")
    assert "steph data pack --study mini --dataset LUNG" in str(refused.value)
    pack_dataset(study, "LUNG")
    again = open_dataset(study, "LUNG")
    assert again.store.bag([path.stem]).shape == (99, DIM) and again.fingerprint != dataset.fingerprint
    (tmp_path / "features").rename(tmp_path / "away")
    assert open_dataset(study, "LUNG").fingerprint == again.fingerprint, "features may be removed after packing"
    other = study.model_copy(update={"features": study.features.model_copy(update={"encoder": "CONCH"})})
    with pytest.raises(Refused, match="encoder is UNI2-h, the study says CONCH"):
        open_dataset(other, "LUNG")


def test_a_store_knows_its_content_not_only_names_and_sizes(study, dataset, tmp_path):
    files = find_slides(feature_folders(study, "LUNG"))
    first = next(iter(files))
    with h5py.File(files[first], "a") as file:  # extracted again, by other weights: the same size
        size, file["features"][...] = files[first].stat().st_size, file["features"][...] + 1
    assert files[first].stat().st_size == size
    with pytest.raises(Refused, match=f"1 source file.*{first}"):
        open_dataset(study, "LUNG")
    again = pack_dataset(study, "LUNG")
    assert np.array_equal(again.bag([first]), read(files[first])[0].astype(np.float16))
    assert open_dataset(study, "LUNG").store.fingerprint == again.fingerprint != dataset.store.fingerprint


def in_folders(study, *folders, **features):
    changed = study.features.model_copy(update={"folders": list(folders), **features})
    return study.model_copy(update={"features": changed})


def test_other_folders_are_noticed_whether_their_files_are_there_or_not(study, dataset, tmp_path):
    copy, other, gone = (in_folders(study, f"{name}/TCGA/TCGA-{{project}}*") for name in ("copy", "other", "gone"))
    shutil.copytree(tmp_path / "features", tmp_path / "copy")
    assert open_dataset(copy, "LUNG").fingerprint == dataset.fingerprint, "moved, with the same content"
    fabricate(dataset.cohort, tmp_path / "other", "mahmoodlab", DIM, 30, seed=9)
    with pytest.raises(Refused, match="24 source file"):
        open_dataset(other, "LUNG")
    with pytest.raises(Refused, match=r"folders is \['features/.*the study says \['gone/"):
        open_dataset(gone, "LUNG")
    with pytest.raises(Refused, match="overlap_px is 0, the study says 64"):
        open_dataset(in_folders(study, *study.features.folders, overlap_px=64), "LUNG")
    assert pack_dataset(other, "LUNG").fingerprint != dataset.store.fingerprint


def test_two_studies_of_one_data_root_do_not_replace_each_others_stores(study, dataset):
    other = in_folders(study, *study.features.folders, precision="float32").model_copy(update={"name": "second"})
    with pytest.raises(Refused, match="precision is float16, the study says float32"):
        open_dataset(other, "LUNG")
    with pytest.raises(Refused, match=r"study mini packed .* for itself.*data root of its own"):
        pack_dataset(other, "LUNG")
    assert open_dataset(study, "LUNG").fingerprint == dataset.fingerprint
    same = study.model_copy(update={"name": "second"})
    assert pack_dataset(same, "LUNG").fingerprint == dataset.store.fingerprint, "what is the same is shared"
    dataset.store.path.unlink()
    assert pack_dataset(other, "LUNG").dtype == np.float32


def test_a_check_reads_all_and_what_is_bad_may_be_left_out_of_patients_who_have_others(study):
    files = find_slides(feature_folders(study, "LUNG"))
    bad = list(files)[3:6]
    for slide in bad:
        with h5py.File(files[slide], "a") as file:
            file["features"][0, 0, 0] = np.nan
    problems = check_dataset(study, "LUNG").set_index("slide_id")["problem"]
    assert sorted(problems[problems.str.contains("not finite")].index) == sorted(bad)
    assert not check_dataset(study, "LUNG", content=False)["problem"].any()
    with pytest.raises(Refused, match="`--allow-missing`") as refused:
        pack_dataset(study, "LUNG")
    assert all(slide in str(refused.value) for slide in bad), "all at once, although headers alone were checked first"
    with pytest.raises(Refused, match=r"1 patient\(s\) have no slide with features"):
        pack_dataset(study, "LUNG", allow_missing=True)
    for slide in bad[1:]:
        with h5py.File(files[slide], "a") as file:
            file["features"][0, 0, 0] = 0.5
    assert {*files} - {*pack_dataset(study, "LUNG", allow_missing=True).sizes} == {bad[0]}
    assert bad[0] not in str(open_dataset(study, "LUNG")._slides)


def test_packing_what_is_packed_does_nothing_and_a_damaged_store_is_packed_anew(study, dataset, monkeypatch):
    path, before = dataset.store.path, dataset.store.path.stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "pack", None)  # Would fail if it were called.
        assert pack_dataset(study, "LUNG").fingerprint == dataset.store.fingerprint
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"half")
    assert pack_dataset(study, "LUNG").fingerprint == dataset.store.fingerprint


def test_brackets_in_the_name_of_a_folder_are_brackets(study, tmp_path):
    (tmp_path / "features").rename(tmp_path / "slides [2021]")
    entry = study.datasets["LUNG"]
    for pattern in (
        "slides [2021]",
        "slides [[]2021]",
        "slides [2021]/TCGA/TCGA-L*",
        str(tmp_path / "slides [20*" / "TCGA"),
    ):
        changed = study.model_copy(update={"datasets": {"LUNG": entry.model_copy(update={"folders": [pattern]})}})
        assert len(find_slides(feature_folders(changed, "LUNG"))) == 24, pattern


def test_folders_may_be_absolute_named_per_data_set_and_without_wildcards(study, tmp_path):
    entry = study.datasets["LUNG"]
    for pattern in (str(tmp_path / "features/TCGA/TCGA-L*"), "features/TCGA", ".", "features/*/TCGA-{project}"):
        changed = study.model_copy(update={"datasets": {"LUNG": entry.model_copy(update={"folders": [pattern]})}})
        assert len(find_slides(feature_folders(changed, "LUNG"))) == 24, pattern
    changed = study.model_copy(update={"datasets": {"LUNG": entry.model_copy(update={"folders": ["{dataset}/none"]})}})
    assert feature_folders(changed, "LUNG") == []


# ------------------------------------------------------------------------------------------------ synthetic


def made_study(folder, **update):
    blca = {"projects": ["BLCA"], "patients": 376, "slides": 442, "survival_rate_pct": 67.6, "mean_patches": 15000}
    return Study.model_validate(
        {
            "name": "made",
            "title": "made",
            "data_root": str(folder),
            "folds": 3,
            "synthetic": {"scale": 0.1, "external_patients": 20},
            "features": {"encoder": "synthetic", "dim": 32},
            "datasets": {"BLCA": blca},
        }
        | update
    )


def test_a_synthetic_data_set_is_made_on_first_use(tmp_path):
    study = made_study(tmp_path)
    expected = dataset_fingerprint(study, "BLCA")
    assert not list(tmp_path.iterdir()), "asking for the fingerprint has made something"
    dataset = open_dataset(study, "BLCA")
    assert dataset.fingerprint == dataset_fingerprint(study, "BLCA") == expected
    assert dataset.splits.n_folds == 3 and dataset.external.splits.n_folds == 0
    with pytest.raises(Refused, match="an external set has no splits"):
        dataset.external.splits.test(0)
    for part in (dataset, dataset.external):
        assert part.oracle.index.tolist() == list(part.cohort.slides_of)
        assert part.batch(part.labels(list(part.cohort.slides_of))["patient_id"][:2]).features.shape[1] == 32
    assert not set(dataset.cohort.slides_of) & set(dataset.external.cohort.slides_of)
    assert open_dataset(study, "BLCA").fingerprint == dataset.fingerprint
    assert read_cohort(tmp_path / "external/labels/BLCA.csv", "BLCA").fingerprint == dataset.external.cohort.fingerprint
    with pytest.raises(Refused, match="synthetic"):
        pack_dataset(study, "BLCA")

    changed = study.model_copy(update={"synthetic": study.synthetic.model_copy(update={"seed": 1})})
    with pytest.raises(Refused, match="other settings"):
        open_dataset(changed, "BLCA")
    assert dataset_fingerprint(changed, "BLCA") != dataset.fingerprint
    dataset.store.path.unlink()
    assert open_dataset(study, "BLCA").fingerprint == dataset.fingerprint
    splits = tmp_path / "splits/BLCA.csv"
    splits.with_name("BLCA.csv.sha256").unlink()
    splits.write_text(splits.read_text().replace(",0\n", ",9\n").replace(",1\n", ",0\n").replace(",9\n", ",1\n"))
    assert open_dataset(study, "BLCA").fingerprint == dataset_fingerprint(study, "BLCA") != dataset.fingerprint


def test_the_fingerprint_of_a_made_data_set_follows_from_what_decides_its_data(tmp_path):
    study = made_study(tmp_path)
    expected = dataset_fingerprint(study, "BLCA")
    for update in (
        {"synthetic": {"scale": 0.1, "seed": 1, "external_patients": 20}},
        {"synthetic": {"scale": 0.1, "external_patients": 21}},
        {"features": {"encoder": "synthetic", "dim": 33}},
        {"features": {"encoder": "synthetic", "dim": 32, "precision": "float16"}},
        {"folds": 4},
    ):
        assert dataset_fingerprint(made_study(tmp_path, **update), "BLCA") != expected, update
    assert dataset_fingerprint(made_study(tmp_path, title="another"), "BLCA") == expected


# ------------------------------------------------------------------------------------------------ memory


def test_only_what_is_worth_it_is_announced(dataset, monkeypatch):
    asked, patients = [], dataset.cohort.patients["patient_id"].tolist()
    monkeypatch.setattr(type(dataset.store), "prefetch", lambda _, slides: asked.append(list(slides)))
    dataset.prefetch(patients)
    assert not asked
    monkeypatch.setattr(datasets, "PREFETCH_MIN_VALUES", 0)
    dataset.prefetch(patients[:2])
    assert asked == [[slide for patient in patients[:2] for slide in dataset.slides(patient)]]
    with pytest.raises(Refused, match="no patient"):
        dataset.prefetch(["nobody"])


def test_large_batches_lie_in_huge_pages_and_hold_the_same(dataset, monkeypatch):
    patients = dataset.cohort.patients["patient_id"].tolist()
    expected = dataset.batch(patients).features
    monkeypatch.setattr(readers, "HUGE_PAGES_MIN_BYTES", 1)
    found = dataset.batch(patients).features
    assert torch.equal(found, expected) and found.is_contiguous() and found.data_ptr() % 4096 == 0
    found.mul_(2)  # it is memory of its own
    assert torch.equal(dataset.batch(patients).features, expected)
