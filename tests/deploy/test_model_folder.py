"""Model folders: what is written is what is read, bit by bit; what was damaged is never used."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.deploy.model_folder import (
    VERSION,
    architecture_of,
    build,
    fill,
    keep_sources,
    read_model,
    tensors_of,
    write_model,
)
from steph.files.records import file_sha256, fingerprint
from steph.merging.surgery import Surgery
from steph.mil import NETWORKS, ROUPKT, FineTuned, MeanMIL
from tests.helpers.made_model import DIM, SETTINGS, made_config, made_folder, made_steph


def network(name="abmil"):
    return NETWORKS[name](DIM, SETTINGS)


def bags(seed=3):
    torch.manual_seed(seed)
    features = torch.randn(13, DIM)
    grid = torch.tensor([(256 * (i % 4), 256 * (i // 4)) for i in range(13)])
    return RaggedBatch(features, (0, 9, 13), grid, (0, 9, 13))


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
    "wide_mean": lambda: MeanMIL(DIM, 11, SETTINGS.n_bins),
    "finetuned": lambda: FineTuned(network(), fresh_head=True),
    "roupkt": lambda: ROUPKT(network(), {"A": network(), "B": network()}, top_k=1),
    "roupkt_identity": lambda: ROUPKT(network(), {"A": network()}, top_k=1, expert="identity"),
    "surgery": lambda: Surgery(made_steph(), network(), rank=3),
    "surgery_target_head": lambda: Surgery(network(), network(), head="target"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_by_bit(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for value in tensors_of(model).values():  # none at 0 or 1 as it is made
            value += 0.1 * torch.randn_like(value)
        expected = model(bags())
    write_model(tmp_path / "m", made_config(model), tensors_of(model), "card")
    before = torch.random.get_rng_state()
    _, found = read_model(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(found(bags()), expected)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_another_class_is_refused():
    class Own(torch.nn.Module):
        pass

    with pytest.raises(Refused, match=r"class Own cannot be exported: .*abmil"):
        architecture_of(Own(), DIM, SETTINGS)


@pytest.mark.parametrize(
    "options",
    [{}, {"hyper_head": "linear"}, {"merge_head": True}, {"weight": "parameter", "mix": "parameter"}, {"top_k": None}],
)
def test_without_sources_that_are_never_used_nothing_changes(options):
    model = made_steph(m=5, **options)
    unused = ["S1", "S4"]
    with torch.no_grad():
        rows = [model.source_names.index(name) for name in unused]
        head = model.hyper.weight_head
        bias = model.weight_vector if head is None else head.bias if isinstance(head, torch.nn.Linear) else head[3].bias
        bias[:] = 1.0
        bias[rows] = -50.0
    form, tensors = keep_sources(
        architecture_of(model, DIM, SETTINGS), tensors_of(model), [n for n in model.source_names if n not in unused]
    )
    smaller = fill(build(form, DIM, SETTINGS), tensors)
    assert smaller.source_names == ["S0", "S2", "S3"] and smaller.encoder.n_vectors == 4
    with torch.no_grad():
        torch.testing.assert_close(smaller(bags()), model(bags()), rtol=1e-5, atol=1e-6)
        others = fill(build(*keep_sources_of(model, ["S0"])), keep_sources_of(model, ["S0"], tensors=True))
        assert not torch.allclose(others(bags()), model(bags()), rtol=1e-3)


def keep_sources_of(model, kept, tensors=False):
    form, numbers = keep_sources(architecture_of(model, DIM, SETTINGS), tensors_of(model), kept)
    return numbers if tensors else (form, DIM, SETTINGS)


# ------------------------------------------------------------------------------------------------ damage


def altered(folder, change):
    """Change the configuration and give it a right checksum again."""
    file = folder / "config.json"
    said = json.loads(file.read_text())
    change(said)
    said.pop("checksum")
    said["checksum"] = fingerprint(said, 64)
    file.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no model folder: it does not exist"),
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
        (lambda f: altered(f, lambda c: c["architecture"].update(kind="os.system")), "do not fit"),
        (lambda f: altered(f, lambda c: c["architecture"]["options"].update(top_k=9)), "do not fit: top_k = 9"),
        (lambda f: altered(f, lambda c: c["architecture"]["network"].update(dim_emb=6)), "expected .* found"),
        (lambda f: altered(f, lambda c: c["architecture"]["sources"].pop()), "do not fit"),
        (lambda f: (f / "model.safetensors").unlink(), "its sha256 is no file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors was damaged"),
    ],
)  # fmt: skip
def test_damage_is_named(damage, message, tmp_path):
    folder = made_folder(tmp_path / "m")
    damage(folder)
    with pytest.raises(Refused, match=message):
        read_model(folder)


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "m").write_text("")
    with pytest.raises(Refused, match="no model folder: it is a file"):
        read_model(tmp_path / "m")


def test_numbers_that_are_whole_but_not_this_models_are_refused(tmp_path):
    folder = made_folder(tmp_path / "m")
    other = {name: value.double().contiguous() for name, value in tensors_of(made_steph()).items()}
    save_file(other, folder / "model.safetensors")
    altered(folder, lambda c: c["files"].update({"model.safetensors": file_sha256(folder / "model.safetensors")}))
    with pytest.raises(Refused, match=r"do not fit: tensor .*float64"):
        read_model(folder)


def test_no_flipped_bit_and_no_cut_goes_unnoticed(tmp_path):
    whole = made_folder(tmp_path / "whole")
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
        else:  # a space between values is no part of what is said
            assert json.loads(file.read_bytes()) == json.loads((whole / "config.json").read_bytes())


def test_the_card_may_be_edited(tmp_path):
    folder = made_folder(tmp_path / "m")
    (folder / "README.md").write_text("approved by nobody")
    read_model(folder)
