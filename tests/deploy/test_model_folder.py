"""Model folders: what is written is what is read, bit by bit; what was damaged is never used."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.deploy import load_model
from steph.deploy.model_folder import VERSION, build, fill, read_model, tensors_of
from steph.files.records import file_sha256, fingerprint
from steph.merging.steph import keep_sources
from steph.merging.surgery import Surgery
from steph.mil import ROUPKT, FineTuned, ForwardPass, MeanMIL, Model, new_network
from tests.conftest import REFERENCE
from tests.helpers.made_model import DIM, SETTINGS, made_folder, made_steph, patches, write_slide


def network(name="abmil"):
    return new_network(name, DIM, SETTINGS)


def bags():
    torch.manual_seed(3)
    grid = torch.tensor([(256 * (i % 4), 256 * (i // 4)) for i in range(13)])
    return RaggedBatch(torch.randn(13, DIM), (0, 9, 13), grid, (0, 9, 13))


class Scaled(Model):
    """A class as a user writes one: a network whose logits are scaled by a number that is not trained."""

    def __init__(self, network, factor):
        super().__init__()
        self.network = network
        self.register_buffer("factor", torch.tensor(factor))

    def forward_pass(self, bags, frozen=None):
        return ForwardPass(self.network(bags) * self.factor)

    def architecture(self):
        return {"kind": self.kind, "network": self.network.architecture()}

    @classmethod
    def rebuild(cls, architecture, part):
        return cls(part(architecture["network"]), 1.0)


STEPHS = {
    "plain": {},
    "dense": {"top_k": None},
    "vectors": {"mix": "parameter", "weight": "parameter", "clamp_weights": True, "bounded_lambda": True},
    "constant": {"mix": 0.25},
    "linear": {"hyper_head": "linear"},
    "merged_head": {"merge_head": True},
    "on_target": {"base": "target", "fresh_head": False},
    "subsampled": {"sample_patches": 3, "sample_seed": 5},
}
MODELS = {
    **{f"steph_{name}": lambda options=options: made_steph(**options) for name, options in STEPHS.items()},
    "abmil": network,
    "patch_gcn": lambda: network("patch_gcn"),
    "wide_mean": lambda: new_network("mean_mil", DIM, SETTINGS.model_copy(update={"dim_emb": 11})),
    "finetuned": lambda: FineTuned(network(), fresh_head=True),
    "roupkt": lambda: ROUPKT(network(), {"A": network(), "B": network()}, top_k=1),
    "surgery": lambda: Surgery(made_steph(), network()),
    "a_users_own": lambda: Scaled(network(), 3.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_by_bit(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for value in tensors_of(model).values():  # none at 0 or 1 as it is made
            value += 0.1 * torch.randn_like(value)
        expected = model(bags())
    made_folder(tmp_path / "m", model)
    before = torch.random.get_rng_state()
    _, loaded = read_model(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(loaded(bags()), expected)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_folder_of_the_first_version_is_read(tmp_path):
    """Written and asked by the code of the first release; the slide is of `made_model`."""
    model = load_model(REFERENCE / "model_folder")
    prediction = model.predict([write_slide(tmp_path / "a.h5", patches())])
    np.testing.assert_allclose(prediction.risk, -0.9994640840165013, rtol=1e-6)
    np.testing.assert_allclose(list(prediction.w.values()), [0.27896541357040405, 0, 0, 0], rtol=1e-5)


def test_a_class_that_does_not_say_how_it_is_made_again_is_refused_and_one_that_is_not_here_named(
    tmp_path, monkeypatch
):
    with pytest.raises(Refused, match=r"not made by its name in steph\.mil\.NETWORKS cannot be exported"):
        MeanMIL(DIM, 5, 8).architecture()
    made_folder(tmp_path / "m", Scaled(network(), 1.0))
    monkeypatch.delattr(Scaled, "architecture")
    with pytest.raises(Refused, match="class Scaled cannot be exported: it does not define `architecture`"):
        Scaled(network(), 1.0).architecture()
    monkeypatch.delitem(Model.KINDS, "scaled")
    with pytest.raises(Refused, match=r"m cannot be used: a model of the kind 'scaled'.*steph/methods"):
        read_model(tmp_path / "m")


@pytest.mark.parametrize(
    "options",
    [{}, {"hyper_head": "linear"}, {"merge_head": True}, {"weight": "parameter", "mix": "parameter"}, {"top_k": None}],
)
def test_without_sources_that_are_never_used_nothing_changes(options):
    model = made_steph(m=5, **options)
    head = model.hyper.weight_head
    bias = model.weight_vector if head is None else head.bias if isinstance(head, torch.nn.Linear) else head[3].bias
    with torch.no_grad():
        bias.copy_(torch.tensor([1.0, -50, 1, 1, -50]))  # S1 and S4 are never used

    def with_sources(names):
        form, tensors = keep_sources(model.architecture(), tensors_of(model), names)
        return fill(build(form, DIM, SETTINGS), tensors)

    smaller = with_sources(["S0", "S2", "S3"])
    assert smaller.source_names == ["S0", "S2", "S3"] and smaller.encoder.n_vectors == 4
    with torch.no_grad():
        torch.testing.assert_close(smaller(bags()), model(bags()), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(with_sources(["S0"])(bags()), model(bags()), rtol=1e-3)


def altered(folder, change):
    """Change the configuration and give it a right checksum again."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    content.pop("checksum")
    file.write_text(json.dumps({**content, "checksum": fingerprint(content, 64)}))


