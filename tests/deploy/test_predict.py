"""Using a model folder: the right patient's numbers, and a sentence for whatever cannot be used."""

import time

import numpy as np
import pandas as pd
import pytest
import torch

from steph import Refused
from steph.analysis.mixing.attention import attention_of
from steph.data.bags import RaggedBatch
from steph.data.manifest import Features, Network
from steph.data.packing import write_store
from steph.deploy import load_model
from steph.deploy.predict import read_bag, read_slide
from steph.mil import new_network
from steph.survival import risk_score, survival_curve
from tests.helpers.made_model import DIM, SETTINGS, made_config, made_folder, made_steph, patches, write_slide


@pytest.fixture
def model(tmp_path):
    return load_model(made_folder(tmp_path / "model"))


@pytest.fixture
def slides(tmp_path):
    """Two slides of one patient."""
    return [write_slide(tmp_path / f"P1-DX{i}.h5", patches(12 + i, seed=i)) for i in (1, 2)]


def test_three_lines(tmp_path, slides):
    prediction = load_model(made_folder(tmp_path / "model")).predict(slides)
    steph, bag = made_steph(), torch.from_numpy(np.concatenate([patches(13, seed=1), patches(14, seed=2)]))
    hazards = torch.sigmoid(steph([bag])).double()
    assert prediction.risk == risk_score(hazards).item() and prediction.patient_id == "P1-DX1"
    np.testing.assert_array_equal(prediction.survival, survival_curve(hazards)[0])
    assert list(prediction.survival.index) == [365.0 * t for t in range(1, 9)]
    w, lam, selected = steph.coefficients(bag)
    np.testing.assert_allclose(list(prediction.w.values()), w, rtol=1e-6)
    np.testing.assert_allclose(list(prediction.lam.values()), lam, rtol=1e-6)
    sources = prediction.mixture.iloc[1:]
    assert set(sources.loc[sources["kept"], "source"]) == {steph.source_names[i] for i in selected}
    attention = attention_of(steph, RaggedBatch.from_bags([bag]))
    np.testing.assert_allclose(prediction.attention, attention, rtol=1e-6)
    assert prediction.coords.shape == (27, 2) and not prediction.notes
    assert prediction.edges == {"P1-DX1": 512, "P1-DX2": 512}
    assert prediction.patches["slide_id"].value_counts().to_dict() == {"P1-DX1": 13, "P1-DX2": 14}
    assert prediction.patches["rank"].tolist() == (-attention).argsort().argsort().__add__(1).tolist()
    of_first = prediction.patches[prediction.patches["slide_id"] == "P1-DX1"]
    assert of_first["percentile"].max() == pytest.approx(12.5 / 13) and of_first["patch"].tolist() == list(range(13))


def test_a_percentile_counts_those_with_a_lower_risk(model):
    assert [model.percentile(r) for r in (-9, -6, -5.5, -1, 0)] == [0, 12.5, 25, 87.5, 100]


def test_what_merges_nothing_has_no_w_and_what_pools_without_attention_no_map(tmp_path, slides):
    torch.manual_seed(0)
    plain, mean = (
        load_model(made_folder(tmp_path / name, new_network(name, DIM, SETTINGS))).predict(slides)
        for name in ("abmil", "mean_mil")
    )
    assert plain.w is None and plain.lam is None and plain.attention.sum() == pytest.approx(1)
    assert mean.attention is None and np.isfinite(mean.risk) and "does not pool patches" in mean.notes[0]


def test_without_coordinates_all_but_the_map(model, tmp_path):
    whole = model.predict([write_slide(tmp_path / "a.h5", patches())])
    prediction = model.predict([write_slide(tmp_path / "b.h5", patches(), coords=None)])
    assert prediction.coords is None and prediction.risk == whole.risk
    assert "No map can be drawn: b has no" in prediction.notes[0]
    np.testing.assert_array_equal(prediction.attention, whole.attention)
    torch.save(torch.from_numpy(patches()), tmp_path / "c.pt")
    assert model.predict([tmp_path / "c.pt"]).risk == whole.risk


def test_a_network_that_needs_coordinates_asks_for_them(tmp_path, slides):
    model = load_model(made_folder(tmp_path / "m", new_network("patch_gcn", DIM, SETTINGS)))
    assert np.isfinite(model.predict(slides).risk)
    with pytest.raises(Refused, match=r"PatchGCN needs .* coordinates, and 1 of 1 slides of b have none \(first b\)"):
        model.predict([write_slide(tmp_path / "b.h5", patches(), coords=None)])


