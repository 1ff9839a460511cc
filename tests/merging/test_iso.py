import pytest
import torch

from steph import Refused
from steph.merging import iso_c, iso_cts
from steph.merging.iso import specific_directions
from tests.conftest import assert_states_close
from tests.merging.test_ties import encoder_vectors


@pytest.fixture
def pairs(reference):
    """The reference's pairs of task vectors; both files hold the same models."""
    numbers = reference("f_iso_c")
    numbers.arrays["param_order"] = reference("f_ties")["param_order"]
    return encoder_vectors(numbers)


@pytest.mark.parametrize("pair", range(5))
def test_iso_c_is_the_releases(reference, pairs, pair):
    numbers = reference("f_iso_c")
    target, sources = pairs
    merged = iso_c(target, sources[pair])
    assert_states_close(merged, numbers.state(f"merged_pair{pair}"))
    for name, value in merged.items():
        if value.ndim == 2:
            mean = numbers.tensor(f"sigma_bar_pair{pair}__{name}")
            torch.testing.assert_close(torch.linalg.svdvals(value), mean.expand(min(value.shape)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("pair", range(5))
def test_iso_cts_is_the_published_algorithm(reference, pairs, pair):
    numbers = reference("f_iso_cts")
    target, sources = pairs
    merged = iso_cts(target, sources[pair], float(numbers["common_space_fraction"]))
    assert_states_close(merged, numbers.state(f"intended_pair{pair}"))
    assert_states_close(iso_cts(target, sources[pair], common_fraction=1.0), iso_c(target, sources[pair]))
    for name, value in target.items():
        if value.ndim == 2:
            rank = min(value.shape)
            k = specific_directions(rank, 0.8)
            assert k == numbers[f"dims_per_task__{name}"]
            assert rank - 2 * k == numbers[f"common_dims__{name}"]


def test_a_fraction_that_cannot_be_is_refused():
    with pytest.raises(Refused, match=r"common_fraction = 1\.5"):
        iso_cts({"x": torch.ones(2, 2)}, {"x": torch.ones(2, 2)}, common_fraction=1.5)
