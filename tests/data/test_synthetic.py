"""The demo cohort: what was planted is what was made."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import label

from steph import Refused
from steph.data import synthetic
from steph.data.cohort import read_cohort
from steph.data.manifest import Study, load_study
from steph.data.store import Store
from steph.survival import concordance_index


def changed(study, root=None, **values):
    """The study with other values of `synthetic`, below another folder."""
    made = study.model_copy(update={"synthetic": study.synthetic.model_copy(update=values)})
    return made.model_copy(update={"data_root": str(root)}) if root else made


@pytest.fixture(scope="module")
def demo():
    return load_study("demo")


@pytest.fixture(scope="module")
def twin():
    return load_study("demo_twin")


@pytest.fixture(scope="module")
def all_drawn(demo):
    """The whole demo: cohort (False) and external patients (True) of each data set."""
    return {(name, external): synthetic.draw(demo, name, external) for name in demo.datasets for external in (0, 1)}


def content(folder):
    """SHA-256 of each label and oracle table, and each store's content."""
    tables = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.csv")}
    return tables | {str(p.relative_to(folder)): Store.open(p).fingerprint for p in folder.rglob("*.h5")}


def test_demo_is_the_paper_at_half_size(demo):
    assert list(demo.datasets) == list(load_study("tcga").datasets)
    for name, entry in demo.datasets.items():  # their numbers are those of Table S1, as of every manifest
        half = round(demo.synthetic.scale * entry.patients)
        assert (half > demo.steph.large_above) == (entry.patients > 500), f"{name}: gamma differs from the paper's rule"
    assert set(demo.datasets) == set(synthetic.MEMBERSHIPS)


def test_twin_extends_the_demo_and_changes_sharing_alone(demo, twin):
    ours, theirs = demo.model_dump(), twin.model_dump()
    assert theirs.pop("name") != ours.pop("name") and theirs.pop("title") != ours.pop("title")
    assert ours["synthetic"].pop("sharing") is True and theirs["synthetic"].pop("sharing") is False
    del ours["book_folds"], theirs["book_folds"]  # how much of it the book runs
    assert ours == theirs
    assert twin.data != demo.data


def test_same_files_in_any_order_and_in_another_process(demo, tmp_path):
    small = changed(demo, tmp_path / "a", scale=0.1, external_patients=12)
    for name in ("CESC", "SARC"):
        synthetic.make_dataset(small, name)
    code = (
        "from steph.data.manifest import Study; from steph.data.synthetic import make_dataset; import sys;"
        "study = Study.model_validate_json(sys.argv[1]); [make_dataset(study, name) for name in ('SARC', 'CESC')]"
    )
    # Another hash seed and another number of threads must not matter.
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2"}
    other = changed(small, tmp_path / "b").model_dump_json()
    subprocess.run([sys.executable, "-c", code, other], check=True, env=environment)
    assert content(tmp_path / "a") == content(tmp_path / "b") and len(content(tmp_path / "a")) == 2 * 2 * 3
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_seed_and_data_set_decide_the_numbers(demo):
    small = changed(demo, scale=0.1, external_patients=5)
    one = synthetic.draw(small, "SARC")
    assert not np.array_equal(one.features, synthetic.draw(changed(small, seed=1), "SARC").features)
    fractions = [synthetic.draw(small, name).patients["tumour"][:10].to_numpy() for name in small.datasets]
    assert len(set(np.concatenate(fractions)) - {0.1, 0.9}) > 120, "two data sets share their random numbers"


def test_numbers_of_this_recipe(demo):
    """Made stores are recognised by `RECIPE`: whoever changes these numbers raises it."""
    drawn = synthetic.draw(demo, "CESC")
    found = [*drawn.patients["log_risk"][:2], drawn.patients["time_days"].sum()]
    found += [np.abs(drawn.features).sum(dtype=float), drawn.coords.sum(), drawn.phenotype.sum()]
    expected = [-1.0564822892134402, 1.1809785223658742, 118843.0, 79294.18351344501, 45707264.0, 4074.0]
    assert synthetic.RECIPE == 1 and found == pytest.approx(expected, rel=1e-6)


