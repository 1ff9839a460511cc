"""Transferability: other cancers' models on a cancer's patients, and what it goes with."""

import numpy as np
import pandas as pd
import pytest

from steph.analysis.mixing import transferability
from steph.analysis.performance.predictions import out_of_fold
from steph.study.runs import Run, plan
from steph.survival import comparable_pairs, concordance_index
from steph.training.device import Compute
from steph.training.engine import predict

NAMES = ["LIHC", "CESC", "SARC"]


@pytest.fixture
def table(tiny):
    return transferability.transferred(tiny, NAMES)


def test_each_cell_is_the_c_index_of_another_cancers_model(tiny, table, monkeypatch):
    assert len(table) == 6 and (table["source"] != table["target"]).all() and (table["problem"] == "").all()
    data = tiny.dataset("SARC")
    known = predict(tiny.model(Run("LIHC", "vanilla", 0, 42)), data, list(data.cohort.patients["patient_id"]))
    cell = table[(table["source"] == "LIHC") & (table["target"] == "SARC")].iloc[0]
    assert cell["c_index"] == concordance_index(known["time_days"], known["event"], known["risk"])
    assert (cell["n"], cell["events"]) == (len(known), known["event"].sum())
    monkeypatch.setattr(transferability, "c_indices", None)  # kept: not computed again
    pd.testing.assert_frame_equal(transferability.transferred(tiny, NAMES), table)


def test_the_diagonal_is_of_patients_that_the_own_models_were_not_trained_on(tiny, table):
    own = out_of_fold(tiny, plan(tiny, None, ["vanilla"]))
    matrix = transferability.matrix(table, own, NAMES)
    folds = [part for _, part in own[own["dataset"] == "SARC"].groupby("fold")]
    scores = [concordance_index(part["time_days"], part["event"], part["risk"]) for part in folds]
    pairs = [comparable_pairs(part["time_days"].to_numpy(), part["event"].to_numpy(bool)).sum() for part in folds]
    assert matrix.loc["SARC", "SARC"] == pytest.approx(np.average(scores, weights=pairs))
    assert matrix.loc["LIHC", "CESC"] == table.set_index(["source", "target"]).loc[("LIHC", "CESC"), "c_index"]
    one = transferability.matrix(table[table["target"] == "SARC"], own, NAMES)
    assert one.shape == (3, 1) and one["SARC"].tolist() == matrix["SARC"].tolist()


def test_an_undefined_cell_keeps_its_reason(tiny, monkeypatch):
    data, model = tiny.dataset("SARC"), tiny.model(Run("LIHC", "vanilla", 0, 42))
    labels = data.labels(list(data.cohort.patients["patient_id"])).assign(event=False)
    monkeypatch.setattr(type(data), "labels", lambda *_: labels)
    row = transferability.c_indices({"LIHC": model}, data, Compute()).iloc[0]
    assert row["c_index"] is None and "no comparable pair" in row["problem"] and row["events"] == 0


def test_cosines_of_task_vectors(tiny):
    cosine = transferability.task_vector_cosine(tiny)
    assert np.allclose(np.diag(cosine), 1) and np.allclose(cosine, cosine.T)
    null, states = tiny.null_state("abmil"), [tiny.state(Run(name, "vanilla", 0, 42)) for name in ("LIHC", "SARC")]
    encoder = [k for k in null if "head" not in k]
    first, second = (np.concatenate([(s[k] - null[k]).numpy().ravel() for k in encoder]) for s in states)
    expected = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert cosine.loc["LIHC", "SARC"] == pytest.approx(expected, abs=1e-5)


def test_weights_stand_under_their_target():
    ends = {"seed": [1, 1, 2, 2], "epoch": 3, "source": ["LIHC", "CESC"] * 2, "w": [1.0, 0, 3, 1], "lambda": 0.5}
    weights = transferability.final_shares({"SARC": pd.DataFrame(ends)}, NAMES)
    assert weights["SARC"].tolist()[:2] == [1.0, 0.25] and np.isnan(weights.loc["SARC", "SARC"])


def square(values):
    names = [f"C{i}" for i in range(len(values))]
    return pd.DataFrame(values, index=names, columns=names)


def test_what_goes_together_is_found_and_what_does_not_is_not():
    rng = np.random.default_rng(0)
    values = rng.random((8, 8))
    seen, p, n = transferability.goes_with(square(values), square(np.exp(values)))
    assert (seen, n) == (pytest.approx(1), 8) and p == pytest.approx(1 / 2000)
    assert transferability.goes_with(square(values), square(-values))[0] == pytest.approx(-1)
    ps = [transferability.goes_with(square(values), square(rng.random((8, 8))), 199)[1] for _ in range(20)]
    assert min(ps) > 0.005 and max(ps) > 0.5
    other = square(values + 99 * np.eye(8))
    assert transferability.goes_with(square(values), other)[0] == pytest.approx(1)  # the diagonal does not count


def test_one_target_or_a_missing_column_has_a_correlation_without_a_p_value():
    table = square(np.random.default_rng(0).random((5, 5)))
    seen, p, n = transferability.goes_with(table[["C1"]], table)
    assert (seen, n) == (pytest.approx(1), 1) and np.isnan(p)
    gap = table.copy()
    gap.loc["C0", "C1"] = np.nan
    related = transferability.relations(table, {"itself": table, "gap": gap, "zero": table * 0}).set_index("with")
    assert related["targets"].tolist() == [5, 4, 0] and related["p"].isna().tolist() == [False, True, True]
    assert np.isnan(related.loc["zero", "correlation"]) and (related["problem"] == "").tolist() == [True, True, False]
    assert related.loc["zero", "problem"].startswith("no target whose sources")


def test_better_models_elsewhere():
    table = square([[0.6, 0.5, 0.7], [0.6, 0.5, 0.5], [0.4, 0.55, 0.65]])
    best = transferability.better_elsewhere(table).set_index("target")
    assert best.loc["C1"].tolist() == [0.5, 0.55, "C2", pytest.approx(0.525)]
