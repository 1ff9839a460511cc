"""Attention maps: of the right model, at the right place, measured rightly against tissue that is known."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.text import Text
from torch.nn import functional as F

from steph import Refused, plots
from steph.analysis.mixing import attention
from steph.data.bags import RaggedBatch
from steph.data.cohort import COLUMNS, cohort_from, write_cohort
from steph.data.dataset import pack_dataset
from steph.data.manifest import load_study
from steph.data.synthetic import truth
from steph.merging.steph import STEPH
from steph.mil.abmil import ABMIL
from steph.study.execute import run_all
from steph.study.runs import Run, Workbench
from tests.helpers.fabricate import fabricate

NAMES = {"vanilla": "Vanilla", "steph": "STEPH"}


def of_two_slides(data):
    """A test patient of fold 0."""
    return next(patient for patient in data.splits.test(0) if len(data.slides(patient)) == 2)


def map_of(bench, method, fold=0, patient=None):
    """The map of a patient (the fold's first) under a model of fold 0 or 1."""
    data, model = bench.dataset("SARC"), bench.model(Run("SARC", method, fold, 42))
    return attention.attention_map(model, data, patient or data.splits.test(fold)[0])


def test_a_networks_attention_is_its_own_whatever_the_pieces(monkeypatch):
    torch.manual_seed(0)
    network, batch = ABMIL(6, 5, 4).eval(), RaggedBatch.from_bags([torch.randn(23, 6)])
    whole = attention.attention_of(network, batch)
    np.testing.assert_allclose(whole, network.attention(batch.features).detach().numpy(), rtol=1e-5)
    assert whole.sum() == pytest.approx(1, abs=1e-14)
    monkeypatch.setattr("steph.mil.gated_attention.CHUNKS", {"cpu": 7})
    np.testing.assert_allclose(attention.attention_of(network, batch), whole, rtol=1e-6)


def merging():
    """STEPH on random models of three sources, of which two are kept; and the states of M_0, M_t and the sources."""
    torch.manual_seed(0)
    states = [ABMIL(6, 5, 4).state_dict() for _ in range(5)]
    sources = dict(zip("ABC", states[2:], strict=True))
    model = STEPH(states[0], states[1], sources, top_k=2, dim_hidden=8).eval()
    torch.nn.init.ones_(model.hyper.weight_head[-1].bias)  # all weights are above 0
    torch.nn.init.constant_(model.hyper.mix_head[-1].bias, 0.4)
    return model, states


def test_stephs_attention_is_the_one_that_pools_the_patients_own_merged_model():
    model, states = merging()
    one, other = (RaggedBatch.from_bags([3 * torch.randn(n, 6)]) for n in (9, 11))
    found = attention.attention_of(model, one)
    with torch.no_grad():
        state = model.merged_state(one.features)
        embedded = F.relu(F.linear(one.features, state["embed.weight"], state["embed.bias"]))
        torch.testing.assert_close(torch.from_numpy(found).float() @ embedded, model.encode(one)[0])
        foreign = ABMIL(6, 5, 4).eval()
        foreign.load_state_dict(model.merged_state(other.features))
    # The same patches under the model merged for another patient, or under M_t, have other attention.
    assert np.abs(attention.attention_of(foreign, one) - found).max() > 1e-5
    foreign.load_state_dict(states[1])
    assert np.abs(attention.attention_of(foreign, one) - found).max() > 1e-5


@pytest.mark.parametrize("method", ["surgery_am", "finetuned_representation", "transmil", "steph_patch_gcn"])
def test_other_networks_with_attention_have_maps(tiny, method):
    table = map_of(tiny, method)
    assert table["attention"].sum() == pytest.approx(1) and (table["attention"] >= 0).all()
    if method == "surgery_am":  # moves no attention
        pd.testing.assert_frame_equal(table, map_of(tiny, "adamerging"))


@pytest.mark.parametrize("method", ["hypernetwork_only", "roupkt"])
def test_models_without_attention_are_refused(tiny, method):
    with pytest.raises(Refused, match="has no attention map"):
        map_of(tiny, method)


def test_places_are_the_stores_in_the_bags_order(tiny):
    data = tiny.dataset("SARC")
    patient = of_two_slides(data)
    table = attention.places(data, patient)
    for slide in data.slides(patient):
        part = table[table["slide_id"] == slide]
        np.testing.assert_array_equal(part[["x", "y"]].to_numpy(int), data.store.coords_of([slide]))
        assert part["patch"].tolist() == list(range(len(part)))
    for limit in (None, 3, 9):
        batch = data.batch([patient], coords=True, max_patches=limit)
        found = attention.places(data, patient, limit)
        np.testing.assert_array_equal(found[["x", "y"]].to_numpy(int), batch.coords.numpy())
        rows = [data.store.rows(s).start + i for s, i in zip(found["slide_id"], found["patch"], strict=True)]
        np.testing.assert_array_equal(np.asarray(data.store.features[rows]), batch.features.numpy())


def test_ranks_are_of_the_bag_and_percentiles_of_the_slide(tiny):
    data = tiny.dataset("SARC")
    patient = of_two_slides(data)
    first, second = (data.store.sizes[s] for s in data.slides(patient))
    values = np.arange(first + second, 0, -1.0)
    values[1] = values[0]  # two patches alike
    table = attention.with_attention(attention.places(data, patient), values)
    assert table["rank"].tolist() == list(range(1, first + second + 1))
    of_slide = table.groupby("slide_id", observed=True)["percentile"]
    assert of_slide.max().tolist() == pytest.approx([1 - 1 / first, 1 - 0.5 / second])
    assert of_slide.min().tolist() == pytest.approx([0.5 / first, 0.5 / second])
    assert table["percentile"][0] == table["percentile"][1]


def test_two_maps_side_by_side_and_their_top_patches(tiny):
    data = tiny.dataset("SARC")
    patient = data.splits.test(0)[0]
    places = attention.places(data, patient)
    rising = np.arange(1.0, len(places) + 1)
    maps = {"vanilla": rising, "steph": rising[::-1]}
    maps = {name: attention.with_attention(places, values / rising.sum()) for name, values in maps.items()}
    table, n = attention.beside(maps), len(places)
    np.testing.assert_allclose(table["difference"], maps["steph"]["percentile"] - maps["vanilla"]["percentile"])
    top = attention.top_patches({patient: table}, 2)
    assert top["rank_steph"].tolist() == [1, 2, n - 1, n] and top["rank_vanilla"].tolist() == [n, n - 1, 2, 1]
    assert top["times_steph"][0] == pytest.approx(n * n / rising.sum())
    assert top.loc[0, ["patient_id", "x", "y"]].tolist() == [patient, table["x"][0], table["y"][0]]


def test_the_mixture_is_what_the_model_merges():
    model, states = merging()
    batch = RaggedBatch.from_bags([torch.randn(9, 6)])
    table = attention.mixture(model, batch, "T").set_index("source")
    assert list(table.index) == ["T", "A", "B", "C"] and table["kept"].sum() == 3
    assert table.loc[~table["kept"], "coefficient"].tolist() == [0] and (table["w"].dropna() > 0).all()
    assert table["lambda"].dropna().between(0.01, 0.99).all()
    layer, null = "embed.weight", states[0]["embed.weight"]
    taus = torch.stack([state[layer] - null for state in states[1:]])
    expected = null + torch.tensordot(torch.tensor(table["coefficient"].to_numpy()).float(), taus, 1)
    torch.testing.assert_close(model.merged_state(batch.features)[layer].detach(), expected)
    with pytest.raises(Refused, match="does not merge models patient by patient"):
        attention.mixture(ABMIL(6, 5, 4), batch, "T")


@pytest.mark.parametrize(
    ("corners", "size"),
    [
        ([(0, 0), (512, 0), (1024, 0), (0, 512)], 512),
        ([(0, 0), (768, 0), (1024, 0), (1280, 0), (0, 512)], 256),  # with holes
        ([(0, 0), (256, 0), (512, 0), (103, 97), (359, 97), (615, 97)], 256),  # two grids, nothing in common
        ([(0, 0), (256, 0), (512, 0), (600, 0), (856, 0), (1112, 0)], 256),  # two grids in one row
        ([(0, 0), (100, 200)], None),
        ([(7, 7)], None),
    ],
)
def test_the_size_of_a_patch_follows_from_where_they_lie(corners, size):
    x, y = np.array(corners).T
    assert attention.patch_size(x, y) == size


def test_zones_of_a_drawn_slide():
    drawn = ["..oo", ".oTT", "ooTT", "oooT"]  # a dot is no tissue
    cells = [(x, y, c) for y, row in enumerate(drawn) for x, c in enumerate(row) if c != "."]
    x, y = (256 * np.array([cell[i] for cell in cells]) + 1000 for i in (0, 1))
    zone = attention.zones(x, y, np.array([c == "T" for *_, c in cells]))
    short = {"inside": "I", "edge": "E", "beside": "B", "away": "a"}
    found = {(cx, cy): short[z] for (cx, cy, _), z in zip(cells, zone, strict=True)}
    lines = ["".join(found.get((i, j), ".") for i in range(4)) for j in range(4)]
    assert lines == ["..BB", ".BEE", "aBEI", "aaBE"]


def test_the_tumour_is_the_one_that_was_planted(tiny):
    data, known = tiny.dataset("SARC"), attention.planted(tiny.study, "SARC")
    everything = truth(tiny.study, "SARC")
    for patient in data.splits.test(1)[:5]:
        table = attention.with_planted(attention.places(data, patient), known)
        own = everything[everything["patient_id"] == patient]
        assert table["tumour"].tolist() == own["tumour"].tolist()
        assert (table["zone"].isin(["inside", "edge"]) == table["tumour"]).all()
    moved = table.assign(x=table["x"] + 1)
    with pytest.raises(Refused, match="do not lie where they were drawn"):
        attention.with_planted(moved, known)
    assert attention.planted(load_study("tcga"), "COADREAD") == {}  # nobody has drawn the tumours of real patients


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    values, positive = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in values[positive] for b in values[~positive]]
    assert attention.auc(values, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(attention.auc(values, np.ones(40, bool)))


def test_effective_patches_and_the_most_attended_in_common():
    rising = np.arange(20.0)
    maps = {"first": rising / rising.sum(), "falling": rising[::-1] / rising.sum(), "even": np.full(20, 1 / 20)}
    maps["swapped"] = maps["first"][[19, *range(1, 19), 0]]  # of the two most attended, one is left
    maps |= {"one": np.eye(20)[3], "two": np.eye(20)[3] / 2 + np.eye(20)[4] / 2}
    table = attention.numbers(maps, pd.DataFrame(index=range(20))).set_index("method")
    assert table["overlap"].tolist()[:2] == [1, 0] and table.loc["swapped", "overlap"] == 0.5
    assert table["effective"].tolist()[2:] == pytest.approx([20, table["effective"].iloc[0], 1, 2])
    assert table.loc["two", "effective_share"] == pytest.approx(0.1) and set(table["chance"]) == {0.1}
    assert "auc" not in table


def test_numbers_of_a_patient():
    patches = pd.DataFrame({"tumour": [True, True, False, False], "zone": ["inside", "edge", "beside", "away"]})
    values = {"vanilla": np.array([0.1, 0.2, 0.3, 0.4]), "steph": np.array([0.6, 0.2, 0.15, 0.05])}
    found = attention.numbers(values, patches).set_index("method")
    assert found["auc"].tolist() == found["auc_gain"].tolist() == [0, 1]
    assert found["times_border"].tolist() == pytest.approx([1, 0.7])
    assert found["correlation"].tolist() == pytest.approx([1, -1])
    assert found["overlap"].tolist() == [1, 0] and set(found["chance"]) == {0.25}
    assert found["times_tumour"].tolist() == pytest.approx([0.6, 1.6])


def made(dataset="SARC"):
    """Four patients under two models; the second is ahead by 0.1 on average."""
    rows = [
        {"dataset": dataset, "fold": 0, "patient_id": f"P{i}", "method": m, "auc": a}
        for i, pair in enumerate([(0.5, 0.6), (0.6, 0.6), (0.7, 0.9), (0.8, 0.9)])
        for m, a in zip(("vanilla", "steph"), pair, strict=True)
    ]
    return pd.DataFrame(rows)


def test_means_and_gains_over_patients():
    from scipy.stats import ttest_1samp

    table = made()
    expected = ttest_1samp([0.1, 0, 0.2, 0.1], 0).confidence_interval(0.95)
    found = attention.gain(table, "auc")
    assert (found.value, found.low, found.high) == pytest.approx((0.1, expected.low, expected.high))
    rows = attention.by_method(table, "auc").set_index("method")
    assert rows["mean"].to_dict() == pytest.approx({"vanilla": 0.65, "steph": 0.75})
    several = pd.concat([table, made("LIHC").iloc[:2]], ignore_index=True)  # each data set counts once
    means = attention.by_method(several, "auc", ["dataset"]).set_index("method")["mean"]
    assert means.to_dict() == pytest.approx({"vanilla": (0.65 + 0.5) / 2, "steph": (0.75 + 0.6) / 2})
    table.loc[(table["patient_id"] == "P0") & (table["method"] == "steph"), "auc"] = np.nan  # is left out
    assert attention.by_method(table, "auc")["mean"].tolist() == pytest.approx([0.65, 0.8])
    assert attention.gain(table, "auc").value == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------ studies


def test_the_own_model_is_the_one_that_was_merged(tiny):
    chosen = attention.runs(tiny, ["SARC"], [1, 0], 7)  # of seed 7 nothing is finished
    assert [(r.method, r.fold, r.seed) for r in chosen] == [
        ("vanilla", 0, 42), ("steph", 0, 7), ("vanilla", 1, 42), ("steph", 1, 7),
    ]  # fmt: skip
    assert tiny.prerequisites(chosen[1])["(target)"] == chosen[0]
    with pytest.raises(Refused, match="unknown data set 'COADREAD'"):
        attention.runs(tiny, ["COADREAD"], [0], 42)


def test_patients_are_chosen_by_risk_or_by_name(tiny, monkeypatch):
    data, chosen = tiny.dataset("SARC"), attention.runs(tiny, ["SARC"], [0], 42)
    predicted = pd.read_csv(tiny.record(chosen[1]).file("predictions.csv"), float_precision="round_trip")
    predicted = predicted.set_index("patient_id")["risk"]
    table = attention.patients_to_show(tiny, chosen)
    assert table["patient_id"].tolist() == [predicted.idxmax(), predicted.idxmin()]
    assert table["place"].tolist() == [1, len(predicted)] and set(table["of"]) == {len(predicted)}
    one, elsewhere = data.splits.test(0)[1], data.splits.test(1)[0]
    row = attention.patients_to_show(tiny, chosen, [one]).iloc[0]
    assert (row["risk_steph"], row["n_patches"]) == (predicted[one], data.n_patches([one])[0])
    with pytest.raises(Refused, match=r"give folds = \[1\]"):
        attention.patients_to_show(tiny, chosen, [elsewhere])
    with pytest.raises(Refused, match="SARC has no such patient"):
        attention.patients_to_show(tiny, chosen, ["Elvis"])
    with pytest.raises(Refused, match="seed7 is not finished"):
        attention.patients_to_show(tiny, attention.runs(tiny, ["SARC"], [0], 7))
    once = attention.out_of_fold(tiny, chosen[:2])
    twice = pd.concat([once.assign(fold=5), once])  # cross-validation was repeated: each patient is shown once
    monkeypatch.setattr(attention, "out_of_fold", lambda *_: twice)
    assert attention.patients_to_show(tiny, chosen, [one])["fold"].tolist() == [0]


def test_every_test_patient_is_measured_once_and_the_table_kept(tiny, monkeypatch):
    chosen = attention.runs(tiny, ["SARC"], [0, 1], 42)
    table = attention.measured(tiny, chosen)
    data = tiny.dataset("SARC")
    methods = list(table["method"].unique())
    assert methods[:2] == ["vanilla", "steph"] and "joint" in methods and methods[-1] == "untrained"
    for fold in (0, 1):
        part = table[(table["fold"] == fold) & (table["method"] == "steph")]
        assert part["patient_id"].tolist() == data.splits.test(fold)
    own = table[table["method"] == "vanilla"]
    assert (own["overlap"] == 1).all() and own["correlation"].to_numpy() == pytest.approx(1)
    # One patient by hand, under the model of the fold that tests them.
    patient = data.splits.test(1)[3]
    found = attention.with_planted(map_of(tiny, "steph", 1, patient), attention.planted(tiny.study, "SARC"))
    row = table[(table["patient_id"] == patient) & (table["method"] == "steph")].iloc[0]
    assert row["auc"] == pytest.approx(attention.auc(found["attention"].to_numpy(), found["tumour"].to_numpy()))
    shares = found.groupby("zone")["attention"].sum() / found["zone"].value_counts(normalize=True)
    assert {zone: row[f"times_{zone}"] for zone in shares.index} == pytest.approx(shares.to_dict())
    monkeypatch.setattr(attention, "attention_of", lambda *_: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(attention.measured(tiny, chosen), table)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        attention.measured(tiny, chosen[:2])


def test_every_data_set_that_is_finished(tiny):
    over = attention.measured(tiny, attention.finished_runs(tiny, [0], 42))
    assert set(over["dataset"]) == set(tiny.study.datasets)
    assert set(over["method"]) == {"vanilla", "steph", *attention.OTHERS, "untrained"}
    labels = [text.get_text() for text in plots.attention_by_dataset(over).axes[0].get_yticklabels()]
    assert labels == list(over["dataset"].unique())
    plt.close("all")
    wide = attention.wide(over, attention.ON_TUMOUR, ["dataset"])
    assert wide["method"].tolist()[:2] == ["Vanilla", "STEPH"] and wide["AUC − Vanilla"][0] == ""
    assert attention.finished_runs(tiny, [0], 7) == [] and attention.measured(tiny, []).empty


def test_maps_of_patients(tiny):
    chosen = attention.runs(tiny, ["SARC"], [0, 1], 42)
    data = tiny.dataset("SARC")
    patients = attention.patients_to_show(tiny, chosen, [data.splits.test(1)[0], data.splits.test(0)[0]])
    maps, mixtures = attention.of_patients(tiny, chosen, patients)
    assert list(maps) == patients["patient_id"].tolist() and set(mixtures["patient_id"]) == set(maps)
    for row in patients.itertuples():
        expected = map_of(tiny, "steph", row.fold, row.patient_id)["attention"]
        np.testing.assert_array_equal(maps[row.patient_id]["attention_steph"], expected)
    assert set(attention.top_patches(maps, 3)["patient_id"]) == set(maps)


# ------------------------------------------------------------------------------------------------ real files


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A study of real layout: SARC with coordinates, LIHC from bare tensors without, large bags sampled."""
    manifest = {
        "extends": "tcga", "name": "rehearsal", "data_root": str(tmp_path / "data"), "folds": 2,
        "features": {"dim": 12, "folders": ["features/{dataset}"]}, "network": {"dim_emb": 8, "dim_attn": 6},
        "recipe": {"epochs": 1, "max_patches": 40}, "steph": {"dim_hidden": 8, "top_k": 1},
        "datasets": {name: {"projects": [name]} for name in ("SARC", "LIHC")},
    }  # fmt: skip
    (tmp_path / "rehearsal.yaml").write_text(yaml.safe_dump(manifest))
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("STEPH_DATA", raising=False)
    bench, rng = Workbench(tmp_path / "rehearsal.yaml"), np.random.default_rng(0)
    for name in ("SARC", "LIHC"):
        days = rng.integers(30, 3000, 40)
        rows = [
            [f"TCGA-{name}-{i:02}", f"TCGA-{name}-{i:02}-DX{k}", name, int(days[i]), i % 2]
            for i in range(40)
            for k in range(1 + i % 2)
        ]
        cohort = cohort_from(pd.DataFrame(rows, columns=COLUMNS), name, "made")
        write_cohort(cohort, tmp_path / "data" / "labels" / f"{name}.csv")
        files = fabricate(cohort, tmp_path / "data" / "features" / name, "clam", dim=12, mean_patches=40, seed=1)
        for path in files.values() if name == "LIHC" else []:
            path.unlink()
        pack_dataset(bench.study, name)
    run_all(bench, attention.runs(bench, ["SARC", "LIHC"], [0], 42), workers=1)
    return bench


def test_maps_of_packed_slides(real):
    chosen = attention.runs(real, ["SARC"], [0], 42)
    data = real.dataset("SARC")
    patients = attention.patients_to_show(real, chosen)
    maps, _ = attention.of_patients(real, chosen, patients)
    for table in maps.values():
        assert "tumour" not in table and len(table) <= 40
        for slide, part in table.groupby("slide_id", observed=True):
            stored = {tuple(pair) for pair in np.asarray(data.store.coords_of([slide])).tolist()}
            assert {tuple(pair) for pair in part[["x", "y"]].to_numpy(int).tolist()} <= stored
    table = attention.measured(real, chosen)
    assert "auc" not in table and len(table) == 3 * len(data.splits.test(0))
    assert attention.finished_runs(real, [0], 42) == []


def test_without_coordinates_there_are_numbers_and_a_clear_sentence_in_place_of_a_map(real):
    chosen = attention.runs(real, ["LIHC"], [0], 42)
    assert len(attention.measured(real, chosen)) == 3 * len(real.dataset("LIHC").splits.test(0))
    maps, _ = attention.of_patients(real, chosen, attention.patients_to_show(real, chosen))
    table = next(iter(maps.values()))
    assert table["x"].isna().all() and table["attention_steph"].sum() == pytest.approx(1)
    with pytest.raises(Refused, match=r"no attention map of patient TCGA-LIHC.* no coordinates of [12] of the [12]"):
        plots.attention_maps([table], ["P"], NAMES, 256)
    assert attention.top_patches(maps)["x"].isna().all()


def test_patches_are_drawn_where_they_lie_the_top_ringed_and_the_tumour_outlined(tiny):
    chosen, data = attention.runs(tiny, ["SARC"], [0], 42), tiny.dataset("SARC")
    patient = of_two_slides(data)
    maps, _ = attention.of_patients(tiny, chosen, attention.patients_to_show(tiny, chosen, [patient]))
    plots.set_style()
    fig, table = plots.attention_maps([maps[patient]], [patient], NAMES, 256), maps[patient]
    fig.canvas.draw()
    panels = [ax for ax in fig.axes if any(isinstance(c, PolyCollection) for c in ax.collections)][:6]
    columns = ["percentile_vanilla", "percentile_steph", "difference"]
    parts = [table[table["slide_id"] == slide] for slide in data.slides(patient)]
    for i, part in enumerate(parts):
        for ax, column in zip(panels[3 * i : 3 * i + 3], columns, strict=True):
            squares = next(c for c in ax.collections if isinstance(c, PolyCollection))
            np.testing.assert_allclose(squares.get_array(), part[column])
            boxes = np.array([path.vertices for path in squares.get_paths()])
            np.testing.assert_array_equal(boxes.min(axis=1), part[["x", "y"]].to_numpy(int))
            assert (np.ptp(boxes, axis=1) == 256).all()
            low, high = ax.get_ylim()
            assert low > high  # y points down, as on the slide
    words = [text.get_text() for text in fig.findobj(Text)]
    assert all(words.count(rank) == 2 for rank in "12345")  # once under each model
    assert any("slide 2 of 2" in word for word in words) and any("px" in word for word in words)
    lines = next(c for c in fig.axes[0].collections if isinstance(c, LineCollection) and len(c.get_segments()))
    cells = {(int(x), int(y)) for x, y in parts[0].loc[parts[0]["tumour"], ["x", "y"]].to_numpy(int)}
    shared = sum((x + 256, y) in cells for x, y in cells) + sum((x, y + 256) in cells for x, y in cells)
    assert len(lines.get_segments()) == 4 * len(cells) - 2 * shared
    plt.close("all")