def test_features_are_brought_into_the_stores_format(tmp_path):
    features = np.random.default_rng(0).standard_normal((30, DIM)) / 3
    slide = write_slide(tmp_path / "a.h5", features)
    for precision in ("float16", "float32"):
        kind = Features(encoder="UNI2-h", dim=DIM, precision=precision)
        store = write_store(tmp_path / f"{precision}.h5", kind, [(features, None)], {"a": 30}, {})
        inputs = made_config(made_steph(), inputs={"precision": precision}).inputs
        np.testing.assert_array_equal(read_slide(slide, inputs)[0], store.bag(["a"]))


def test_large_bags_are_sampled_as_in_the_study(tmp_path, slides):
    model = load_model(made_folder(tmp_path / "m", inputs={"max_patches": 9, "sample_seed": 4}))
    prediction, again, other = (model.predict(slides, patient_id=who) for who in ("P1", "P1", "P2"))
    assert len(prediction.patches) == 9 and prediction.risk == again.risk and prediction.risk != other.risk
    assert "9 of 27 patches were read" in prediction.notes[0]
    where = prediction.patches.set_index(["slide_id", "patch"])[["x", "y"]]
    whole = load_model(made_folder(tmp_path / "all")).predict(slides).patches.set_index(["slide_id", "patch"])
    pd.testing.assert_frame_equal(where, whole.loc[where.index, ["x", "y"]])
    batch = read_bag(slides, model.config, "P1").batch(["P1"], coords=True)
    assert batch.slide_offsets[-1] == 9 and len(batch.slide_offsets) == where.index.get_level_values(0).nunique() + 1


def test_the_edge_of_a_patch(model, tmp_path):
    def edge(patch_px=None, **options):
        path = write_slide(tmp_path / "a.h5", patches(9), **options)
        return model.predict([path], patch_px=patch_px).edges["a"]

    assert edge() == 512
    assert edge(coords_attributes={"patch_size_level0": 1024}) == 1024
    assert edge(coords=np.arange(18).reshape(9, 2) * 1000) == 256  # no two in a row or column: the study's
    assert edge(patch_px=300) == 300


def test_a_table_of_patients(model, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    files = {name: write_slide(folder / f"{name}.h5", patches(9 + i, seed=i)) for i, name in enumerate("abc")}
    (tmp_path / "t.csv").write_text("patient_id,path\nP2,slides/c.h5\nP1,slides/a.h5\nP1,slides/b.h5\n")
    table = model.predict_table(tmp_path / "t.csv")
    assert list(table.columns) == ["patient_id", "risk", "percentile", *(f"survival_{t}" for t in range(1, 9))]
    assert table["patient_id"].tolist() == ["P2", "P1"]
    assert table["risk"].tolist() == [model.predict([files["c"]]).risk, model.predict([files["a"], files["b"]]).risk]


def test_spellings_of_an_id_are_one_patient(model, tmp_path):
    files = [write_slide(tmp_path / f"{name}.h5", patches(9 + i, seed=i)) for i, name in enumerate("abc")]
    rows = ["M\u00fcller,a.h5", "Mu\u0308ller\u00a0, b.h5", "P1,c.h5"]
    (tmp_path / "t.csv").write_text("\n".join(["patient_id,path", *rows]))
    table = model.predict_table(tmp_path / "t.csv")
    assert table["patient_id"].tolist() == ["M\u00fcller", "P1"]
    assert table["risk"].tolist() == [model.predict(files[:2]).risk, model.predict(files[2:]).risk]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient_id,path\nP1,a.h5\n,b.h5\n", r"1 row\(s\) with no patient_id:\n  row 3: patient_id=, path=b\.h5"),
        ("patient_id,path\nNA,a.h5\nNA,b.h5\n", r"2 row\(s\) with no patient_id"),
        ("path,patient_id\na.h5,P1\nb.h5\n", r"1 row\(s\) with no patient_id"),
        ("patient_id,path\nP1,a.h5\nP2,\n", r"1 row\(s\) with no path"),
        ("patient_id,path\nP1,a.h5\nP2,x/../a.h5\n", r"2 row\(s\) with a slide that stands twice"),
        ("patient_id,path\nP1,a.h5\nP1,b/a.h5\nP2,c/a.h5\n", r"2 row\(s\) with a slide that stands twice"),
        ("patient_id;path\nP1;a.h5\n", "Save it as UTF-8 with commas"),
        ("patient,path\nP1,slides/a.h5\n", "lacks patient_id"),
        ("patient_id,path\n", "lacks rows"),
        ("patient_id,path\nP1,a.h5\n", r"no such file.*\n    P1: a "),
        (None, "no table at"),
    ],
)
def test_a_table_that_cannot_be_used_is_told(model, tmp_path, text, message):
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(Refused, match=message):
        model.predict_table(tmp_path / "t.csv")


