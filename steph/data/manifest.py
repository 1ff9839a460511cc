"""Study manifests: everything that defines a study, in one validated YAML file of ``data_manifest/``."""

import os
import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from steph import PROJECT, WORKPLACE, Refused
from steph.data.splits import check_fold
from steph.files.tables import read_csv

MANIFESTS = PROJECT / "data_manifest"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][-._A-Za-z0-9]*$", max_length=100)]
"""Becomes a part of paths: no separator, nothing that a shell or a page understands, short enough for a file."""
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """Plain data of known fields; others are refused, and nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """Where something comes from, under which terms.

    provides: features, labels, splits or anything else. gated: access must be asked for. redistribution: copies may be
    passed on. files: names of what is fetched, with {project} and {dataset} as in `Features`, * and ? as in a shell,
    small and capital letters alike; none: nothing is fetched.
    """

    name: str
    provides: str
    address: str
    licence: str
    gated: bool = False
    redistribution: bool = False
    citation: str = ""
    files: list[str] = []
    size_bytes: int | None = None
    md5: str | None = None
    note: str = ""


class Endpoint(Strict):
    """What is predicted."""

    name: str = "DSS"
    unit: Literal["days"] = "days"
    description: str = "disease-specific survival"


class Features(Strict):
    """The patch features that a study stands on; features of different encoders or sources are never mixed.

    precision: number format of the packed store. encoder_aliases: other names by which files may call the encoder,
    beside those of ``data_manifest/encoders.csv``. overlap_px: how far neighbouring patches overlap. folders: where
    slide files lie under the data root, subfolders included; {project} is replaced by each of a data set's projects,
    {dataset} by its name; * and ? as in a shell.
    """

    encoder: str
    dim: Positive
    precision: Literal["float32", "float16"] = "float32"
    patch_size_px: Positive = 256
    magnification: float = 20
    overlap_px: int = Field(default=0, ge=0)
    encoder_aliases: list[str] = []
    folders: list[str] = ["features/TCGA-{project}*"]

    def is_encoder(self, name: str) -> bool:
        """Whether a name means the encoder: papers, hubs and tools call one by several."""
        names = (text.lower().rstrip("/") for text in (name, self.encoder, *self.encoder_aliases))
        plain = [re.sub(r".*[/:]|[\W_]", "", text) for text in names]
        asked, *ours = (known_encoders().get(text, text) for text in plain)
        return asked in ours


@cache
def known_encoders() -> dict[str, str]:
    """The encoders of ``encoders.csv`` by all their names, in small letters and figures alone."""
    table = read_csv(MANIFESTS / "encoders.csv")
    return {name: encoder for encoder, names in table[["encoder", "names"]].to_numpy() for name in names.split()}


class DatasetEntry(Strict):
    """One data set: a cancer, or cancers that are studied together.

    patients, slides, survival_rate_pct (patients without an event), mean_patches (per slide): the paper's Table S1.
    folders: in place of those of `Features`.
    """

    projects: list[Name] = Field(min_length=1)
    patients: Positive | None = None
    slides: Positive | None = None
    survival_rate_pct: float | None = Field(default=None, ge=0, le=100)
    mean_patches: Positive | None = None
    folders: list[str] | None = None


class Synthetic(Strict):
    """A made cohort in place of a real one."""

    scale: float = Field(gt=0, le=2, description="size, as a share of the data sets' patients")
    seed: int = 0
    sharing: bool = Field(default=True, description="False: no prognostic factor is shared between cancers")
    pan_weight: float = Field(default=0.5, ge=0, le=1, description="of the prognostic direction that all cancers share")
    group_weight: float = Field(default=0.75, ge=0, le=1, description="of those that related cancers share")
    state_share: float = Field(default=0.5, ge=0, le=1, description="of the log-risk that is the tumour's state")
    risk_sd: float = Field(default=1.2, gt=0, le=5, description="standard deviation of the log-risk")
    tumour: tuple[Share, Share, Share] = Field(default=(0.35, 0.1, 0.9), description="fraction: mean, least, most")
    bag_median: float = Field(default=20, gt=0, description="patches, where mean_patches is 10,000")
    bag_range: tuple[Positive, Positive] = Field(default=(6, 40), description="patches: least, most")
    shared_looks: bool = Field(default=True, description="False: what looks like a tumour differs between cancers")
    external_patients: int = Field(default=200, ge=0, description="extra patients per data set, never trained on")

    @model_validator(mode="after")
    def _possible(self) -> "Synthetic":
        if self.pan_weight**2 + self.group_weight**2 > 1:
            raise ValueError("pan_weight and group_weight: the sum of their squares is above 1")
        if not self.tumour[1] < self.tumour[0] < self.tumour[2] or self.bag_range[0] > self.bag_range[1]:
            raise ValueError("tumour must be mean, least, most with the mean between; bag_range least, most")
        return self


class Network(Strict):
    """Dimensions of the prognostic networks."""

    dim_emb: Positive = 512
    dim_attn: Positive = 384
    n_bins: Positive = 32
    bin_width_days: float = Field(default=365, gt=0)
    dropout: float = Field(default=0.25, ge=0, lt=1)


class Recipe(Strict):
    """How anything is trained (the paper's Appendix C.2.1; the release fixes the rest).

    max_patches: larger bags are sampled down to so many patches, the same ones in training and evaluation, drawn by the
    study's seed and the patient; None takes every patch.
    """

    epochs: Positive = 20
    lr: float = Field(default=1e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(default=1e-5, ge=0, description="of weight matrices; vectors and biases have none")
    warmup_epochs: int = Field(default=1, ge=0, description="epochs of linear warm-up before the cosine")
    bags_per_step: Positive = Field(default=16, description="patients per update; an epoch's remainder is dropped")
    alpha: float = Field(default=0.5, ge=0, le=1, description="how much less a censored patient counts in the loss")
    max_patches: Positive | None = None


class StephSettings(Strict):
    """STEPH's own numbers (Eq. 4 and 7).

    sample_patches: patches per bag that the hypernetwork of steph_subsampled reads, None for all; no other method looks
    at this.
    """

    dim_hidden: Positive = 512
    top_k: Positive = 5
    beta: float = Field(default=0.05, ge=0)
    gamma_large: float = Field(default=0.005, ge=0, description="gamma of data sets above `large_above` patients")
    gamma_small: float = Field(default=0.05, ge=0, description="gamma of the others")
    large_above: int = 500
    sample_patches: Positive | None = 256

    def gamma(self, n_patients: int) -> float:
        """gamma by the paper's size rule (Appendix C.2.1)."""
        return self.gamma_large if n_patients > self.large_above else self.gamma_small


class Study(Strict):
    """A study: data sets, features, endpoint, networks, recipe.

    data_root: labels/, splits/, features/ and stores/ lie in it; relative to the manifest's folder, in data_manifest/
    to the checkout; STEPH_DATA replaces it for a real study; empty: data/ in the study's build folder. folds: of one
    cross-validation; repeats: cross-validations, each of splits of its own; fold f belongs to repeat f // folds.
    targets: the data sets that methods are run on where nobody names some, the others being sources only; none: all.
    positive_control: a made study in which transfer is planted, shown beside this one by the chapter of controls.
    book_folds: by group of methods, or method: how many folds, from the first, it gets where nobody names folds; others
    get all.
    """

    name: Name
    title: str
    synthetic: Synthetic | None = None
    data_root: str = ""
    endpoint: Endpoint = Endpoint()
    features: Features
    datasets: dict[Name, DatasetEntry] = Field(min_length=1)
    targets: list[Name] = []
    positive_control: Name | None = None
    folds: int = Field(default=5, ge=2, le=1000)
    repeats: Positive = Field(default=1, le=1000)
    book_folds: dict[str, Positive] = {}
    seed: int = Field(default=42, ge=0)
    network: Network = Network()
    recipe: Recipe = Recipe()
    steph: StephSettings = StephSettings()
    sources: list[Source] = []
    _address: str = PrivateAttr(default="")

    @field_validator("name")
    @classmethod
    def _not_the_books(cls, name: str) -> str:
        if name.lower() == "book":
            raise ValueError("build/book is the book's folder, and is deleted with it; choose another name")
        return name

    @model_validator(mode="after")
    def _targets_are_data_sets(self) -> "Study":
        if missing := [name for name in self.targets if name not in self.datasets]:
            raise ValueError(f"targets: {', '.join(missing)} is none of the data sets {', '.join(self.datasets)}")
        return self

    @property
    def target_names(self) -> list[str]:
        """`targets`, or all data sets."""
        return list(self.targets or self.datasets)

    @property
    def address(self) -> str:
        """What `load_study` finds the study by: its name, or the path of its manifest."""
        return self._address or self.name

    @property
    def data(self) -> Path:
        """The data root."""
        if (replaced := os.environ.get("STEPH_DATA")) and not self.synthetic:
            return expand_user(replaced).absolute()
        return WORKPLACE / expand_user(self.data_root) if self.data_root else self.build / "data"

    @property
    def build(self) -> Path:
        """Where everything made for the study goes: ``build/<study>``; STEPH_BUILD replaces ``build``."""
        return expand_user(os.environ.get("STEPH_BUILD") or str(WORKPLACE / "build")).resolve() / self.name

    @property
    def n_folds(self) -> int:
        """Folds of all repeats together, numbered from 0."""
        return self.folds * self.repeats

    def check_fold(self, fold: int) -> None:
        """Raise `Refused` for a fold that the study does not have."""
        check_fold(fold, self.n_folds, f"study {self.name}")

    def entry(self, dataset: str) -> DatasetEntry:
        """A data set by name. Raises `Refused`, with the nearest names, for an unknown one."""
        refuse_unknown("data set", [dataset], self.datasets, f"study {self.name}")
        return self.datasets[dataset]

    def sources_of(self, dataset: str) -> list[str]:
        """The other data sets in alphabetical order, as the release orders them."""
        return sorted(set(self.datasets) - {dataset})


def expand_user(text: str) -> Path:
    """A path, ~ and ~user replaced. Raises `Refused` for a user whom nobody knows here."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise Refused(f"{text}: there is no such user's home here. Write the path without ~.") from None


def unknown(what: str, name: str, known: list[str], where: str) -> str:
    """The message for a name that does not exist: the nearest names, and all of them."""
    spelt = {other.lower(): other for other in known}
    near = [name.lower()] if name.lower() in spelt else get_close_matches(name.lower(), spelt, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(spelt[other] for other in near)}?" if near else ""
    return f"unknown {what} {name!r} in {where}.{hint} It has: {', '.join(known)}."


def refuse_unknown(what: str, names: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise `Refused` for the first name that is not known, with the message of `unknown`."""
    for name in names:
        if name not in known:
            raise Refused(unknown(what, str(name), list(known), where))


def load_study(name: str | Path) -> Study:
    """The study of a manifest: a name in ``data_manifest/`` (``demo``) or the path of a YAML file.

    A manifest may say ``extends: other``: what it leaves out, it takes from there. Raises `Refused` for a missing
    file, unreadable YAML, an unknown key or a wrong value, each named.
    """
    path = _manifest_path(name)
    try:
        study = Study.model_validate(_read(path))
        study._address = study.name if path == MANIFESTS / f"{study.name}.yaml" else str(path.resolve())
        return study
    except ValidationError as error:
        wrong = [f"\n  {'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r:.200})" for e in error.errors()]
        raise Refused(f"study manifest {path} is not valid:{''.join(wrong)}") from None


def _manifest_path(name: str | Path) -> Path:
    path = expand_user(str(name))
    if path.suffix not in {".yaml", ".yml"}:
        path = MANIFESTS / f"{name}.yaml"
    if not path.is_file():
        known = unknown("study", path.stem, sorted(p.stem for p in MANIFESTS.glob("*.yaml")), str(MANIFESTS))
        raise Refused(f"no study manifest at {path}: {known} Or give the path of a YAML file.")
    return path


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, TypeError) as error:  # the last two: such values as a 13th month
        raise Refused(f"study manifest {path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise Refused(f"study manifest {path} holds {type(values).__name__}; expected keys and values.")
    if isinstance(root := values.get("data_root"), str) and root and not path.resolve().is_relative_to(MANIFESTS):
        values["data_root"] = str(path.resolve().parent / expand_user(root))
    if "extends" not in values:
        return values
    if path.resolve() in extended_by:
        raise Refused(f"study manifest {path} extends itself.")
    base = str(values.pop("extends"))
    beside = path.parent / f"{base}.yaml"
    try:
        below = beside if beside.is_file() else _manifest_path(base)
    except Refused as reason:
        raise Refused(f"study manifest {path} extends {base}: {reason}") from None
    return _merge(_read(below, (*extended_by, path.resolve())), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; the choice of data sets is replaced as a whole."""
    both = [key for key in base.keys() & over if isinstance(base[key], dict) and isinstance(over[key], dict)]
    return base | over | {key: _merge(base[key], over[key]) for key in both if key != "datasets"}
