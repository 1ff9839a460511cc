"""Seconds of epochs and predictions: measured in rounds, kept, told as ratios."""

import pandas as pd
import pytest

from steph import Refused
from steph.analysis.cost import operations, timing
from steph.study.runs import Run, Workbench
from steph.training.device import PRECISIONS


def test_epochs_are_timed_in_rounds_and_kept(tiny):
    runs = timing.epoch_runs(tiny, "SARC", 0, tiny.study.seed)
    assert [run.method for run in runs] == [
        "vanilla", "model_average", "adamerging", "ties_am", "surgery_am", "iso_c_am", "steph"
    ]  # fmt: skip
    times = timing.epoch_times(tiny, runs)
    rounds = times.groupby("method")["round"].agg(list).map(sorted)
    assert all(of == list(range(len(of))) and timing.LEAST <= len(of) <= timing.MOST for of in rounds)
    idle = times["method"] == "model_average"
    assert (times.loc[~idle, "seconds"] > 0).all() and (times.loc[idle, "seconds"] == 0).all()
    assert timing.epoch_times(tiny, runs).equals(times)
    assert timing.prerequisites(tiny, runs)[0] == Run("SARC", "vanilla", 0, tiny.study.seed)
    with pytest.raises(Refused, match="is not finished"):
        timing.epoch_times(tiny, [Run("SARC", "steph", 0, 5, "fp64")])
    with pytest.raises(Refused, match="expected cpu"):
        timing.epoch_times(Workbench(tiny.study, "tpu"), runs)


def timed() -> pd.DataFrame:
    """Two rounds: in the second the machine is twice as slow."""
    seconds = {"adamerging": 1, "surgery_am": 0.2, "steph": 1.5, "steph_m6": 1.4, "steph_m12": 1.6, "model_average": 0}
    rows = [(m, i, s * (i + 1), "x") for i in range(2) for m, s in seconds.items()]
    return pd.DataFrame(rows, columns=["method", "round", "seconds", "device"])


def test_ratios_are_taken_round_by_round_and_surgery_has_two_stages():
    ratios = timing.epoch_ratios(timed(), "adamerging")
    assert ratios.loc["steph", ["ratio", "low", "high"]].tolist() == [1.5] * 3  # a slow round slows both
    assert ratios.loc["surgery_am", "ratio"] == pytest.approx(1.2)
    with pytest.raises(Refused, match="no epochs of 'vanilla'"):
        timing.epoch_ratios(timed(), "vanilla")
    with pytest.raises(Refused, match="no epochs of 'model_average'"):
        timing.epoch_ratios(timed(), "model_average")


def test_what_varies_from_round_to_round_is_not_measurable():
    """Slow rounds slow both alike and are harmless; a ratio that itself varies is not printed as one."""
    rounds = pd.DataFrame({"round": range(5), "vanilla": [1, 2, 1, 3, 1], "steph": [2, 4, 2, 6, 2.1]})
    rounds["roupkt"] = [0.5, 3, 1, 6, 0.6]
    times = rounds.melt("round", var_name="method", value_name="seconds").assign(patches=1000, memory=0)
    times["products"] = times["method"].map({"vanilla": 1, "steph": 2, "roupkt": 14})
    more = times.assign(patches=500, seconds=times["seconds"].where(times["method"] == "vanilla", 3 * times["seconds"]))
    costs = timing.prediction_costs(pd.concat([times, more])).set_index(["patches", "method"])
    steph = costs.loc[(1000, "steph")]
    assert steph["ratio"] == steph["operations"] == 2 and not timing.is_wide(steph["low"], steph["high"])
    assert costs.loc[(500, "steph"), "ratio"] == 6 and costs.loc[(500, "steph"), "operations"] == 2
    shown = timing.prediction_table(costs.loc[1000].reset_index().assign(patches=1000)).set_index("method")["× Vanilla"]
    assert shown["STEPH"] == "2.00 (2.00 to 2.00)" and shown["ROUPKT"] == "not measurable here (0.60 to 1.50)"