def in_double(folder):
    """Numbers that are whole, but not this model's."""
    file = folder / "model.safetensors"
    save_file({name: value.double().contiguous() for name, value in tensors_of(made_steph()).items()}, file)
    altered(folder, lambda c: c["files"].update({file.name: file_sha256(file)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no model folder: it does not exist"),
        (lambda f: (shutil.rmtree(f), f.write_text("")), "no model folder: it is a file"),
        (lambda f: (f / "config.json").unlink(), "no model folder: it holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json was damaged"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json was damaged"),
        (lambda f: (f / "config.json").write_text('["a"]'), "config.json was damaged"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json was damaged"),
        (lambda f: (f / "config.json").write_text('{"format": 1, "version": NaN}'), "config.json was damaged"),
        (lambda f: altered(f, lambda c: c.update(format="other")), "says format 'other'"),
        (lambda f: altered(f, lambda c: c.update(version=VERSION + 1)), "of format 2; this steph reads up to 1"),
        (lambda f: altered(f, lambda c: c.update(version="1")), "damaged or altered"),
        (lambda f: altered(f, lambda c: c.update(extra=1)), "extra: Extra inputs"),
        (lambda f: altered(f, lambda c: c["training"].update(risks=[])), "training.risks"),
        (lambda f: altered(f, lambda c: c["architecture"].update(kind="os.system")), "of the kind 'os.system'"),
        (lambda f: altered(f, lambda c: c["architecture"]["options"].update(top_k=9)), "cannot be used: top_k = 9"),
        (lambda f: altered(f, lambda c: c["architecture"]["network"].update(dim_emb=6)), "expected .* found"),
        (lambda f: altered(f, lambda c: c["architecture"]["sources"].pop()), "do not fit"),
        (lambda f: (f / "model.safetensors").unlink(), "its sha256 is no file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors was damaged"),
        (in_double, r"do not fit: tensor .*float64"),
    ],
)  # fmt: skip
def test_damage_is_named(damage, message, tmp_path):
    folder = made_folder(tmp_path / "m")
    damage(folder)
    with pytest.raises(Refused, match=message):
        read_model(folder)


def test_no_flipped_bit_and_no_cut_goes_unnoticed(tmp_path):
    whole = made_folder(tmp_path / "whole")
    (whole / "README.md").write_text("the card may be edited")
    rng = np.random.default_rng(0)
    for i in range(150):
        copy = tmp_path / str(i)
        shutil.copytree(whole, copy)
        file = copy / ("config.json", "model.safetensors")[i % 2]
        data = bytearray(file.read_bytes())
        at = int(rng.integers(len(data)))
        if i % 3:
            data[at] ^= 1 << int(rng.integers(8))
        else:
            del data[at:]
        file.write_bytes(data)
        try:
            read_model(copy)
        except Refused as reason:
            assert str(copy) in str(reason)
        else:  # a space between values is no part of the content
            assert json.loads(file.read_bytes()) == json.loads((whole / "config.json").read_bytes())
