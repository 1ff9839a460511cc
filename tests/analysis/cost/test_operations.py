"""What methods cost in operations, against closed formulas, against counts of other tools, and on real numbers."""

import pytest
import torch

from steph import Refused
from steph.analysis.cost import operations
from steph.data.manifest import load_study
from steph.study.runs import Run
from steph.training.memory import live_bytes, random_bags

D, H, A, T, M = 1536, 512, 384, 32, 12
"""The paper's widths: features, embedding, attention, bins; and its sources."""
ENCODER = D * H + H + 2 * (H * A + A) + A + 1


def test_parameters_are_table_s4s(tiny):
    shown = operations.parameter_table(operations.counted(tiny), operations.counted(tiny, paper=False))
    assert len(shown) == 6 and (shown["counted (M)"].round(2) == shown["Table S4 (M)"]).all()
    by_title = shown.set_index("method")
    assert (by_title.loc[["STEPH", "Vanilla"], "counted (M)"] * 1e6).tolist() == [1_340_984, 1_197_729]
    for name, called in (("vanilla", "Vanilla"), ("steph", "STEPH")):  # those that the study's runs train
        info = tiny.record(Run("SARC", name, 0, tiny.study.seed)).info
        assert info["trained_parameters"] == by_title.loc[called, "in this study"]


def by_hand(n: int, m: int = M) -> dict[str, int]:
    """Operations of a prediction on n patches, from the equations."""
    layers = 2 * n * (D * H + 2 * H * A + A) + 2 * H * T
    abmil = layers + 2 * n * H  # and the weighted sum of the patches
    hyper = 2 * n * D * H + 2 * n * H + 2 * (2 * H * H + 2 * H * m)
    router = abmil - 2 * H * T + 2 * H * (m + 1)
    return {
        "vanilla": abmil,
        "hypernetwork_only": 2 * n * D * H + 2 * n * H + 2 * H * H + 2 * H * T,
        "steph": abmil + hyper + 2 * (2 + m) * ENCODER,  # M_0, the target and the sources
        "roupkt": (m + 1) * (abmil - 2 * H * T) + router + 5 * 2 * H * H + 2 * H * T,
    }


@pytest.mark.parametrize("n", [10_000, 777])
def test_products_are_those_of_the_equations(n):
    counted = operations.of_methods(list(by_hand(n)), n=n).set_index("method")["products"]
    assert counted.to_dict() == by_hand(n)


def test_layers_are_counted_as_table_s4_counts_them():
    counted = operations.of_methods(["vanilla", "transmil", "ilra", "r2t_mil", "patch_gcn", "steph"])
    table = operations.table_s4(counted).set_index("method")
    ratio = table["by layers ÷ Table S4"]
    assert (ratio.drop("STEPH") - 1).abs().max() < 0.006
    assert table.loc["STEPH", "GFLOPs by layers"] == pytest.approx(39.33, abs=0.005)  # D8: what other counters find too
    assert ratio["STEPH"] < 0.985
    true = table["GFLOPs in all"]
    assert true.round(1).to_dict() == {
        "Vanilla": 23.6, "TransMIL": 115.9, "ILRA": 55.1, "R2T-MIL": 44.4, "Patch-GCN": 33.4, "STEPH": 39.4
    }  # fmt: skip


def test_a_hypernetwork_that_reads_a_sample_saves_its_half():
    study, n = operations.paper_study(), operations.PATCHES
    whole, sample = (operations.prediction_products(name, study, n) for name in ("steph", "steph_subsampled"))
    assert whole - sample == 2 * (n - study.steph.sample_patches) * (D * H + H)


def test_what_is_merged_once_predicts_as_one_network_and_roupkt_as_fourteen():
    merged_once = ["model_average", "adamerging", "ties_am", "iso_c_am", "joint"]
    names = ["vanilla", "surgery_am", "steph", "roupkt", *merged_once]
    table = operations.of_methods(names, n=100).set_index("method")
    plain = table.loc["vanilla", ["layers", "products", "networks", "held"]].tolist()
    for name in merged_once:
        assert table.loc[name, ["layers", "products", "networks", "held"]].tolist() == plain
    assert table.loc["surgery_am", "products"] == plain[1] + 2 * 2 * H * 16
    assert table["networks"].loc[["steph", "roupkt"]].tolist() == [2, M + 2]
    assert table["trained"].loc[["steph", "roupkt", "model_average"]].tolist() == [1_340_984, 4_618_913, 0]
    assert table.loc["roupkt", "held"] == (M + 1) * 1_197_729 + 4_618_913


