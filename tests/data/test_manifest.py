"""Study manifests: what is not understood is refused by name; the shipped ones load and agree with Table S1."""

import tempfile
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from steph import PROJECT, Refused
from steph.data.manifest import MANIFESTS, Features, Study, known_encoders, load_study
from steph.study.runs import Workbench, plan

SMALL = {
    "name": "small",
    "title": "Two data sets",
    "features": {"encoder": "any", "dim": 4},
    "datasets": {"KIPAN": {"projects": ["KIRC", "KIRP"]}, "SARC": {"projects": ["SARC"]}},
}


def manifest(folder, file="small", **changes):
    path = folder / f"{file}.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def test_what_is_left_out_is_the_papers(tmp_path):
    study = load_study(manifest(tmp_path))
    assert (study.folds, study.seed, study.endpoint.name, study.endpoint.unit) == (5, 42, "DSS", "days")
    assert study.network.model_dump() == {
        "dim_emb": 512, "dim_attn": 384, "n_bins": 32, "bin_width_days": 365, "dropout": 0.25,
    }  # fmt: skip
    assert study.recipe.model_dump() == {
        "epochs": 20, "lr": 1e-4, "weight_decay": 1e-5, "warmup_epochs": 1, "bags_per_step": 16, "alpha": 0.5,
            "max_patches": None,
    }  # fmt: skip
    assert (study.steph.dim_hidden, study.steph.top_k, study.steph.beta) == (512, 5, 0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3, "seed": -1}, r"seed: .*\n  epochs: Extra inputs are not permitted \(found 3\)"),
        ({"recipe": {"learning_rate": 1}}, r"recipe\.learning_rate: Extra inputs are not permitted"),
        ({"recipe": {"epochs": "many"}}, r"recipe\.epochs: .*integer.*\(found 'many'\)"),
        ({"recipe": {"epochs": 0}}, r"recipe\.epochs: .*greater than 0"),
        ({"name": "Book"}, "build/book is the book's folder"),
        ({"folds": 1}, r"folds: .*greater than or equal to 2"),
        ({"folds": 10**30, "repeats": 10**30}, r"folds: .*or equal to 1000.*\n  repeats: .*or equal to 1000"),
        ({"repeats": 0}, r"repeats: .*greater than 0"),
        ({"datasets": {}}, r"datasets: .*at least 1"),
        ({"datasets": {"A": {"projects": []}}}, r"datasets\.A\.projects: .*at least 1"),
        ({"features": {"encoder": "any", "dim": 4, "precision": "int8"}}, r"features\.precision: .*'float32'"),
        ({"features": {"encoder": "any"}}, r"features\.dim: Field required"),
        ({"endpoint": {"unit": "months"}}, r"endpoint\.unit: .*'days'"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(changes, message, tmp_path):
    path = manifest(tmp_path, **changes)
    with pytest.raises(Refused, match=message) as refused:
        load_study(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [unclosed", "is not readable YAML"),
        (b"\xff\xfe\x00", "is not readable YAML"),
        (b"a: \x00", "is not readable YAML"),
        (b"- a\n- b\n", "holds list; expected keys and values"),
        (b"", "holds NoneType"),
        (b"a: !!python/object/apply:os.getcwd []", "is not readable YAML"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(content, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(Refused, match=message):
        load_study(path)


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(Refused, match=r"unknown study 'tgca' .*Did you mean tcga\?.*Or give the path"):
        load_study("tgca")
    with pytest.raises(Refused, match=r"no study manifest at .*absent\.yaml"):
        load_study(tmp_path / "absent.yaml")
    study = load_study(manifest(tmp_path))
    assert study.entry("SARC").projects == ["SARC"]
    with pytest.raises(Refused, match=r"data set 'sarc' in study small. Did you mean SARC\? It has: KIPAN, SARC"):
        study.entry("sarc")
    with pytest.raises(Refused, match=r"unknown data set 'ZZZZZ' in study small\. It has: KIPAN, SARC"):
        study.entry("ZZZZZ")


def test_extends_takes_over_what_is_left_out(tmp_path):
    manifest(tmp_path, recipe={"epochs": 7, "lr": 0.01})
    child = tmp_path / "child.yaml"
    child.write_text("extends: small\nname: child\nrecipe: {lr: 0.02}\ndatasets: {SARC: {projects: [SARC]}}\n")
    study = load_study(child)
    assert (study.name, study.title) == ("child", "Two data sets")
    assert (study.recipe.epochs, study.recipe.lr) == (7, 0.02)
    assert list(study.datasets) == ["SARC"]  # the choice of data sets is replaced, not added to


def test_a_shipped_study_can_be_extended_from_anywhere(tmp_path):
    (tmp_path / "short.yaml").write_text("extends: tcga\nname: short\nrecipe: {epochs: 2}\n")
    study, tcga = load_study(tmp_path / "short.yaml"), load_study("tcga")
    assert study.recipe.epochs == 2 and study.datasets == tcga.datasets
    assert study.data == tcga.data and study.build != tcga.build


def test_a_circle_of_extends_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(Refused, match="extends itself"):
        load_study(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("extends: nowhere\n")
    with pytest.raises(Refused, match=r"c\.yaml extends nowhere: .*unknown study 'nowhere'"):
        load_study(tmp_path / "c.yaml")


def test_gamma_follows_the_papers_size_rule_and_sources_stand_in_alphabetical_order(tmp_path):
    names = ["SARC", "BLCA", "KIPAN"]
    study = load_study(manifest(tmp_path, datasets={name: {"projects": [name]} for name in names}))
    assert [study.steph.gamma(patients) for patients in (248, 500, 501, 1035)] == [0.05, 0.05, 0.005, 0.005]
    assert study.sources_of("KIPAN") == ["BLCA", "SARC"]


def test_the_environment_replaces_the_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("STEPH_DATA", raising=False)
    monkeypatch.delenv("STEPH_BUILD", raising=False)
    real = load_study(manifest(tmp_path))
    made = load_study(manifest(tmp_path, synthetic={"scale": 0.5}))
    assert real.data == made.data == PROJECT / "build" / "small" / "data"
    assert real.build == PROJECT / "build" / "small"
    monkeypatch.setenv("STEPH_DATA", str(tmp_path / "elsewhere"))
    assert real.data == tmp_path / "elsewhere"
    assert made.data == PROJECT / "build" / "small" / "data"  # a made cohort never lies among real data
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "out"))
    assert real.build == tmp_path / "out" / "small"


SHIPPED = sorted(path.stem for path in MANIFESTS.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_manifests_load_under_their_own_names_with_the_numbers_of_table_s1(name):
    study = load_study(name)
    assert study.name == name
    table = pd.read_csv(MANIFESTS / "paper" / "table_s1_datasets.csv").set_index("dataset")
    assert set(study.datasets) <= set(table.index)
    sized = {} if name.startswith("transfer") else study.datasets  # the positive control has sizes of its own
    for dataset, entry in sized.items():
        row = table.loc[dataset]
        assert (entry.patients, entry.slides, entry.mean_patches) == (row.patients, row.wsis, row.patches_mean)
        assert entry.survival_rate_pct == pytest.approx(100 * row.survival_rate, abs=1e-9)


def test_the_tcga_study_is_the_papers(monkeypatch):
    monkeypatch.delenv("STEPH_DATA", raising=False)
    study = load_study("tcga")
    table = pd.read_csv(MANIFESTS / "paper" / "table_s1_datasets.csv")
    assert list(study.datasets) == table["dataset"].tolist()
    assert table[["patients", "wsis"]].sum().tolist() == [7268, 8818]
    assert (study.features.encoder, study.features.dim, study.features.patch_size_px) == ("UNI2-h", 1536, 256)
    assert study.synthetic is None and study.data.is_absolute()
    large = {name for name, e in study.datasets.items() if study.steph.gamma(e.patients or 0) == 0.005}
    assert large == {"BRCA", "KIPAN", "LUNG", "GBMLGG", "COADREAD", "STES", "UCEC"}
    projects = [project for entry in study.datasets.values() for project in entry.projects]
    assert len(projects) == len(set(projects)) == 19
    cdr = next(source for source in study.sources if source.name == "TCGA-CDR")
    assert (cdr.size_bytes, len(cdr.md5 or "")) == (2945129, 32)
    assert all(source.address.startswith("https://") and source.licence for source in study.sources)
    assert not any(source.redistribution for source in study.sources if source.provides == "features")


@pytest.mark.parametrize("where", ["name", "dataset", "project"])
@pytest.mark.parametrize(
    "name",
    ["../../evil", "/tmp/evil", "..", "", " ", "-rf", "a/b", "a\\b", "a\nb", "$(touch evil)", "<b>", "{x}", "~", "é",
     "a" * 300],
)  # fmt: skip
def test_names_become_parts_of_paths_and_nothing_else(tmp_path, name, where):
    datasets = {name if where == "dataset" else "A": {"projects": [name if where == "project" else "A"]}}
    with pytest.raises(Refused, match=r"small\.yaml"):
        load_study(manifest(tmp_path, datasets=datasets, name=name if where == "name" else "A"))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*Study.model_fields, "extends", "nonsense"]), VALUES, max_size=3))
@example({"data_root": "~nobody"})
@example({"extends": ["a"]})
def test_any_values_are_a_study_or_refused(values):
    with tempfile.TemporaryDirectory() as folder, suppress(Refused):
        study = load_study(manifest(Path(folder), **values))
        assert study.n_folds >= 2 and study.datasets and study.build and study.data


@given(st.text(max_size=60))
@example("a: 2024-13-45")
@example("a: !!int x")
@example("a: &a [*a]")
def test_any_text_is_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(Refused, match=r"mine\.yaml"):
            load_study(path)


def test_targets_are_the_data_sets_that_methods_are_run_on(tmp_path):
    study = load_study("transfer")
    assert study.target_names == list(study.datasets)[:5]
    assert load_study("tiny").target_names == list(load_study("tiny").datasets)
    bench = Workbench(study)
    assert {run.dataset for run in plan(bench, methods=["steph"])} == set(study.target_names)
    assert {run.dataset for run in plan(bench, ["SARC"], methods=["steph"])} == {"SARC"}
    (tmp_path / "x.yaml").write_text("extends: tiny\nname: x\ntargets: [SARC, SARK]\n")
    with pytest.raises(Refused, match="targets: SARK is none of the data sets LIHC, CESC, SARC"):
        load_study(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ("pan_weight: 0.9", "the sum of their squares is above 1"),
        ("tumour: [0.9, 0.1, 0.5]", "with the mean between"),
        ("bag_range: [9, 3]", "least, most"),
    ],
)
def test_knobs_of_a_made_cohort_that_do_not_go_together_are_refused(tmp_path, knob, message):
    (tmp_path / "x.yaml").write_text(f"extends: tiny\nname: x\nsynthetic: {{ {knob} }}\n")
    with pytest.raises(Refused, match=message):
        load_study(tmp_path / "x.yaml")


