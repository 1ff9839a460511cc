"""A small STEPH in a model folder, and slide files for it, without any study."""

import h5py
import numpy as np
import torch

from steph.data.manifest import Endpoint, Network
from steph.deploy.model_folder import Config, Inputs, Score, Training, tensors_of, write_model
from steph.merging.steph import STEPH
from steph.mil import new_network
from steph.mil.state import state_of

DIM = 6
SETTINGS = Network(dim_emb=5, dim_attn=4, n_bins=8)


def made_steph(m=4, seed=0, dim=DIM, settings=SETTINGS, **options):
    """A STEPH of m sources named S0, S1, ..."""
    torch.manual_seed(seed)

    def network():
        return new_network("abmil", dim, settings)

    def state():
        return state_of(network())

    sources = {f"S{i}": state() for i in range(m)}
    options = {"top_k": min(2, m), "dim_hidden": 7, **options}
    return STEPH(state(), state(), sources, network=network(), **options).requires_grad_(False).eval()


def made_config(model, dim=DIM, settings=SETTINGS, inputs=None, **changes):
    """A configuration that fits a model. inputs: what is said otherwise of the features."""
    reads = {
        "encoder": "UNI2-h", "dim": dim, "precision": "float32", "patch_size_px": 256, "magnification": 20,
        "max_patches": None, "sample_seed": 0,
    }  # fmt: skip
    said = dict(  # noqa: C408 - as keywords
        study="clinic",
        study_title="A clinic",
        synthetic=False,
        dataset="GASTRIC",
        projects=["GASTRIC"],
        method="steph",
        title="STEPH",
        description="sparse task vector mixup",
        fold=0,
        seed=42,
        precision="fp32",
        device="cpu",
        run="abc",
        finished="2026-01-01T00:00:00+00:00",
        versions={"steph": "0.1.0"},
        endpoint=Endpoint(),
        inputs=Inputs(**{**reads, **(inputs or {})}),
        network=settings,
        architecture=model.architecture(),
        sources=[],
        training=Training(
            patients=4, events=2, longest_follow_up_days=1200, risks=[-6.0, -5.0, -4.0, -1.0], observed=[0.9, 0.8, 0.8]
        ),
        scores=[Score(folds=[0], patients=9, events=4, c_index=0.61, low=0.4, high=0.8)],
        dropped=None,
        differs=0.0,
        files={},
    )
    return Config(**{**said, **changes})


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
