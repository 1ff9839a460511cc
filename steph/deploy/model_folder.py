"""Model folders: a finished model with all that predicting takes, and nothing that runs.

    model.safetensors    every number of the model
    config.json          what it is, what it reads, whom it was trained on; checksums
    README.md            the model card, for people

`config.json` holds the SHA-256 of the numbers and one of itself, so that a folder that was cut off or altered is never
used. A merging model's tensors are ``encoder.base.<parameter>``, M_0, and ``encoder.vectors.<parameter>``, task vectors
one above another: the target's, then the sources' in the order of ``architecture.sources``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from steph import Refused
from steph.data.manifest import Endpoint, Network
from steph.files.atomic import new_folder
from steph.files.records import file_sha256, fingerprint
from steph.merging.merged_encoder import Merged
from steph.merging.steph import STEPH
from steph.merging.surgery import Surgery
from steph.mil import NETWORKS, MeanMIL
from steph.mil.transfer import ROUPKT, FineTuned
from steph.training.engine import parameter_dtype

FORMAT, VERSION = "steph-model", 1
CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Inputs(_Strict):
    """The patch features that a model reads. precision: number format of the study's store; features are brought into
    it first. max_patches, sample_seed: how larger bags are sampled, None takes every patch."""

    encoder: str
    dim: int = Field(gt=0)
    precision: Literal["float32", "float16"]
    patch_size_px: int = Field(gt=0)
    magnification: float
    max_patches: int | None
    sample_seed: int


class Training(_Strict):
    """The patients that trained the model. risks: what it gives each of them, rising. observed: their Kaplan-Meier
    survival at the end of each interval that somebody was followed through."""

    patients: int
    events: int
    longest_follow_up_days: float
    risks: list[float] = Field(min_length=1)
    observed: list[float]


class Score(_Strict):
    """A C-index on test patients with its 95 % interval; None where it is undefined. folds: whose patients these are,
    each ranked by the model of the own fold."""

    folds: list[int]
    patients: int
    events: int
    c_index: float | None
    low: float | None
    high: float | None


class Dropped(_Strict):
    """Sources that were left out of the folder, and what that changed for `patients` patients."""

    sources: list[str]
    patients: int
    max_change_in_risk: float
    ranks_changed: int


class Config(_Strict):
    """What ``config.json`` says. differs: largest difference of a risk from the study's own predictions for the test
    patients, found when the model was exported."""

    study: str
    study_title: str
    synthetic: bool
    dataset: str
    projects: list[str]
    method: str
    title: str
    description: str
    fold: int
    seed: int
    precision: str
    device: str
    run: str = Field(description="key of the run")
    finished: str
    versions: dict[str, str]
    endpoint: Endpoint
    inputs: Inputs
    network: Network
    architecture: dict[str, Any]
    sources: list[str]
    training: Training
    scores: list[Score]
    dropped: Dropped | None
    differs: float
    files: dict[str, str]

    @property
    def name(self) -> str:
        """The model in a few words."""
        return f"{self.title} for {self.dataset} (study {self.study}, fold {self.fold}, seed {self.seed})"


# ------------------------------------------------------------------------------------------------ architectures


def architecture_of(model: nn.Module, dim: int, settings: Network) -> dict[str, Any]:
    """What `build` needs to make a model of the same form, as plain data.

    dim: width of the patch features. settings: dimensions of the study's networks. Raises `Refused` for a model made of
    anything but the library's networks, STEPH and its relatives, fine-tuned models, surgery and ROUPKT.
    """

    def of(part: Any) -> dict[str, Any]:
        return architecture_of(part, dim, settings)

    if isinstance(model, STEPH):
        hyper = model.hyper
        heads = [head for head in (hyper.weight_head, hyper.mix_head) if head is not None]
        options = {
            "top_k": model.top_k,
            "mix": model.mix,
            "weight": model.weight,
            "dim_hidden": hyper.embed.out_features if hyper.embed is not None else 1,
            "hyper_head": "linear" if heads and isinstance(heads[0], nn.Linear) else "mlp",
            "bounded_lambda": model.bounded_lambda,
            "clamp_weights": model.clamp_weights,
            "merge_head": model.merged_head is not None,
            "sample_patches": model.sample_patches,
            "sample_seed": model.sample_seed,
        }
        return {
            "kind": "steph",
            "network": of(model.encoder.network),
            "sources": model.source_names,
            "order": list(model.encoder.layout.shapes),  # in memory too: libraries round by where a number lies
            "options": options,
        }
    if isinstance(model, Surgery):
        options = {"rank": model.adapter.down.out_features, "head": model.head_of}
        merged, target = of(model.merged.network), of(model.target.network)
        return {"kind": "surgery", "merged": merged, "target": target, "options": options}
    if isinstance(model, FineTuned):
        return {"kind": "finetuned", "network": of(model.encoder.network)}
    if isinstance(model, ROUPKT):
        expert = "identity" if isinstance(model.experts[0], nn.Identity) else "mlp"
        network = of(model.models[0].network)
        return {
            "kind": "roupkt", "network": network, "models": model.names,
            "options": {"top_k": model.top_k, "expert": expert},
        }  # fmt: skip
    for name, make in NETWORKS.items():
        with suppress(Refused):  # a network that cannot have the study's dimensions is not this one
            if type(make(dim, settings)) is type(model):
                dim_emb = model.embed.out_features if isinstance(model, MeanMIL) else settings.dim_emb
                return {"kind": "network", "name": name, "dim_emb": dim_emb}
    raise Refused(
        f"a model of the class {type(model).__name__} cannot be exported: a model folder holds the networks of "
        f"steph.mil ({', '.join(NETWORKS)}) and what STEPH, fine-tuning, surgery and ROUPKT make of them."
    )


def build(architecture: Mapping[str, Any], dim: int, settings: Network) -> nn.Module:
    """A model of this form (`architecture_of`), its numbers still to be filled in."""
    with torch.random.fork_rng(devices=[]):  # whoever loads a model keeps their own random numbers
        return _build(architecture, dim, settings).requires_grad_(False).eval()


def _build(a: Mapping[str, Any], dim: int, settings: Network) -> nn.Module:
    kind = a["kind"]
    if kind == "network":
        return NETWORKS[a["name"]](dim, settings.model_copy(update={"dim_emb": a["dim_emb"]}))
    if kind == "surgery":
        return Surgery(_build(a["merged"], dim, settings), _build(a["target"], dim, settings), **a["options"])
    network = _build(a["network"], dim, settings)
    if kind == "finetuned":
        return FineTuned(network, fresh_head=True)
    if kind == "roupkt":
        models = {name: _build(a["network"], dim, settings) for name in a["models"]}
        return ROUPKT(network, models, **a["options"])
    if kind == "steph":
        own = dict(network.named_parameters())
        form = {name: torch.zeros_like(own[name]) for name in dict.fromkeys([*a["order"], *own])}
        return STEPH(form, form, dict.fromkeys(a["sources"], form), network=network, **a["options"])
    raise KeyError(kind)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a model predicts with, by name; views, so that writing to them changes the model."""
    merging = {name: part for name, part in model.named_modules() if isinstance(part, Merged)}
    forms = tuple(f"{name}.network." for name in merging)  # only the shape of these networks counts
    found = {name: value.detach() for name, value in model.named_parameters() if not name.startswith(forms)}
    for name, part in merging.items():
        for parameter, value in part.stacked().items():
            found |= {f"{name}.base.{parameter}": value[0], f"{name}.vectors.{parameter}": value[1:]}
    return found


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy tensors into a model of the same form. Raises `ValueError` where names, shapes or formats differ."""
    own = tensors_of(model)
    for name in sorted(own.keys() | tensors.keys()):
        kinds = [(tuple(t.shape), t.dtype) if t is not None else None for t in (own.get(name), tensors.get(name))]
        if kinds[0] != kinds[1]:
            raise ValueError(f"tensor {name}: expected {kinds[0]}, found {kinds[1]}")
        own[name].copy_(tensors[name])
    return model


def keep_sources(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], kept: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and tensors of a STEPH with only these of its sources."""
    names, options = list(architecture["sources"]), architecture["options"]
    rows = torch.tensor([names.index(name) for name in kept])
    last = "" if options["hyper_head"] == "linear" else ".3"
    by_source = {f"hyper.{head}{last}.{kind}" for head in ("weight_head", "mix_head") for kind in ("weight", "bias")}
    by_source |= {"weight_vector", "ratio_vector"}
    fewer = {}
    for name, value in tensors.items():
        if name.startswith(("encoder.vectors.", "merged_head.vectors.")):
            value = value[torch.cat([torch.zeros(1, dtype=torch.int64), rows + 1])]
        fewer[name] = value[rows] if name in by_source else value
    top_k = options["top_k"] and min(options["top_k"], len(kept))
    return {**architecture, "sources": list(kept), "options": {**options, "top_k": top_k}}, fewer


