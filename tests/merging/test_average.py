import pytest
import torch

from steph.merging import model_average
from steph.mil import ABMIL, convert_released
from steph.mil.state import load_into
from tests.conftest import assert_states_close
from tests.helpers.made_pool import released_pool


@pytest.mark.parametrize("pool", ["incl", "excl"])
@pytest.mark.parametrize("base", ["null", "target"])
@pytest.mark.parametrize("part", ["enc", "all"])
def test_all_eight_readings_are_the_releases(reference, float64, pool, base, part):
    numbers = reference("f_model_avg")
    found = model_average(*released_pool(numbers), include_target=pool == "incl", base=base, merge_head=part == "all")
    tag = f"avg_{pool}_{base}_{part}"
    assert_states_close(found, convert_released(numbers.state(f"exact_{tag}")), rtol=1e-12)
    network = ABMIL(24, 16, 12, 8).eval()
    load_into(network, found)
    logits = network([numbers.tensor("X")])[0]
    torch.testing.assert_close(logits, numbers.tensor(f"{tag}_logits"), rtol=1e-6, atol=1e-8)  # 1/n in float32 there