def test_external_patients_change_nothing_and_are_others(demo):
    few, many = changed(demo, scale=0.1, external_patients=5), changed(demo, scale=0.1, external_patients=40)
    a, b = synthetic.draw(few, "LIHC"), synthetic.draw(many, "LIHC")
    pd.testing.assert_frame_equal(a.patients, b.patients)
    assert np.array_equal(a.features, b.features)
    outside = synthetic.draw(many, "LIHC", external=True).patients
    for column in ("patient_id", "log_risk"):
        assert not set(a.patients[column]) & set(outside[column])
    assert synthetic.draw(few, "LIHC", external=True).patients["log_risk"].equals(outside["log_risk"][:5])


def test_sizes_and_event_rates_are_table_s1s(demo, all_drawn):
    for name, entry in demo.datasets.items():
        drawn, outside = all_drawn[name, False], all_drawn[name, True]
        n = round(0.5 * entry.patients)
        assert len(drawn.patients) == n and len(outside.patients) == 300
        assert drawn.patients["event"].sum() == round(n * (1 - entry.survival_rate_pct / 100))
        assert outside.patients["event"].mean() == pytest.approx(1 - entry.survival_rate_pct / 100, abs=0.1)
        for part in (drawn, outside):
            # four binomial standard errors of a mean number of slides
            expected = entry.slides / entry.patients
            error = np.sqrt((expected - 1) * (1 - (expected - 1) / 3) / len(part.patients))
            assert part.patients["n_slides"].mean() == pytest.approx(expected, abs=4 * error), name
            assert part.patients["n_slides"].between(1, 4).all()
            bags = part.slides.groupby("patient_id", sort=False)["n_patches"].sum()
            assert list(bags.items()) == list(part.patients.set_index("patient_id")["n_patches"].items())
            assert bags.between(6, 40).all() and part.slides["n_patches"].min() >= 4
            assert (part.patients["time_days"] >= 1).all() and (part.patients["time_days"] % 1 == 0).all()
    medians = [all_drawn[name, False].patients["n_patches"].median() for name in ("CESC", "BRCA", "SARC")]
    assert sorted(set(medians)) == medians, "bags do not follow the paper's patches per slide"


def test_oracle_ranks_patients_about_as_well_as_planned(all_drawn):
    for external in (False, True):
        tables = [drawn.patients for key, drawn in all_drawn.items() if key[1] == external]
        found = np.mean([concordance_index(p["time_days"], p["event"], p["log_risk"]) for p in tables])
        assert found == pytest.approx(0.78, abs=0.03)
    spread = np.std(np.concatenate([drawn.patients["log_risk"] for drawn in all_drawn.values()]))
    assert spread == pytest.approx(1.2, abs=0.04)


def test_patches_show_composition_and_tumour_state(demo, all_drawn):
    """A least-squares reading of the patches finds the true risk: the signal is in the features, and only there where
    it was planted."""
    drawn = all_drawn["GBMLGG", False]
    owner = np.repeat(drawn.slides["patient_id"].to_numpy(), drawn.slides["n_patches"])
    tumour = drawn.phenotype == 0
    means = pd.DataFrame(drawn.features[tumour]).groupby(owner[tumour], sort=False).mean()
    shares = pd.crosstab(owner, drawn.phenotype, normalize="index").reindex(means.index)
    assert list(means.index) == list(drawn.patients["patient_id"]), "a patient without tumour"
    planted = drawn.patients["tumour"].to_numpy()
    assert np.abs(shares[0].to_numpy() - planted).max() < 0.2, "tumour patches do not follow the tumour fraction"

    def explained(columns):
        columns = np.column_stack([np.ones(len(columns)), columns])
        risk = drawn.patients["log_risk"].to_numpy()
        return 1 - np.var(risk - columns @ np.linalg.lstsq(columns, risk, rcond=None)[0]) / np.var(risk)

    state, tissue = means.to_numpy(), np.log(shares.to_numpy() + 0.02)
    assert explained(state) > 0.35 and explained(tissue) > 0.35
    assert explained(np.hstack([state, tissue])) > 0.7
    # What is left of background patches once their kind is known: the decoy, and 32 columns' luck (32 / 420).
    typical = pd.DataFrame(drawn.features).groupby(drawn.phenotype).transform("mean").to_numpy()
    decoy = pd.DataFrame((drawn.features - typical)[~tumour]).groupby(owner[~tumour], sort=False).mean()
    assert explained(decoy.reindex(means.index).to_numpy()) < 0.2, "background patches tell the tumour's state"


