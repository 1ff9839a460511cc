"""Model folders: a finished model with all that predicting takes, and nothing that runs.

    model.safetensors    every number of the model
    config.json          what it is, what it reads, whom it was trained on; checksums
    README.md            the model card, for people

`config.json` holds the SHA-256 of the numbers and one of itself, so that a folder that was cut off or altered is never
used. A merging model's tensors are ``encoder.base.<parameter>``, M_0, and ``encoder.vectors.<parameter>``, task vectors
one above another: the target's, then the sources' in the order of ``architecture.sources``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import steph.methods  # noqa: F401 - with it every class of model is known that a folder may name
from steph import Refused
from steph.analysis.performance.estimates import with_interval
from steph.data.manifest import Endpoint, Features, Network, Strict
from steph.files.atomic import atomic_folder
from steph.files.records import CHECKSUM, file_sha256, fingerprint, read_json, write_sealed
from steph.merging.merged_encoder import Merged
from steph.mil import Model, rebuild
from steph.training.device import parameter_dtype

FORMAT, VERSION = "steph-model", 1
CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"


class Inputs(Features):
    """The patch features that a model reads, brought into the number format of the study's store first; where they lie
    is nobody's concern here. max_patches, sample_seed: how larger bags are sampled, None takes every patch."""

    folders: list[str] = Field(default=[], exclude=True)
    max_patches: int | None
    sample_seed: int

    @property
    def extraction(self) -> str:
        """What features, of what patches, in words."""
        size, magnification = self.patch_size_px, self.magnification
        return f"features of {self.encoder}, {self.dim} numbers for each patch of {size} pixels at {magnification:g}x"


class Training(Strict):
    """The patients that trained the model. risks: what it gives each of them, rising. observed: their Kaplan-Meier
    survival at the end of each interval that somebody was followed through."""

    patients: int
    events: int
    longest_follow_up_days: float
    risks: list[float] = Field(min_length=1)
    observed: list[float]


class Score(Strict):
    """A C-index on test patients with its 95 % interval; None where it is undefined. folds: whose patients these are,
    each ranked by the model of its own fold."""

    folds: list[int]
    patients: int
    events: int
    c_index: float | None
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        return with_interval(self.c_index, self.low, self.high, form=".3f")


class Dropped(Strict):
    """Sources that were left out of the folder, and what that changed for `patients` patients."""

    sources: list[str]
    patients: int
    max_change_in_risk: float
    ranks_changed: int

    @property
    def text(self) -> str:
        if not self.sources:
            return "Every source is in use for some patient: none was dropped."
        return (
            f"Sources that no patient has in use were dropped: {', '.join(self.sources)}. Over {self.patients} "
            f"patients the risk changes by at most {self.max_change_in_risk:.2g}, and {self.ranks_changed} patients "
            "change rank."
        )


class Config(Strict):
    """What ``config.json`` says. run: the run's key. differs: largest difference of a risk from the study's own
    predictions for the test patients, found when the model was exported. warnings: what is wrong with the model."""

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
    run: str
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
    warnings: list[str] = Field(default=[])
    files: dict[str, str]

    @property
    def name(self) -> str:
        """The model in a few words."""
        return f"{self.title} for {self.dataset} (study {self.study}, fold {self.fold}, seed {self.seed})"


def build(architecture: Mapping[str, Any], dim: int, network: Network) -> Model:
    """A model of this form (`Model.architecture`) in evaluation mode, its numbers still to be filled in."""
    with torch.random.fork_rng(devices=[]):  # whoever loads a model keeps their own random numbers
        return rebuild(architecture, dim, network).requires_grad_(False).eval()


def tensors_of(model: Model) -> dict[str, Tensor]:
    """Every tensor that a model predicts with, by name; views, so that writing to them changes the model."""
    merging = {name: part for name, part in model.named_modules() if isinstance(part, Merged)}
    forms = tuple(f"{name}.network." for name in merging)  # only the shape of these networks counts
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith(forms)}
    for name, part in merging.items():
        for parameter, value in part.stacked().items():
            tensors |= {f"{name}.base.{parameter}": value[0], f"{name}.vectors.{parameter}": value[1:]}
    return tensors


def fill(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """Copy tensors into a model of the same form. Raises `ValueError` where names, shapes or formats differ."""
    targets = tensors_of(model)
    for name in sorted(targets.keys() | tensors.keys()):
        expected, actual = ((tuple(t[name].shape), t[name].dtype) if name in t else None for t in (targets, tensors))
        if expected != actual:
            raise ValueError(f"tensor {name}: expected {expected}, found {actual}")
        targets[name].copy_(tensors[name])
    return model


def write_model(path: Path, config: Config, tensors: Mapping[str, Tensor], card: str) -> None:
    """Write a model folder, whole or not at all. `config.files` is made here. Raises `Refused` where `path` is
    taken."""
    with atomic_folder(path) as folder:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / TENSORS)
        files = {TENSORS: file_sha256(folder / TENSORS)}
        content = {"format": FORMAT, "version": VERSION, **config.model_dump(mode="json"), "files": files}
        write_sealed(folder / CONFIG, content)
        (folder / CARD).write_text(card, encoding="utf-8")


def read_model(path: Path) -> tuple[Config, Model]:
    """A model folder's configuration, and its model in evaluation mode on the CPU.

    Raises `Refused` for a path that is no model folder, one of a newer format, one that was damaged or altered, and a
    class of model that this steph does not have.
    """
    file = path / CONFIG
    if not file.is_file():
        what = "holds no " + CONFIG if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise Refused(f"{path} is no model folder: it {what}. `steph export` makes one of a finished run.")
    try:
        content = read_json(file)
        checksum = content.pop(CHECKSUM, None)
        expected, kind, version = fingerprint(content, 64), content.pop("format"), content.pop("version")
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
        config = Config.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise _damaged(file, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    numbers = path / TENSORS
    sha256 = file_sha256(numbers) if numbers.is_file() else "no file"
    if sha256 != config.files.get(TENSORS):
        raise _damaged(numbers, f"its sha256 is {sha256[:12]}, not the one in {CONFIG}")
    try:
        model = build(config.architecture, config.inputs.dim, config.network)
        return config, fill(model.to(parameter_dtype(config.precision)), load_file(numbers))
    except Refused as reason:
        raise Refused(f"{path} cannot be used: {reason}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"numbers and description do not fit: {error}") from None


def _damaged(path: Path, how: str) -> Refused:
    return Refused(f"{path} was damaged or altered: {how}. Copy the folder again, or export the model again.")
