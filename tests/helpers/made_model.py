"""A small STEPH in a model folder, and slide files for it, without any study."""

import json

import h5py
import numpy as np
import torch

from steph import PROJECT
from steph.data.manifest import Network
from steph.deploy.model_folder import Config, tensors_of, write_model
from steph.merging.steph import STEPH
from steph.mil import new_network
from steph.mil.state import state_of

DIM = 6
SETTINGS = Network(dim_emb=5, dim_attn=4, n_bins=8)


def made_steph(m=4, seed=0, dim=DIM, settings=SETTINGS, **options):
    """A STEPH of m sources named S0, S1, ..."""
    torch.manual_seed(seed)

    def state():
        return state_of(new_network("abmil", dim, settings))

    sources, network = {f"S{i}": state() for i in range(m)}, new_network("abmil", dim, settings)
    options = {"top_k": min(2, m), "dim_hidden": 7, **options}
    return STEPH(state(), state(), sources, network=network, **options).requires_grad_(False).eval()


def made_config(model, dim=DIM, settings=SETTINGS, inputs=None, **changes):
    """A configuration that fits a model: that of the frozen folder, with changes. inputs: changes of its inputs."""
    content = json.loads((PROJECT / "tests" / "reference" / "model_folder" / "config.json").read_text(encoding="utf-8"))
    content = {name: value for name, value in content.items() if name in Config.model_fields}
    content["inputs"] |= {"dim": dim, **(inputs or {})}
    return Config(**{**content, "network": settings, "architecture": model.architecture(), **changes})


def made_folder(path, model=None, **changes):
    """A model folder; changes: of its configuration."""
    model = model or made_steph()
    write_model(path, made_config(model, **changes), tensors_of(model), "# card\n")
    return path


def write_slide(path, features, coords="grid", coords_attributes=None, **attributes):
    """A slide's feature file. coords: an array, None, or "grid". attributes: of ``features``."""
    features = np.asarray(features)
    if isinstance(coords, str):
        n = len(features)
        coords = 512 * np.stack(np.divmod(np.arange(n), int(np.ceil(np.sqrt(max(n, 1))))), axis=1)[:, ::-1] + 1024
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["features"].attrs.update(attributes)
        if coords is not None:
            file["coords"] = np.asarray(coords, np.int64)
            file["coords"].attrs.update(coords_attributes or {})
    return path


def patches(n=20, dim=DIM, seed=1):
    """Features of n patches."""
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
