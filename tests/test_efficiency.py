"""What methods cost."""

from __future__ import annotations

import pandas as pd
import pytest

from steph import Refused
from steph.analysis import efficiency
from steph.data.manifest import load_study
from steph.methods import METHODS
from steph.results import paper_table
from steph.runs import Run


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


def test_seconds_of_an_epoch_come_from_the_records(tiny):
    runs = [Run("SARC", name, fold, tiny.study.seed) for name in ("steph", "model_average") for fold in (0, 1)]
    table = efficiency.epoch_seconds(tiny, runs).set_index("method")
    histories = [pd.read_csv(tiny.record(run).file("history.csv"))["seconds"] for run in runs[:2]]
    assert table.loc["steph", "mean"] == pytest.approx(sum(h.iloc[1] for h in histories) / 2)
    assert table.loc["steph", ["epochs", "device"]].tolist() == [2, "cpu"]
    assert table.loc["model_average", ["mean", "epochs"]].tolist() == [0, 0]
    with pytest.raises(Refused, match="SARC/steph/fold0-seed7 is not finished"):
        efficiency.epoch_seconds(tiny, [Run("SARC", "steph", 0, 7)])
