"""What methods cost, against closed formulas, against counts of other tools, and on small bags with real numbers."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from steph import Refused
from steph.analysis import efficiency
from steph.data.bags import RaggedBatch
from steph.data.manifest import load_study
from steph.methods import METHODS
from steph.results import paper_table
from steph.runs import Run

D, H, A, T, M = 1536, 512, 384, 32, 12
"""The paper's widths: features, embedding, attention, bins; and its sources."""
ENCODER = D * H + H + 2 * (H * A + A) + A + 1


def test_parameters_are_table_s4s():
    printed = paper_table("table_s4").set_index("method")["learnable_params_m"].to_dict()
    counted = efficiency.learnable_parameters()
    assert {METHODS[name].table["table_s4"]: round(n / 1e6, 2) for name, n in counted.items()} == printed
    assert counted["steph"] == 1_340_984 and counted["vanilla"] == 1_197_729


def test_parameters_of_a_study_are_those_that_its_runs_train(tiny):
    counted = efficiency.learnable_parameters(tiny.study)
    for name in ("vanilla", "steph"):
        assert tiny.record(Run("SARC", name, 0, tiny.study.seed)).info["trained_parameters"] == counted[name]
    table = efficiency.parameter_table(load_study("tcga")).set_index("method")
    assert (table["counted (M)"] * 1e6 == table["in this study"]).all()


def by_hand(n: int, m: int = M) -> dict[str, int]:
    """Operations of a prediction on n patches, from the equations."""
    layers = 2 * n * (D * H + 2 * H * A + A) + 2 * H * T
    abmil = layers + 2 * n * H  # and the weighted sum of the patches
    hyper = 2 * n * D * H + 2 * n * H + 2 * (2 * H * H + 2 * H * m)
    router = abmil - 2 * H * T + 2 * H * (m + 1)
    return {
        "vanilla": abmil,
        "hypernetwork_only": 2 * n * D * H + 2 * n * H + 2 * H * H + 2 * H * T,
        "steph": abmil + hyper + 2 * (1 + m) * ENCODER,
        "roupkt": (m + 1) * (abmil - 2 * H * T) + router + 5 * 2 * H * H + 2 * H * T,
    }


@pytest.mark.parametrize("n", [10_000, 777])
def test_products_are_those_of_the_equations(n):
    counted = efficiency.operations(list(by_hand(n)), n=n).set_index("method")["products"]
    assert counted.to_dict() == by_hand(n)


def test_layers_are_counted_as_table_s4_counts_them():
    counted = efficiency.operations(["vanilla", "transmil", "ilra", "r2t_mil", "patch_gcn", "steph"])
    table = efficiency.operations_table(counted).set_index("method")
    ratio = table["by layers ÷ Table S4"]
    assert (ratio.drop("STEPH") - 1).abs().max() < 0.005
    assert table.loc["STEPH", "GFLOPs by layers"] == pytest.approx(39.33, abs=0.005)  # D8: what other counters find too
    assert ratio["STEPH"] < 0.985
    true = table["GFLOPs in all"]
    assert true.round(1).to_dict() == {
        "Vanilla": 23.6, "TransMIL": 116.2, "ILRA": 55.1, "R2T-MIL": 44.4, "Patch-GCN": 33.4, "STEPH": 39.4
    }  # fmt: skip


def test_a_hypernetwork_that_reads_a_sample_saves_its_half():
    study, n = efficiency.paper_study(), efficiency.PATCHES
    whole, sample = (efficiency.counts(name, study)["products"] for name in ("steph", "steph_subsampled"))
    assert whole - sample == 2 * (n - study.steph.sample_patches) * (D * H + H)


def test_what_is_merged_once_predicts_as_one_network_and_roupkt_as_fourteen():
    table = efficiency.operations(study=efficiency.paper_study(), n=100).set_index("method")
    plain = table.loc["vanilla", ["layers", "products", "networks", "held"]].tolist()
    for name in ("model_average", "adamerging", "ties_am", "iso_c_am", "joint"):
        assert table.loc[name, ["layers", "products", "networks", "held"]].tolist() == plain
    assert table.loc["surgery_am", "products"] == plain[1] + 2 * 2 * H * 16
    assert table["networks"].loc[["steph", "roupkt"]].tolist() == [2, M + 2]
    assert table["trained"].loc[["steph", "roupkt", "model_average"]].tolist() == [1_340_984, 4_618_913, 0]
    assert table.loc["roupkt", "held"] == (M + 1) * 1_197_729 + 4_618_913