def test_shapes_alone_give_the_counts_of_real_numbers(tiny):
    study, n = tiny.study, 70
    names = operations.counted(tiny, paper=False)["method"]
    for row in operations.of_methods(names, study, n).itertuples():
        model = operations.deployed(row.method, study, "cpu")
        patches, fresh = (random_bags([n], study.features.dim, "cpu") for _ in range(2))
        assert operations.by_layers(model, patches) == row.layers, row.method
        assert operations.by_products(model, patches) == row.products, row.method
        # Shapes are a device of their own: indices are copied to it, and some operations are made of others there.
        assert live_bytes(model, fresh) == pytest.approx(row.memory, rel=0.1), row.method


def test_the_models_counted_are_those_that_runs_train(tiny):
    for name in ("steph", "adamerging", "roupkt", "transmil"):
        run = Run("LIHC", name, 0, tiny.study.seed)
        own = tiny.untrained(run)
        counted = operations.built(name, tiny.study, "cpu")
        assert operations.trained_numbers(own) == operations.trained_numbers(counted)
        patches = random_bags([50], tiny.study.features.dim, "cpu")
        assert operations.by_products(own.eval(), patches) == operations.by_products(counted.eval(), patches), name


def test_a_pass_back_costs_what_the_equations_say():
    n = 100
    counted = operations.training_operations(["vanilla", "steph", "surgery_am", "model_average"], n=n)
    head, forward = 2 * H * T, by_hand(n)
    # To the weights of each layer, and to what each but the first reads; features get no gradient.
    own = forward["vanilla"] + 2 * n * (D * H + 2 * (2 * H * A + A)) + 2 * (2 * n * H) + 2 * head
    assert counted["vanilla"] == own
    hyper = 2 * n * D * H + 2 * n * H + 2 * 2 * (2 * H * H + 2 * H * M)
    merging = 2 * (1 + M) * ENCODER
    # The attention's scores are weighed without a product there.
    assert counted["steph"] == forward["steph"] + own - forward["vanilla"] - 2 * n * A + hyper + merging
    assert counted["surgery_am"] == counted["model_average"] == 0
    # ROUPKT trains its router, the 5 experts that a bag chose and a head; its 13 models' features are there already.
    router = own - 2 * 2 * H * T + 2 * 2 * H * (M + 1)
    experts = operations.training_operations(["roupkt"], n=n)["roupkt"] - router
    assert 2 * 5 * 2 * H * H < experts < 4 * 5 * 2 * H * H


def test_chance_outside_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = operations.deployed("steph", load_study("tiny"), "cpu").head.weight
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, operations.deployed("steph", load_study("tiny"), "cpu").head.weight)
    with pytest.raises(Refused, match="asks for 6 source cancers"):
        operations.built("steph_m6", load_study("tiny"))


def test_memory_in_half_precision_is_counted_where_shapes_allow_it():
    study = operations.paper_study()
    for name, halved in (("vanilla", True), ("transmil", False)):  # TransMIL's layers choose their precision themselves
        single, half = (operations.prediction_memory(name, study, 3000, p) for p in ("fp32", "bf16"))
        assert half < 0.7 * single if halved else half == single


def test_roupkt_needs_what_one_of_its_networks_needs_or_its_experts():
    """It asks one network after the other; on a small bag the experts' stacked weights (5 MB) are the most."""
    study = operations.paper_study()
    few, many = ([operations.prediction_memory(m, study, n) for m in ("vanilla", "roupkt")] for n in (100, 10_000))
    assert few[0] < 1e6 < 5 * 512 * 512 * 4 <= few[1] < 6e6
    assert many[0] == many[1] > 60e6