def test_the_papers_ratios_stand_beside_ours():
    counted = {"adamerging": 10, "steph": 16, "surgery_am": 0, "model_average": 0}
    shown = timing.epoch_table(timed(), "table_s6", "adamerging", counted).set_index("method")
    assert list(shown.index) == ["Model Avg.", "AdaMerging", "Surgery AM", "STEPH"]
    assert shown.loc["STEPH", "× AdaMerging"] == "1.50 (1.50 to 1.50)"
    assert shown.loc["STEPH", "× AdaMerging (paper)"] == pytest.approx(80.45 / 78.08)
    assert shown.loc["STEPH", "× AdaMerging (operations)"] == 1.6
    assert shown.loc["Surgery AM", "× AdaMerging (operations)"] == 1
    assert shown.loc[["Surgery AM", "STEPH"], "seconds (median)"].tolist() == pytest.approx([1.8, 2.25])
    by_sources = timing.epoch_table(timed(), "table_s7", "steph_m6", {"steph_m6": 1, "steph_m12": 2})
    assert by_sources["× STEPH, m = 6 (paper)"].tolist() == [1, pytest.approx(76.69 / 72.91)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predictions_are_timed_at_the_papers_dimensions_and_kept(tiny, monkeypatch, precision):
    counted = operations.of_methods(["vanilla", "transmil", "patch_gcn", "roupkt"], n=100)
    monkeypatch.setattr(timing, "counted", lambda bench: counted)
    formats, random_bags = set(), timing.random_bags
    monkeypatch.setattr(timing, "random_bags", lambda *a: formats.add(a[-1]) or random_bags(*a))
    bench = Workbench(tiny.study, precision=precision)
    times = timing.prediction_times(bench)
    assert formats == {PRECISIONS[precision]}
    assert times.groupby("method")["round"].nunique().ge(timing.LEAST).all() and (times["seconds"] > 0).all()
    memory = times.drop_duplicates("method").set_index("method")["memory"]
    assert memory["vanilla"] == operations.prediction_memory("vanilla", operations.paper_study(), 100, precision)
    assert timing.prediction_times(bench).equals(times)
    shown = timing.prediction_table(timing.prediction_costs(times)).set_index("method")
    assert shown.loc["Vanilla", ["× Vanilla", "× Vanilla (operations)"]].tolist() == ["1.00 (1.00 to 1.00)", 1]
    assert shown.loc["ROUPKT", "× Vanilla (operations)"] > 13


def test_methods_that_predict_alike_are_timed_once(tiny, monkeypatch):
    monkeypatch.setattr(timing, "measured", lambda bench, name, inputs, measure: {name for name, _ in inputs["jobs"]})
    names = timing.prediction_times(tiny)
    assert {"vanilla", "transmil", "patch_gcn", "roupkt", "steph", "steph_subsampled", "hypernetwork_only"} <= names
    assert not {"model_average", "adamerging", "joint"} & names


def test_samples_are_timed_and_counted_beside_the_whole(tiny, monkeypatch):
    monkeypatch.setattr(timing, "BAGS", (2000, 4000))  # a tenth of it in a study for tests
    times = timing.sampling_times(tiny)
    products = times.drop_duplicates(["patches", "method"]).set_index(["patches", "method"])["products"]
    assert set(products.index) == {
        (200, "vanilla"), (200, "steph"), (400, "vanilla"), (400, "steph"), (400, "steph_r256")
    }  # fmt: skip
    assert times.groupby(["patches", "method"])["round"].nunique().ge(timing.LEAST).all()
    counted = operations.of_methods(["vanilla", "steph"], n=400).set_index("method")["products"]
    assert products[400, "vanilla"] == counted["vanilla"] and products[400, "steph"] == counted["steph"]
    assert products[400, "steph"] - products[400, "steph_r256"] == 2 * (400 - 256) * (1536 * 512 + 512)