def test_shapes_alone_give_the_counts_of_real_numbers(tiny):
    study, n = tiny.study, 70
    for name in efficiency.predicting(study):
        model = efficiency.deployed(name, study, "cpu")
        patches = efficiency.bag(n, study.features.dim, "cpu")
        counts = efficiency.counts(name, study, n)
        assert efficiency.by_layers(model, patches) == counts["layers"], name
        assert efficiency.by_products(model, patches) == counts["products"], name
        fresh = efficiency.bag(n, study.features.dim, "cpu")
        # Shapes are a device of their own: indices are copied to it, and some operations are made of others there.
        assert efficiency.live_bytes(model, fresh) == pytest.approx(counts["memory"], rel=0.1), name


def test_the_models_counted_are_those_that_runs_train(tiny):
    for name in ("steph", "adamerging", "roupkt", "transmil"):
        run = Run("LIHC", name, 0, tiny.study.seed)
        own = tiny.untrained(run)
        counted = efficiency.built(name, tiny.study, "cpu")
        assert efficiency.trained_numbers(own) == efficiency.trained_numbers(counted)
        patches = efficiency.bag(50, tiny.study.features.dim, "cpu")
        assert efficiency.by_products(own.eval(), patches) == efficiency.by_products(counted.eval(), patches), name


def test_a_pass_back_costs_what_the_equations_say():
    n = 100
    counted = efficiency.training_operations(["vanilla", "steph", "surgery_am", "model_average"], n=n)
    head, forward = 2 * H * T, by_hand(n)
    # To the weights of each layer, and to what each but the first reads; features get no gradient.
    own = forward["vanilla"] + 2 * n * (D * H + 2 * (2 * H * A + A)) + 2 * (2 * n * H) + 2 * head
    assert counted["vanilla"] == own
    hyper = 2 * n * D * H + 2 * n * H + 2 * 2 * (2 * H * H + 2 * H * M)
    merging = 2 * (1 + M) * ENCODER
    # The attention's scores are weighed without a product there.
    assert counted["steph"] == forward["steph"] + own - forward["vanilla"] - 2 * n * A + hyper + merging
    assert counted["surgery_am"] == counted["model_average"] == 0
    with pytest.raises(Refused, match="which experts"):
        efficiency.training_operations(["roupkt"])


def test_memory_is_what_lives_at_one_time():
    class Chain(torch.nn.Module):
        def forward(self, patches: RaggedBatch) -> torch.Tensor:
            one = patches.features + 1  # 1 alive
            two = one * 2  # 2
            del one
            three = two[:, :1] + patches.features  # 2, a view costs nothing
            return three.add_(1).sum()

    patches = efficiency.bag(64, 100, "cpu")
    assert efficiency.live_bytes(Chain(), patches) == 2 * 64 * 100 * 4 + 4  # and the sum


def test_chance_outside_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = efficiency.deployed("steph", load_study("tiny"), "cpu").head.weight
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, efficiency.deployed("steph", load_study("tiny"), "cpu").head.weight)
    with pytest.raises(Refused, match="asks for 6 source cancers"):
        efficiency.built("steph_m6", load_study("tiny"))


def test_epochs_are_timed_in_rounds_and_kept(tiny):
    runs = efficiency.epoch_runs(tiny.study, "SARC", 0, tiny.study.seed)
    assert [run.method for run in runs] == [
        "vanilla", "model_average", "adamerging", "ties_am", "surgery_am", "iso_c_am", "steph"
    ]  # fmt: skip
    times = efficiency.epoch_times(tiny, runs, budget=0)
    assert all(sorted(rounds) == list(range(efficiency.LEAST)) for _, rounds in times.groupby("method")["round"])
    idle = times["method"] == "model_average"
    assert (times.loc[~idle, "seconds"] > 0).all() and (times.loc[idle, "seconds"] == 0).all()
    # Surgery's frozen features are computed before its epoch, not in it.
    once = times.groupby("method")["once"].min()
    assert once["surgery_am"] > times.loc[times["method"] == "surgery_am", "seconds"].min()
    assert efficiency.epoch_times(tiny, runs, budget=0).equals(times)
    assert efficiency.first(tiny, runs)[0] == Run("SARC", "vanilla", 0, tiny.study.seed)
    with pytest.raises(Refused, match="is not finished"):
        efficiency.epoch_times(tiny, [Run("SARC", "steph", 0, 5, "fp64")], budget=0)
    with pytest.raises(Refused, match="expected cpu"):
        efficiency.epoch_times(tiny, runs, "tpu")