def test_tissue_and_tumour_are_connected_on_the_grid(demo, all_drawn):
    def connected(cells):
        x, y = (cells - cells.min(axis=0)).T // synthetic.PATCH_PX
        grid = np.zeros((synthetic.GRID, synthetic.GRID))
        grid[x, y] = 1
        return label(grid)[1] == 1

    for name in ("SARC", "CESC"):
        drawn = all_drawn[name, False]
        assert (drawn.coords % synthetic.PATCH_PX == 0).all() and (drawn.coords >= 0).all()
        ends = np.cumsum(drawn.slides["n_patches"])[:-1]
        for coords, phenotype in zip(np.split(drawn.coords, ends), np.split(drawn.phenotype, ends), strict=True):
            assert len(np.unique(coords, axis=0)) == len(coords), "two patches in one place"
            assert 0 < (phenotype == 0).sum() < len(phenotype)
            assert connected(coords) and connected(coords[phenotype == 0])


def test_planted_similarity_shows_the_groups_and_the_twin_shares_nothing(demo, twin):
    related = {("BRCA", "UCEC"), ("GBMLGG", "SARC"), ("SKCM", "SARC"), ("KIPAN", "LIHC"), ("HNSC", "CESC")}
    off = ~np.eye(13, dtype=bool)
    for seed in range(4):
        shared = synthetic.planted_similarity(changed(demo, seed=seed))
        assert np.allclose(np.diag(shared), 1) and np.allclose(shared, shared.T)
        within = np.mean([shared.loc[a, b] for a, b in related])
        assert within > shared.to_numpy()[off].mean() + 0.2
        none = synthetic.planted_similarity(changed(twin, seed=seed)).to_numpy()
        assert np.allclose(np.diag(none), 1) and np.allclose(none[off], -1 / 12)


def test_planted_similarity_is_the_correlation_of_true_risks(demo, twin):
    even = np.full(5, 0.2)
    composition = synthetic._composition(("test",), even, 20_000, demo.synthetic.tumour)
    state = np.random.default_rng(0).standard_normal((20_000, synthetic.N_FACTORS))
    for study in (demo, twin):
        beta, gamma = synthetic._directions(study.synthetic)
        risks = state @ beta.T + synthetic._standardised(composition, demo.synthetic.tumour) @ gamma.T
        planted = synthetic.planted_similarity(study).loc[[*synthetic.MEMBERSHIPS], [*synthetic.MEMBERSHIPS]]
        assert np.abs(np.corrcoef(risks.T) - planted.to_numpy()).max() < 0.03


def test_twin_has_the_same_slides_and_other_outcomes(demo, twin):
    for external in (False, True):
        a, b = (synthetic.draw(study, "STES", external) for study in (demo, twin))
        assert np.array_equal(a.features, b.features) and np.array_equal(a.coords, b.coords)
        pd.testing.assert_frame_equal(a.slides[["slide_id", "n_patches"]], b.slides[["slide_id", "n_patches"]])
        assert abs(np.corrcoef(a.patients["log_risk"], b.patients["log_risk"])[0, 1]) < 0.9
    assert synthetic.draw(demo, "STES").patients["event"].sum() == synthetic.draw(twin, "STES").patients["event"].sum()


