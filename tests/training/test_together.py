"""Several trainings in one pass over the data: the numbers of each alone, and the failures."""

import pandas as pd
import pytest
import torch
from torch import nn

from steph import Refused
from steph.data.manifest import Recipe
from steph.mil import ABMIL
from steph.mil.state import state_of
from steph.study.runs import Run
from steph.training.engine import Training, fit, fit_together, seed_everything
from tests.training.test_engine import NETWORK, Patients

METHODS = ("vanilla", "steph", "patch_gcn", "transmil", "finetuned_head", "adamerging", "roupkt", "surgery_am")


class Counted:
    """A data set that counts the batches of more than one patient that are asked of it."""

    def __init__(self, data):
        self.data, self.name, self.batches = data, data.name, 0

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, patients, **options):
        self.batches += len(patients) > 1
        return self.data.batch(patients, **options)


def whole_training(tiny, data, name, precision="fp32"):
    run = Run("SARC", name, 1, tiny.study.seed)
    model = tiny.untrained(run)
    study = tiny.study
    return Training(model, data, tiny.training_set(run)[1], study.recipe, study.network, run.seed, precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_methods_that_share_a_pass_get_the_bits_that_they_get_alone(tiny, precision):
    data = Counted(tiny.dataset("SARC"))
    alone = {}
    for name in METHODS:
        training = whole_training(tiny, data, name, precision)
        [history] = fit_together([training])
        alone[name] = (state_of(training.model), history.drop(columns="seconds"))
    trainings = [whole_training(tiny, data, name, precision) for name in METHODS]
    data.batches = 0  # what models make of the bags once was made above
    histories = fit_together(trainings)
    assert data.batches == trainings[0].steps * tiny.study.recipe.epochs  # each batch once, not once per method
    for name, training, history in zip(METHODS, trainings, histories, strict=True):
        state, expected = alone[name]
        found = state_of(training.model)
        assert all(torch.equal(found[key], state[key]) for key in state), name
        pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected, check_exact=True, obj=name)
        assert (history["seconds"] > 0).all() and not training.model.training


class Draws(nn.Module):
    """A network that draws from every random generator in each step."""

    def __init__(self):
        super().__init__()
        self.inner = ABMIL(5, 8, 4, 8)
        self.seen = []

    def forward(self, bags):
        import random

        import numpy as np

        self.seen.append((random.random(), np.random.random(), torch.rand(()).item()))  # noqa: NPY002
        return self.inner(bags)


def made(data, model=ABMIL, epochs=3, **recipe):
    seed_everything(1)
    model = model() if model is Draws else model(5, 8, 4, 8)
    return Training(model, data, data.ids, Recipe(lr=0.02, epochs=epochs, **recipe), NETWORK, 0)


def test_each_draws_as_if_alone():
    data = Patients()
    alone = made(data, Draws)
    fit_together([alone])
    one, _, other = together = [made(data, Draws), made(data), made(data, Draws)]
    fit_together(together)
    assert alone.model.seen == one.model.seen == other.model.seen
    assert len(set(alone.model.seen)) == 6


class Breaks(ABMIL):
    """A network whose loss is not a number from its fourth step on."""

    steps = 0

    def forward(self, bags):
        self.steps += 1
        return super().forward(bags) * (torch.nan if self.steps > 3 else 1)


def test_one_that_is_refused_does_not_take_the_others_along():
    data = Patients()
    alone = made(data)
    [expected] = fit_together([alone])
    together = [made(data, Breaks), made(data), made(data, Breaks)]
    first, found, last = fit_together(together)
    for refused in (first, last):
        assert isinstance(refused, Refused) and "training loss is nan in epoch 2" in str(refused)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(together[1].model.parameters(), alone.model.parameters(), strict=True))
    assert together[0].model.steps == 4  # it ends with the epoch in which that is seen
    assert all(isinstance(reason, Refused) for reason in fit_together([made(data, Breaks), made(data, Breaks)]))


class Refuses(ABMIL):
    """A network that is refused in its fourth step, as for want of memory."""

    steps = 0

    def forward(self, bags):
        self.steps += 1
        if self.steps == 4:
            raise Refused("too little memory")
        return super().forward(bags)


def test_one_that_stops_in_the_middle_of_an_epoch_does_not_take_the_others_along():
    data = Patients()
    alone = made(data)
    fit_together([alone])
    stops, other = made(data, Refuses), made(data)
    reason, history = fit_together([stops, other])
    assert "too little memory" in str(reason) and stops.model.steps == 4 and len(history) == 3
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), alone.model.parameters(), strict=True))


def test_only_trainings_with_the_same_order_of_patients_share_a_pass():
    data = Patients()
    for other in (made(data, epochs=4), made(Patients()), made(data, bags_per_step=8)):
        with pytest.raises(Refused, match="share a pass over the data are of the same patients, seed, recipe"):
            fit_together([made(data), other])


def test_a_pass_alone_is_a_fit():
    data = Patients()
    training = made(data)
    [history] = fit_together([training])
    seed_everything(1)
    model = ABMIL(5, 8, 4, 8)
    expected = fit(model, data, data.ids, Recipe(lr=0.02, epochs=3), NETWORK, 0)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True)


def test_seconds_of_a_shared_pass_add_up_to_the_time_it_took():
    import time

    class Slow(Patients):
        def batch(self, *args, **options):
            time.sleep(0.02)
            return super().batch(*args, **options)

    started = time.perf_counter()
    data = Slow()
    histories = fit_together([made(data) for _ in range(4)])
    taken = time.perf_counter() - started
    total = sum(history["seconds"].sum() for history in histories)
    assert 0.02 * 6 < total < taken  # 6 batches, loaded once
    assert all(history["seconds"].sum() > 0.9 * 0.02 * 6 / 4 for history in histories)