def test_a_table_names_all_patients_who_cannot_be_predicted_before_anybody_is(model, tmp_path, monkeypatch):
    files = {i: write_slide(tmp_path / f"S{i}.h5", patches(9 + i, seed=i)) for i in range(6)}
    write_slide(files[1], with_value(np.nan))
    write_slide(files[3], patches(), encoder="gigapath")
    write_slide(files[4], np.zeros((9, DIM)))
    rows = [f"P{i},S{i}.h5" for i in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(["patient_id,path", *rows, "P9,gone.h5"]))
    monkeypatch.setattr("steph.deploy.predict.predict_patients", None)  # it would fail if it were called
    with pytest.raises(Refused, match="4 of 7 slides cannot be used") as refused:
        model.predict_table(tmp_path / "t.csv")
    for words in ("P1: S1", "not finite", "P3: S3", "features of gigapath", "P4: S4", "all zero", "P9: gone",
                  "no such file", "Nobody was predicted. The model reads features of UNI2-h"):  # fmt: skip
        assert words in str(refused.value)


def with_value(value):
    features = patches()
    features[7, 2] = value
    return features


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, r"a\.h5: no such file, or a link to one that is gone"),
        (lambda p: p.mkdir(), r"a\.h5: no such file, or a link to one that is gone"),
        (lambda p: p.write_text("hello"), r"a\.h5: truncated or not an HDF5 file"),
        (lambda p: write_slide(p, patches(dim=DIM + 1)), r"a\.h5: 7 wide, expected 6: features of another encoder"),
        (lambda p: write_slide(p, np.zeros((0, DIM), np.float32), None), r"a\.h5: empty \(0 patches\)"),
        (lambda p: write_slide(p, with_value(np.nan)), r"a\.h5: 1 features are not finite"),
        (lambda p: write_slide(p, patches(), encoder="conch"), r"features of conch, expected UNI2-h.* The model reads"),
        (lambda p: write_slide(p, patches(), coords_attributes={"patch_size": 512}), r"other patches than the study's"),
        (lambda p: write_slide(p, patches() * 1e37), r"the risk is nan|not finite"),
    ],
)
def test_what_cannot_be_read_is_told(model, tmp_path, write, message):
    path = tmp_path / "a.h5"
    write(path)
    with pytest.raises(Refused, match=message):
        model.predict([path])


def test_values_too_large_for_the_stores_format_no_slide_and_a_slide_twice_are_refused(tmp_path, slides):
    model = load_model(made_folder(tmp_path / "m", inputs={"precision": "float16"}))
    large = write_slide(tmp_path / "a.h5", with_value(1e6))
    for files, message in (
        ([large], "too large for float16"), ([], "no slide given"), (slides[:1] * 2, "slide P1-DX1 is given twice"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=message):
            model.predict(files)


def test_a_gpus_model_on_the_cpu_says_that_numbers_agree_up_to_rounding(tmp_path, slides):
    model = load_model(made_folder(tmp_path / "m", device="cuda (NVIDIA H200)", precision="bf16"))
    assert model.compute.precision == "fp32" and "agree up to rounding" in model.predict(slides).notes[0]
    assert load_model(made_folder(tmp_path / "cpu", precision="bf16")).compute.precision == "bf16"
    with pytest.raises(Refused, match="cuda:9"):
        load_model(tmp_path / "m", device="cuda:9")


def test_ten_thousand_patches_take_seconds(tmp_path):
    settings = Network()
    whole = made_steph(12, dim=1536, settings=settings, top_k=5, dim_hidden=512)
    made_folder(tmp_path / "m", whole, dim=1536, settings=settings)
    slide = write_slide(tmp_path / "a.h5", patches(10_000, dim=1536))
    start = time.process_time()
    prediction = load_model(tmp_path / "m").predict([slide])
    assert len(prediction.attention) == 10_000 and time.process_time() - start < 6  # 1.2 s where it was written