def timed() -> pd.DataFrame:
    """Two rounds: in the second the machine is twice as slow."""
    seconds = {
        "adamerging": 1.0,
        "surgery_am": 0.2,
        "steph": 1.5,
        "steph_m6": 1.4,
        "steph_m12": 1.6,
        "model_average": 0,
    }
    rows = [(m, i, s * (i + 1), 0.0, "x") for i in range(2) for m, s in seconds.items()]
    return pd.DataFrame(rows, columns=["method", "round", "seconds", "once", "device"])


def test_ratios_are_taken_round_by_round_and_surgery_has_two_stages():
    ratios = efficiency.epoch_ratios(timed(), "adamerging").set_index("method")
    assert ratios.loc["steph", ["ratio", "low", "high"]].tolist() == [1.5] * 3  # a slow round slows both
    assert ratios.loc["surgery_am", "ratio"] == pytest.approx(1.2)
    table = efficiency.epoch_summary(timed()).set_index("method")
    assert table.loc["surgery_am", "median"] == pytest.approx(1.8)
    assert table.loc["steph", ["median", "mean", "epochs", "device"]].tolist() == [2.25, 2.25, 2, "x"]
    with pytest.raises(Refused, match="no epochs of 'vanilla'"):
        efficiency.epoch_ratios(timed(), "vanilla")
    with pytest.raises(Refused, match="no epochs of 'model_average'"):
        efficiency.epoch_ratios(timed(), "model_average")


def test_the_papers_ratios_stand_beside_ours():
    counted = {"adamerging": 10, "steph": 16, "surgery_am": 0, "model_average": 0}
    shown = efficiency.epoch_table(timed(), "table_s6", "adamerging", counted).set_index("method")
    assert list(shown.index) == ["Model Avg.", "AdaMerging", "Surgery AM", "STEPH"]
    assert shown.loc["STEPH", "× AdaMerging (paper)"] == pytest.approx(80.45 / 78.08)
    assert shown.loc["STEPH", "× AdaMerging (operations)"] == 1.6
    assert shown.loc["Surgery AM", "× AdaMerging (operations)"] == 1
    by_sources = efficiency.epoch_table(timed(), "table_s7", "steph_m6")
    assert by_sources["× STEPH, m = 6 (paper)"].tolist() == [1, pytest.approx(76.69 / 72.91)]


def test_predictions_are_timed_at_the_papers_dimensions_and_kept(tiny):
    names = ["vanilla", "patch_gcn", "steph", "roupkt"]
    times = efficiency.prediction_times(tiny, names, n=64, budget=0)
    assert times.groupby("method")["round"].nunique().eq(efficiency.LEAST).all() and (times["seconds"] > 0).all()
    memory = times.drop_duplicates("method").set_index("method")["memory"]
    assert memory["vanilla"] == efficiency.counts("vanilla", efficiency.paper_study(), 64)["memory"]
    assert efficiency.prediction_times(tiny, names, n=64, budget=0).equals(times)
    shown = efficiency.prediction_table(times, efficiency.operations(names, n=64)).set_index("method")
    assert shown.loc["Vanilla", ["× Vanilla", "× Vanilla (operations)"]].tolist() == [1, 1]
    assert shown.loc["ROUPKT", "× Vanilla (operations)"] > 13


def test_fig_2_has_the_papers_numbers_and_ours():
    counted = efficiency.operations(["vanilla", "roupkt", "steph", "model_average"])
    paper = efficiency.paper_performance_and_cost(counted).set_index("method")
    assert paper.loc["steph", ["c_index", "gflops", "printed"]].tolist() == [0.6949, 40.1, True]
    assert not paper.loc["roupkt", "printed"] and paper.loc["roupkt", "gflops"] == pytest.approx(330.4, abs=0.05)
    rows = [(d, m, k, c + 0.1 * k) for d in ("A", "B") for k in (0, 1) for m, c in (("vanilla", 0.6), ("steph", 0.7))]
    results = pd.DataFrame([*rows, ("A", "vanilla", 2, 0.0)], columns=["dataset", "method", "fold", "c_index"])
    results["external_c_index"] = None
    here = efficiency.performance_and_cost(results, counted).set_index("method")
    assert here["c_index"].tolist() == [pytest.approx(0.65), pytest.approx(0.75)]  # on the folds that both have
    with pytest.raises(Refused, match="in common"):
        efficiency.performance_and_cost(results.assign(c_index=None), counted)
