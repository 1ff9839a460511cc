import torch

from steph.mil import ABMIL, convert_released, to_released
from steph.mil.state import load_into
from tests.conftest import assert_states_close


def released_network(numbers):
    network = ABMIL(24, 16, 12, 8)
    load_into(network, convert_released(numbers.state("theta")))
    return network.eval()


def test_forward_is_the_releases(reference, float64):
    numbers = reference("a_abmil")
    network = released_network(numbers)
    bags = [numbers.tensor("X_n37"), numbers.tensor("X_n1")]
    for tag, bag, logits, feature in zip(["n37", "n1"], bags, network(bags), network.encode(bags), strict=True):
        torch.testing.assert_close(logits, numbers.tensor(f"logits_{tag}"), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(feature, numbers.tensor(f"bag_feat_{tag}"), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(network.attention(bag), numbers.tensor(f"attention_{tag}"), rtol=1e-12, atol=1e-14)
    single = network.float()([bags[0].float()])[0]
    torch.testing.assert_close(single, numbers.tensor("logits_f32_n37"), rtol=1e-5, atol=1e-6)


def test_names_go_there_and_back(reference):
    state = reference("a_abmil").state("theta")
    assert_states_close(to_released(convert_released(state)), state)


def test_dropout_sits_on_the_gate_alone():
    torch.manual_seed(0)
    network = ABMIL(6, 5, 4, 3, dropout=0.5).train()
    assert not any(isinstance(m, torch.nn.Dropout) for m in network.modules())
    bag = torch.randn(9, 6)
    assert not torch.equal(network.attention(bag), network.attention(bag))
    one = torch.randn(1, 6)  # one patch has attention 1 whatever is dropped
    torch.testing.assert_close(network([one]), network([one]))
