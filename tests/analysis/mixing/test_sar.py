"""Subspace alignment: the released numbers, the two rank rules, baselines that share nothing."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from steph import Refused
from steph.analysis.mixing import sar
from steph.analysis.mixing.pairs import models
from steph.data.manifest import load_study
from steph.merging.iso import iso_c
from steph.merging.task_vectors import task_vector
from steph.study.runs import TARGET, Run, Workbench

OURS = {"code": "released", "paper": "paper"}
ALPHAS = {"a95": 0.95, "a90": 0.90, "a99": 0.99}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("level", ALPHAS)
def test_ranks_and_ratios_are_the_references(reference, rule, level):
    g = reference("g_sar")
    compared = 0
    for case in g["case_names"]:
        target, new = g.tensor(f"{case}__tau_t"), g.tensor(f"{case}__tau_new")
        values = sar.left_singular(new)[1]
        assert sar.dominant_rank(values, ALPHAS[level], OURS[rule]) == g[f"{case}__rank_{rule}_{level}"], case
        name = f"{case}__sar_{rule}_{level}"
        if name not in g.arrays:  # equal singular values, cut through: the reference holds none either
            assert case == "isotropic_new" and rule == "code"
            continue
        found = sar.subspace_alignment_ratio(target, new, ALPHAS[level], OURS[rule])
        assert found == pytest.approx(float(g[name]), abs=1e-12), case
        compared += 1
    assert compared >= 12


@pytest.mark.parametrize("rule", OURS)
def test_ranks_of_spectra_are_the_references(reference, rule):
    g = reference("g_sar")
    names = [n for n in g["spec_names"] if not n.startswith(("exact_equal", "int_equal"))]  # rounding decides those
    assert len(names) == 9
    for name in names:
        for level, alpha in ALPHAS.items():
            found = sar.dominant_rank(g.tensor(f"spec_{name}"), alpha, OURS[rule])
            assert found == g[f"spec_{name}__rank_{rule}_{level}"], (name, level)


def test_edges_of_the_rank_rules(reference):
    g = reference("g_sar")
    zeros, falling = torch.zeros(4), torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert sar.dominant_rank(zeros) == g["zero_spectrum_rank_code_a95"] == 1
    assert sar.dominant_rank(zeros, rank_rule="paper") == 1
    assert sar.dominant_rank(falling, 1.0) == g["rank_code_a100_of_321"] == 1  # never exceeded
    assert sar.dominant_rank(falling, 1.0, "paper") == 3
    assert sar.dominant_rank(falling * 1e200) == sar.dominant_rank(falling) == 2
    assert sar.dominant_rank(falling * 1e-200, rank_rule="paper") == 3


@pytest.mark.parametrize("alpha", [0.3, 0.8, 0.95])
def test_the_papers_rule_never_keeps_fewer(alpha):
    for seed in range(20):
        values = sar.left_singular(gaussian(9, 14, seed=seed) ** 3)[1]
        assert sar.dominant_rank(values, alpha, "paper") >= sar.dominant_rank(values, alpha)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (7, 7), (1, 5), (5, 1)])
def test_left_singular_vectors_are_those_of_the_svd(shape):
    matrix = gaussian(*shape)
    left, values = sar.left_singular(matrix)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values, s, rtol=1e-12, atol=0)
    torch.testing.assert_close((left.T @ u).abs(), torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-9)


def test_small_directions_of_a_wide_matrix_keep_their_digits():
    """The eigenvectors of matrix @ matrix.T would lose everything below 1e-8 of the largest singular value."""
    u, v = torch.linalg.qr(gaussian(8, 8))[0], torch.linalg.qr(gaussian(30, 8, seed=1))[0]
    true = torch.logspace(0, -12, 8, dtype=torch.float64)
    left, values = sar.left_singular(u * true @ v.T)
    torch.testing.assert_close(values, true, rtol=1e-2, atol=0)
    assert (left[:, -1] @ u[:, -1]).abs() > 0.99


def test_a_task_vector_is_aligned_with_itself_by_more_than_its_rule_says():
    tau = gaussian(16, 24)
    assert 0.95 < sar.subspace_alignment_ratio(tau, tau) < 1
    assert sar.subspace_alignment_ratio(tau, tau, rank_rule="paper") >= math.sqrt(1 - 0.05**2)


def test_one_row_is_always_aligned_and_disjoint_directions_never():
    assert sar.subspace_alignment_ratio(gaussian(1, 9), gaussian(1, 9, seed=1)) == pytest.approx(1)
    top, bottom = torch.zeros(6, 9), torch.zeros(6, 9)
    top[:3], bottom[3:] = gaussian(3, 9), gaussian(3, 9, seed=1)
    for rule in sar.RANK_RULES:
        assert sar.subspace_alignment_ratio(top, bottom, rank_rule=rule) == pytest.approx(0, abs=1e-12)


def test_iso_c_has_every_direction_alike():
    t, s = gaussian(12, 20), gaussian(12, 20, seed=1)
    merged = iso_c({"w": t}, {"w": s})["w"]
    values = sar.left_singular(merged)[1]
    assert (values.max() - values.min()) < 1e-12
    assert sar.dominant_rank(values, rank_rule="paper") == 12 > sar.dominant_rank(values) == 11
    assert sar.subspace_alignment_ratio(t, merged, rank_rule="paper") == pytest.approx(1)


@pytest.mark.parametrize(
    ("target", "new", "options", "message"),
    [
        (gaussian(3, 4), gaussian(4, 3), {}, "both must have one shape"),
        (gaussian(3), gaussian(3), {}, r"matrix \(r, c\)"),
        (gaussian(3, 4), torch.zeros(3, 4), {}, "tau_new is zero"),
        (torch.zeros(3, 4), gaussian(3, 4), {}, "tau_target is zero"),
        (gaussian(3, 4), gaussian(3, 4) / 0, {}, "not finite"),
        (gaussian(3, 4), gaussian(3, 4), {"alpha": 1.5}, "0 < alpha <= 1"),
        (gaussian(3, 4), gaussian(3, 4), {"alpha": float("nan")}, "0 < alpha <= 1"),
        (gaussian(3, 4), gaussian(3, 4), {"rank_rule": "papers"}, "Did you mean paper"),
    ],
)
def test_what_cannot_be_compared_is_refused(target, new, options, message):
    with pytest.raises(Refused, match=message):
        sar.subspace_alignment_ratio(target, new, **options)


def test_a_curve_ends_at_the_source_and_at_the_target():
    t, s = gaussian(16, 24), gaussian(16, 24, seed=1)
    curve = sar.mixture_curve(t, s)
    assert len(curve) == 2 * 26 and curve["lambda"].unique().tolist()[:2] == [0, 0.04]
    for rule in sar.RANK_RULES:
        of = curve[curve["rule"] == rule].set_index("lambda")["sar"]
        assert of[0.0] == pytest.approx(sar.subspace_alignment_ratio(t, s, rank_rule=rule), abs=1e-12)
        assert of[1.0] == pytest.approx(sar.subspace_alignment_ratio(t, t, rank_rule=rule), abs=1e-12)
        mixed = sar.subspace_alignment_ratio(t, 0.4 * t + 0.6 * s, rank_rule=rule)
        assert of[0.4] == pytest.approx(mixed, abs=1e-12)
    pd.testing.assert_frame_equal(curve, sar.mixture_curve(t, s))


def test_a_turned_matrix_keeps_its_spectrum_and_nothing_else():
    matrix = gaussian(16, 24)
    found = sar.turned(matrix, "ab12")
    torch.testing.assert_close(sar.left_singular(found)[1], sar.left_singular(matrix)[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(found, sar.turned(matrix, "ab12")) and not torch.equal(found, sar.turned(matrix, "ab13"))
    ratios = [sar.subspace_alignment_ratio(matrix, sar.turned(matrix, f"{i:x}")) for i in range(40)]
    chance = math.sqrt(sar.dominant_rank(sar.left_singular(matrix)[1]) / 16)
    assert np.mean(ratios) == pytest.approx(chance, abs=0.03)


def test_the_attention_layer_is_both_gates_side_by_side():
    embed, tanh, sigmoid = gaussian(4, 6), gaussian(3, 4), gaussian(3, 4) + 1
    tau = {"embed.weight": embed, "gate_tanh.weight": tanh, "gate_sigmoid.weight": sigmoid}
    assert torch.equal(sar.layer_matrix(tau, sar.ATTENTION), torch.cat([tanh, sigmoid], dim=1))
    assert torch.equal(sar.layer_matrix(tau, sar.EMBEDDING), embed)


def made_curves(attention: float = 0.9, rotated: float = 0.7) -> pd.DataFrame:
    """Two pairs; at lambda 0.5 the attention layer has `attention`, the embedding 0.8, rotated sources `rotated`."""
    rows = []
    for source in ("A", "B"):
        for layer, own in ((sar.EMBEDDING, 0.8), (sar.ATTENTION, attention)):
            for rule in sar.RANK_RULES:
                for kind, draw, *values in [
                    ("source", 0, 0.5, own, 0.96), ("noise", 0, 0.3, 0.85, 0.96),
                    ("rotated", 0, 0.2, rotated - 0.1, 0.96), ("rotated", 1, 0.4, rotated + 0.1, 0.96),
                ]:  # fmt: skip
                    curve = zip((0.0, 0.5, 1.0), values, strict=True)
                    rows += [("T", source, layer, kind, draw, share, rule, value, 4, 16) for share, value in curve]
    names = ["target", "source", "layer", "kind", "draw", "lambda", "rule", "sar", "rank", "rows"]
    return pd.DataFrame(rows, columns=names)


def test_curves_are_read():
    read = sar.reading(made_curves())
    assert len(read) == 8
    row = read[(read["source"] == "B") & (read["layer"] == sar.ATTENTION) & (read["rule"] == "paper")].iloc[0]
    expected = {
        "at": 0.9, "zero": 0.5, "rotated": 0.7, "rotated_zero": 0.3, "noise": 0.85, "gain": 0.2, "gain_zero": 0.2,
        "rank": 4, "rows": 16,
    }  # fmt: skip
    assert row[list(expected)].astype(float).to_dict() == pytest.approx(expected)


def test_the_layers_are_compared_pair_by_pair_and_with_what_chance_gives():
    compared = sar.attention_against_embedding(sar.reading(made_curves())).set_index(["rule", "quantity"])
    at = compared.loc[("released", "at")]
    assert (at["attention"], at["embedding"], at["wins"], at["pairs"]) == (pytest.approx(0.9), pytest.approx(0.8), 2, 2)
    assert compared.loc[("released", "rotated"), "wins"] == 0
    less = sar.attention_against_embedding(sar.reading(made_curves(attention=0.7))).set_index(["rule", "quantity"])
    assert less.loc[("paper", "at"), "wins"] == 0
    lines = sar.take_away(compared.reset_index(), "released")
    assert "0.900 in the attention layer, 0.800 in the embedding, larger in the attention for 2" in lines[0]
    assert "differ by +0.100, and by +0.000 where nothing is shared" in lines[0]


def test_curves_of_a_study_are_those_of_its_models(tiny):
    found = sar.curves(tiny, models(tiny, "SARC", ["LIHC"], 1), 42, lambdas=(0.0, 0.5, 1.0), draws=2)
    assert set(found["kind"]) == {"source", "rotated", "noise"} and set(found["layer"]) == set(sar.LAYERS)
    assert len(found) == len(sar.LAYERS) * (1 + 2 + 2) * 3 * 2
    runs, null = (Run("SARC", "vanilla", 1, 42), Run("LIHC", "vanilla", 0, 42)), tiny.null_state("abmil")
    own, other = (task_vector(tiny.state(run), null)["embed.weight"].double() for run in runs)
    one = found[(found["layer"] == sar.EMBEDDING) & (found["kind"] == "source") & (found["rule"] == "paper")]
    expected = [sar.subspace_alignment_ratio(own, c * own + (1 - c) * other, rank_rule="paper") for c in (0, 0.5, 1)]
    assert one["sar"].tolist() == pytest.approx(expected, abs=1e-12)


def test_curves_are_kept_and_baselines_follow_the_seed(tiny):
    pair, settings = models(tiny, "SARC", ["CESC"], 0), {"lambdas": (0.0, 1.0), "draws": 1}
    first = sar.curves(tiny, pair, 42, **settings)
    pd.testing.assert_frame_equal(first, sar.curves(tiny, pair, 42, **settings))
    other = sar.curves(tiny, pair, 43, **settings)
    same = first["sar"] == other["sar"]
    assert same[first["kind"] == "source"].all()
    at_source = (first["lambda"] == 0) & (first["rule"] == "released") & (first["layer"] == sar.EMBEDDING)
    assert not same[at_source & (first["kind"] != "source")].any()


def test_every_pair_of_a_study_and_what_was_planted(tiny):
    by_target = sar.finished_models(tiny, 0)
    read = sar.every_pair(tiny, by_target, 42)
    assert len(read[["target", "source"]].drop_duplicates()) == 6
    planted = sar.against_planted(read, tiny.study)
    assert (planted["pairs"] == 6).all() and planted["at"].between(-1, 1).all()
    assert sar.against_planted(read, load_study("tcga")) is None
    assert [each[TARGET].dataset for each in by_target] == list(tiny.study.datasets)
    assert sar.finished_models(Workbench(tiny.study, precision="fp64"), 0) == []


def test_spectra_of_a_study_and_their_ranks(tiny):
    spectra = sar.spectra(tiny, models(tiny, "SARC", ["LIHC"], 0))
    assert spectra["model"].unique().tolist() == ["SARC", "LIHC"]
    for _, part in spectra.groupby(["model", "layer"]):
        assert part["kept"].is_monotonic_increasing and part["kept"].iloc[-1] == pytest.approx(1)
    tau = task_vector(tiny.state(Run("LIHC", "vanilla", 0, 42)), tiny.null_state("abmil"))
    values = torch.linalg.svdvals(tau["embed.weight"].double())
    ranks = sar.ranks(spectra)
    assert ranks.loc[(sar.EMBEDDING, "LIHC"), "released"] == sar.dominant_rank(values)
    assert ranks.loc[(sar.EMBEDDING, "LIHC"), "rows"] == len(tau["embed.weight"])