# ------------------------------------------------------------------------------------------------ folders


def write_model(path: Path, config: Config, tensors: Mapping[str, Tensor], card: str) -> None:
    """Write a model folder, whole or not at all. `config.files` is made here. Raises `Refused` where `path` is
    taken."""
    from safetensors.torch import save_file

    with new_folder(path) as folder:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / TENSORS)
        files = {TENSORS: file_sha256(folder / TENSORS)}
        said = {"format": FORMAT, "version": VERSION, **config.model_dump(mode="json"), "files": files}
        said["checksum"] = fingerprint(said, 64)
        text = json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")


def read_model(path: Path) -> tuple[Config, nn.Module]:
    """A model folder's configuration, and its model in evaluation mode on the CPU.

    Raises `Refused` for a path that is no model folder, one of a newer format, one that was damaged or altered.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(path)
    tensors = path / TENSORS
    found = file_sha256(tensors) if tensors.is_file() else "no file"
    if found != config.files.get(TENSORS):
        raise _damaged(tensors, f"its sha256 is {found[:12]}, not the one in {CONFIG}")
    try:
        model = build(config.architecture, config.inputs.dim, config.network)
        return config, fill(model.to(parameter_dtype(config.precision)), load_file(tensors))
    except (SafetensorError, Refused, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"numbers and description do not fit: {error}") from None


def read_config(path: Path) -> Config:
    """A model folder's configuration, checked. Raises `Refused` as `read_model` does."""
    file = path / CONFIG
    if not file.is_file():
        what = "holds no " + CONFIG if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise Refused(f"{path} is no model folder: it {what}. `steph export` makes one of a finished run.")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        kind, version, checksum = said.pop("format"), said.pop("version"), said.pop("checksum", None)
        expected = fingerprint({"format": kind, "version": version, **said}, 64)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(file, f"it is not what `steph export` writes ({type(error).__name__}: {error})") from None
    if kind != FORMAT:
        raise Refused(f"{path} is no model folder: {CONFIG} says format {kind!r}, expected {FORMAT!r}.")
    if isinstance(version, int) and version > VERSION:
        raise Refused(
            f"{path} is a model folder of format {version}; this steph reads up to {VERSION}. Update steph, or export "
            "the model again with this one."
        )
    if version != VERSION or checksum != expected:
        raise _damaged(file, "its checksum is not that of its content")
    try:
        return Config.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _damaged(path: Path, how: str) -> Refused:
    return Refused(f"{path} was damaged or altered: {how}. Copy the folder again, or export the model again.")
