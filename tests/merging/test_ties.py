import numpy as np
import pytest
import torch

from steph import Refused
from steph.merging import ties
from steph.merging.ties import trim
from steph.mil import convert_released

TOYS = ("d10", "d20", "ties_at_threshold", "cancel", "cancel_negative_majority", "majority_zero", "d4_keep1", "rand500")


def encoder_vectors(numbers):
    """tau_t and the tau_s of the reference's models, encoder only, under the release's names and in its order."""
    names = numbers["param_order"].tolist()
    null = numbers.state("theta0")
    states = [numbers.state(name) for name in ("theta_t", *(f"theta_s{i}" for i in range(5)))]
    target, *sources = ({name: state[name] - null[name] for name in names} for state in states)
    return target, sources


@pytest.mark.parametrize("pair", range(5))
def test_pairs_are_the_releases(reference, pair):
    numbers = reference("f_ties")
    target, sources = encoder_vectors(numbers)
    found = convert_released(ties(target, sources[pair]))
    expected = convert_released(numbers.state(f"merged_pair{pair}"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    # Trimming is global and keeps one more.
    for row, name in enumerate(("flat_tau_t", f"flat_tau_s{pair}")):
        kept = trim(numbers.tensor(name), 0.2) != 0
        np.testing.assert_array_equal(kept.numpy(), numbers[f"trim_mask_pair{pair}"][row] == 1)
        assert kept.sum() == 165 == int(0.2 * int(numbers["d"])) + 1


@pytest.mark.parametrize("toy", TOYS)
def test_toys_are_the_releases(reference, toy):
    numbers = reference("f_ties")
    assert sorted(numbers["toy_names"].tolist()) == sorted(TOYS)
    vectors = numbers.tensor(f"toy_{toy}_in")
    masked = np.where(numbers[f"toy_{toy}_mask"], vectors.numpy(), 0)
    np.testing.assert_array_equal(torch.stack([trim(v, 0.2) for v in vectors]).numpy(), masked)
    target, source = ({"x": v} for v in vectors)
    for merge in ("sum", "mean"):
        found = ties(target, source, merge=merge)["x"].numpy()
        np.testing.assert_allclose(found, numbers[f"toy_{toy}_merged_{merge}"], rtol=1e-12, err_msg=merge)


def test_all_of_a_vector_can_be_kept():
    x = torch.tensor([3.0, -2.0, 0.5, 1.0])
    assert torch.equal(trim(x, 1.0), x)
    assert torch.equal(ties({"x": x}, {"x": x}, keep=1.0, merge="mean")["x"], x)


@pytest.mark.parametrize("keep", [0, -0.1, 1.1])
def test_a_share_that_cannot_be_is_refused(keep):
    with pytest.raises(Refused, match="keep = "):
        ties({"x": torch.ones(3)}, {"x": torch.ones(3)}, keep=keep)
