import os
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from steph import Refused
from steph.cli import app
from steph.deploy.checkpoints import convert, read_weights
from steph.merging import steph as hypernetwork
from steph.merging.steph import STEPH
from steph.merging.task_vectors import task_vector
from steph.mil import ABMIL, to_released
from steph.mil.state import ModelState, load_into, load_state, save_state, state_fingerprint, state_of
from tests.conftest import assert_states_close


@pytest.fixture
def network():
    torch.manual_seed(3)
    return ABMIL(24, 16, 12, 8)


@pytest.fixture
def released(tmp_path, network):
    """A checkpoint as the authors write it."""
    path = tmp_path / "brca.pth"
    torch.save(OrderedDict(to_released(network.state_dict())), path)
    return path


def same_bits(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.numpy().tobytes() == other[name].numpy().tobytes(), name


def test_the_releases_weights_give_the_releases_logits(reference, tmp_path, float64):
    numbers = reference("a_abmil")
    torch.save(numbers.state("theta"), tmp_path / "theta.pth")
    assert convert(tmp_path / "theta.pth", tmp_path / "theta.safetensors") == "ABMIL, 957 weights"
    network = ABMIL(24, 16, 12, 8)
    load_into(network, load_state(tmp_path / "theta.safetensors"))
    logits = network.eval()([numbers.tensor("X_n37")])[0]
    torch.testing.assert_close(logits, numbers.tensor("logits_n37"), rtol=1e-12, atol=1e-14)


def test_the_releases_hypernetwork_gives_its_coefficients(reference, tmp_path, float64):
    numbers = reference("e_steph")
    models = {name: tmp_path / f"{name}.pth" for name in ("theta0", "theta_t", *(f"theta_s{i}" for i in range(5)))}
    for name, path in models.items():
        torch.save(numbers.state(name), path)
    # A whole STEPH checkpoint: what is trained, and frozen models under names of their own.
    trained = {**numbers.state("hyper"), **numbers.state("head")}
    torch.save({**trained, "frozen.0": numbers.tensor("X_A")}, tmp_path / "steph.pth")
    text = convert(tmp_path / "steph.pth", tmp_path / "steph.safetensors", models["theta0"])
    assert text.startswith("STEPH, ") and "1 other entries left out (frozen.0)" in text
    null, target, *sources = (read_weights(path)[0] for path in models.values())
    model = STEPH(null, target, {f"s{i}": s for i, s in enumerate(sources)}, top_k=3, dim_hidden=16)
    load_into(model, load_state(tmp_path / "steph.safetensors"))
    w, lam, _ = model.eval().coefficients(numbers.tensor("X_A"))
    torch.testing.assert_close(w, numbers.tensor("w_A"), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lam, numbers.tensor("lambda_A"), rtol=1e-12, atol=1e-14)
    assert load_state(tmp_path / "steph.safetensors").origin == state_fingerprint(null)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_there_and_back_bit_for_bit(tmp_path, network, dtype):
    theirs = to_released(network.to(dtype).state_dict())
    torch.save(theirs, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.pth")
    same_bits(torch.load(tmp_path / "c.pth", weights_only=True), theirs)
    convert(tmp_path / "b.safetensors", tmp_path / "d.pth")
    assert (tmp_path / "c.pth").read_bytes() == (tmp_path / "d.pth").read_bytes()


def test_what_a_study_trains_goes_out_under_the_releases_names(tmp_path, network):
    others = {name: state_of(ABMIL(24, 16, 12, 8)) for name in ("CESC", "LIHC")}
    model = STEPH(state_of(network), state_of(ABMIL(24, 16, 12, 8)), others, top_k=2, dim_hidden=10)
    state = state_of(model, "0123", trainable_only=True)
    save_state(state, tmp_path / "model.safetensors")  # as in the record of a run
    convert(tmp_path / "model.safetensors", tmp_path / "steph.pth")
    theirs = torch.load(tmp_path / "steph.pth", weights_only=True)
    assert {name.rpartition(".")[0] for name in theirs} == set(hypernetwork.RELEASED_NAMES)
    assert_states_close(hypernetwork.convert_released(theirs), dict(state), rtol=0)


def test_an_origin_keeps_models_of_another_null_model_apart(tmp_path, released):
    for i in range(2):
        torch.save(to_released(ABMIL(24, 16, 12, 8).state_dict()), tmp_path / f"null{i}.pth")
        convert(tmp_path / f"null{i}.pth", tmp_path / f"null{i}.safetensors", tmp_path / f"null{i}.pth")
    convert(released, tmp_path / "brca.safetensors", tmp_path / "null0.pth")
    right, wrong = (load_state(tmp_path / f"null{i}.safetensors") for i in range(2))
    model = load_state(tmp_path / "brca.safetensors")
    assert right.origin == state_fingerprint(right)
    task_vector(model, right)
    with pytest.raises(Refused, match="trained from another null model"):
        task_vector(model, wrong)


WRAPPED = {
    "in a dictionary with the epoch": lambda state: {"epoch": 20, "model": state, "lr": 1e-4},
    "of DataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "as parameters": lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_other_ways_of_saving_weights(tmp_path, network, wrap):
    torch.save(wrap(to_released(network.state_dict())), tmp_path / "a.pth")
    same_bits(read_weights(tmp_path / "a.pth")[0], state_of(network))


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


PLANTED = {
    "alone": lambda bomb, state: bomb,
    "beside the weights": lambda bomb, state: {**state, "extra": bomb},
    "in a list": lambda bomb, state: [state, bomb],
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_in_a_checkpoint_is_run(tmp_path, network, name, zipped):
    marker, path = tmp_path / "ran", tmp_path / "trap.pth"
    torch.save(PLANTED[name](Bomb(marker), network.state_dict()), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Refused, match=r"trap\.pth holds Python objects \(posix\.system\).*save\(model\.state_dict"):
        convert(path, tmp_path / "a.safetensors")
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(Refused, match=r"trap\.pth"):
        convert(path, tmp_path / "a.safetensors")
    path.rename(tmp_path / "trap.safetensors")
    with pytest.raises(Refused, match=r"trap\.safetensors"):
        convert(tmp_path / "trap.safetensors", tmp_path / "a.pth")
    assert not marker.exists() and not (tmp_path / "a.safetensors").exists()


BAD = {
    "a network": (lambda s: torch.nn.Linear(2, 2), r"holds Python objects \(torch\.nn\.modules\.linear\.Linear\)"),
    "a tensor": (lambda s: torch.zeros(3), "holds a Tensor; expected a dictionary of tensors"),
    "numbers": (lambda s: {"epoch": 3}, "holds a dict with epoch; expected"),
    "nothing": (lambda s: {}, "expected a dictionary of tensors"),
    "one missing": (lambda s: {k: v for k, v in s.items() if k != "pred_head.bias"}, r"lacks pred_head\.bias"),
    "one too many": (lambda s: {**s, "more": torch.zeros(2)}, "has more besides"),
    "another network": (lambda s: {"transformer.weight": torch.zeros(2, 2)}, "does not hold the weights of ABMIL"),
    "half of STEPH": (lambda s: {"vecmix_layer.0.weight": torch.zeros(2, 2)}, "weights of STEPH: it lacks"),
    "other width": (
        lambda s: {**s, "attention_net.attention_a.0.weight": torch.zeros(12, 15)},
        r"do not fit each other as those of ABMIL do.*gate_tanh\.weight: \(12, 16\) and \(12, 15\)",
    ),
    "whole numbers": (lambda s: {**s, "pred_head.bias": torch.zeros(8).long()}, r"head\.bias is torch\.int64"),
    "not finite": (lambda s: {**s, "pred_head.weight": torch.full((8, 16), torch.nan)}, "not finite"),
    "a few bytes for many": (lambda s: {**s, "pred_head.weight": torch.zeros(1, 1).expand(1 << 30, 1 << 30)}, "a dict"),
    "sparse": (lambda s: {**s, "pred_head.weight": torch.zeros(8, 16).to_sparse()}, "expected a dictionary"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_what_is_no_checkpoint_is_refused(tmp_path, network, spoil, message):
    torch.save(spoil(to_released(network.state_dict())), tmp_path / "bad.pth")
    with pytest.raises(Refused, match=message) as refused:
        read_weights(tmp_path / "bad.pth")
    assert "bad.pth" in str(refused.value)


@settings(max_examples=80)
@given(data=st.data())
def test_damaged_files_never_end_in_another_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    torch.manual_seed(0)
    path = folder / ("a.pth" if data.draw(st.booleans()) else "a.safetensors")
    state = state_of(ABMIL(4, 3, 3, 2))
    torch.save(to_released(state), path) if path.suffix == ".pth" else save_state(state, path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        read_weights(path)
    except Refused as reason:
        assert path.name in str(reason)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("nosuch.pth", "a.safetensors", "there is no file"),
        ("brca.pth", "a.bin", r"a\.bin: expected a file that ends in"),
        ("brca.pth", "brca.pth", "is there already"),
        ("gcn.safetensors", "gcn.pth", "cannot be carried over"),
    ],
)
def test_files_go_by_their_ending_and_other_networks_stay(tmp_path, released, source, target, message):
    save_state(ModelState({"layers.0.weight": torch.zeros(2, 2)}), tmp_path / "gcn.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Refused, match=message):
        convert(tmp_path / source, tmp_path / target)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command(tmp_path, released):
    paths = [str(released), str(tmp_path / "brca.safetensors"), "--null", str(released)]
    done = CliRunner().invoke(app, ["convert", *paths])
    assert done.exit_code == 0 and "ABMIL, 957 weights" in done.output
    assert load_state(tmp_path / "brca.safetensors").origin
