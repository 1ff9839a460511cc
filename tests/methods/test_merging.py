"""STEPH without training: what its closed forms choose, and the network that they give."""

from dataclasses import replace

import pytest
import torch

from steph.study import Run, run
from steph.study.runs import SOURCE_FOLD

FREE = ["steph_free_cosine", "steph_free_concordance", "steph_free_scores"]
SARC = Run("SARC", "steph", 1, 42)


@pytest.mark.parametrize("name", FREE)
def test_training_free_methods_train_nothing_and_say_what_they_chose(tiny, name):
    record = run(tiny.study, "SARC", name, 1)
    assert record.info["trained_parameters"] == 0
    w, lam = record.info["facts"]["w"], record.info["facts"]["lambda"]
    assert set(w) == set(lam) == {"CESC", "LIHC"}
    assert all(value >= 0 for value in w.values()) and all(0 <= value <= 1 for value in lam.values())
    own, null = tiny.state(replace(SARC, method="vanilla")), tiny.null_state("abmil")
    found = tiny.state(replace(SARC, method=name))
    sources = {n: tiny.state(Run(n, "vanilla", SOURCE_FOLD, 42)) for n in w}
    for key, base in null.items():
        expected = base.double()
        for n, source in sources.items():
            mixture = lam[n] * (own[key] - base).double() + (1 - lam[n]) * (source[key] - base).double()
            expected = expected + w[n] * mixture
        expected = own[key].double() if key.startswith("head.") else expected
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-5, atol=1e-6)