def test_the_positive_control_shares_all_and_its_twin_nothing_not_even_looks() -> None:
    studies = load_study("transfer"), load_study("transfer_twin")
    shared, none = (synthetic.planted_similarity(study).to_numpy() for study in studies)
    assert np.allclose(shared, 1) and none[~np.eye(13, dtype=bool)].max() < 0.9
    tumours = []
    for study in studies:
        (brca, sarc) = (synthetic.draw(study, name) for name in ("BRCA", "SARC"))
        tumours.append([of.features[of.phenotype == 0].mean(0) for of in (brca, sarc)])
        fraction = brca.patients["tumour"]
        assert len(fraction) == 100 and len(sarc.patients) == 500 and (brca.slides["n_patches"].max() <= 50)
        assert fraction.between(0.05, 0.4).all() and fraction.mean() < 0.25
        risk = brca.patients["log_risk"]
        assert 1.5 < risk.std() < 2.5
    here, there = (np.corrcoef(*pair)[0, 1] for pair in tumours)
    assert here > 0.8 and there < 0.6


def test_files_are_readable_and_say_that_they_are_synthetic(demo, tmp_path):
    study = changed(demo, tmp_path, scale=0.2, external_patients=15)
    synthetic.make_dataset(study, "SARC")
    for folder, external in ((tmp_path, False), (tmp_path / "external", True)):
        drawn = synthetic.draw(study, "SARC", external)
        cohort = read_cohort(folder / "labels/SARC.csv", "SARC")
        store = Store.open(folder / "stores/SARC.h5")
        oracle = pd.read_csv(folder / "oracle/SARC.csv", float_precision="round_trip")
        columns = ["patient_id", "time_days", "event", "n_slides"]
        pd.testing.assert_frame_equal(cohort.patients[columns], drawn.patients[columns])
        assert list(cohort.slides["slide_id"]) == list(store.sizes) == list(drawn.slides["slide_id"])
        assert list(oracle["patient_id"]) == list(drawn.patients["patient_id"])
        assert np.array_equal(oracle["log_risk"], drawn.patients["log_risk"])
        assert np.array_equal(store.features, drawn.features) and np.array_equal(store.coords, drawn.coords)
        assert store.provenance == synthetic.provenance(study, "SARC", external)
        store.verify()
        for name in (*cohort.slides["patient_id"], *store.sizes, *cohort.slides["project"]):
            assert name.startswith("DEMO-")
    store, found = Store.open(tmp_path / "stores/SARC.h5"), synthetic.truth(study, "SARC")
    assert list(found["slide_id"].unique()) == list(store.sizes)
    assert np.array_equal(found[["x", "y"]], store.coords)
    assert (found["slide_id"].str.rsplit("-", n=1).str[0] == found["patient_id"]).all()
    assert set(found["phenotype"]) == set(synthetic.PHENOTYPES)
    assert (found["tumour"] == (found["phenotype"] == "tumour")).all()
    synthetic.make_dataset(changed(demo, tmp_path / "alone", scale=0.1, external_patients=0), "CESC")
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == ["labels", "oracle", "stores"]


@pytest.mark.parametrize(
    ("change", "dataset", "message"),
    [
        (lambda values: values.update(synthetic=None), "SARC", "is not synthetic"),
        (lambda values: None, "SARK", "Did you mean SARC or SKCM"),
        (lambda values: values["synthetic"].update(scale=0.01), "SARC", "leaves 2; at least 10"),
        (lambda values: values["datasets"]["SARC"].update(slides=2000), "SARC", "2000 slides of 248 patients"),
        (lambda values: values["datasets"]["SARC"].update(slides=200), "SARC", "200 slides of 248 patients"),
        (lambda values: values["datasets"]["SARC"].update(patients=None, slides=None), "SARC", "needs patients, sl"),
        (lambda values: values["features"].update(dim=4), "SARC", "features.dim is 4"),
        (lambda values: values["datasets"].update(OVARY=values["datasets"]["SARC"]), "OVARY", "unknown cancer 'OVARY'"),
    ],
)
def test_what_cannot_be_made_is_refused(demo, tmp_path, change, dataset, message):
    values = demo.model_dump() | {"data_root": str(tmp_path)}
    change(values)
    with pytest.raises(Refused, match=message):
        synthetic.make_dataset(Study.model_validate(values), dataset)
    assert not list(tmp_path.rglob("*.*"))