# ------------------------------------------------------------------------------------------------ encoders


NAMES = {
    "UNI": "uni_v1 MahmoodLab/UNI UNI",
    "UNI2-h": "uni_v2 MahmoodLab/UNI2-h hf-hub:MahmoodLab/UNI2-h uni2-h",
    "CONCH": "conch_v1 MahmoodLab/CONCH conch",
    "CONCH v1.5": "conch_v15 conch_v1.5 MahmoodLab/conchv1_5",
    "Virchow": "virchow paige-ai/Virchow",
    "Virchow2": "virchow2 paige-ai/Virchow2",
    "H-optimus-0": "hoptimus0 bioptimus/H-optimus-0",
    "H-optimus-1": "hoptimus1 bioptimus/H-optimus-1",
    "Prov-GigaPath": "gigapath prov-gigapath/prov-gigapath Prov-Gigapath",
    "Phikon": "phikon owkin/phikon",
    "CTransPath": "ctranspath CTransPath",
    "MUSK": "musk xiangjx/musk",
    "ResNet-50": "resnet50 resnet50_trunc ResNet50",
}


def is_encoder(name, encoder, *aliases):
    return Features(encoder=encoder, dim=4, encoder_aliases=aliases).is_encoder(name)


@pytest.mark.parametrize("encoder", NAMES)
def test_names_of_an_encoder_mean_it_and_no_other(encoder):
    for name in NAMES[encoder].split():
        assert [other for other in NAMES if is_encoder(name, other)] == [encoder], name
        assert is_encoder(encoder, name)


def test_other_encoders_mean_themselves_and_what_the_study_says_beside():
    assert is_encoder("our ViT", "Our-ViT") and not is_encoder("our ViT", "UNI")
    assert is_encoder("our ViT", "UNI", "our_vit") and not is_encoder("gigapath", "UNI", "our_vit")
    assert not is_encoder("phikon_v2", "Phikon")
    assert {*NAMES} <= {*known_encoders().values()} and all(
        name.isalnum() and name.islower() for name in known_encoders()
    )
