"""Using a model: a patient's slides in, a risk, a survival curve and an attention map out.

    from steph.deploy.predict import load_model
    model = load_model("models/steph-sarc")
    found = model.predict(["slide.h5"])

The numbers are those of the study that the model was exported from, to the last bit on the same device: slides are
brought into the format of its store, and the study's own function predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from steph import Refused, mil
from steph.analysis.mixing.attention import attention_of, bag_of, mixture_of, patch_size
from steph.data.bags import RaggedBatch, sampled
from steph.data.features import check_slides, inspect, read
from steph.data.manifest import Features
from steph.deploy.model_folder import Config, Inputs, read_model
from steph.files.progress import track
from steph.files.tables import read_csv
from steph.training.device import Compute, check_device, single_thread
from steph.training.engine import predict as predict_patients

ENCODER_KEYS = ("encoder", "encoder_name", "patch_encoder", "patch_encoder_name")
"""Attributes of a feature file, or of what is in it, by which tools name the encoder."""
SAME_ENCODER = {"univ2": "uni2h", "uni2": "uni2h", "mahmoodlabuni2h": "uni2h"}
"""Other names of encoders, in small letters and figures alone."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one patient.

    risk: higher is worse. percentile: of the model's own training patients, how many in 100 have a lower risk (ties
    count one half). survival: probability of surviving to the end of each interval, by its end in `unit`. w, lam: of
    each source, by name; None where a model does not merge by patient. mixture: the same with what is kept and the
    coefficient of each task vector. patches: a row per patch: slide_id, patch, x, y (level-0 pixels, missing where the
    file has none), attention (sums to 1 over the patient, missing where the model has none), rank (1 is the most
    attended of the patient), percentile (among the patches of its slide, 0 to 1). edges: edge of each slide's patches
    in level-0 pixels. notes: what the reader should know.
    """

    patient_id: str
    risk: float
    percentile: float
    survival: pd.Series
    unit: str
    patches: pd.DataFrame = field(repr=False)
    mixture: pd.DataFrame | None = field(repr=False)
    edges: dict[str, int]
    files: list[str]
    notes: list[str]

    @property
    def w(self) -> dict[str, float] | None:
        """Weight of each source."""
        return self._of_source("w")

    @property
    def lam(self) -> dict[str, float] | None:
        """Share of the target's own task vector in each source's mixture."""
        return self._of_source("lambda")

    def _of_source(self, column: str) -> dict[str, float] | None:
        if self.mixture is None:
            return None
        sources = self.mixture.iloc[1:]
        return dict(zip(sources["source"], sources[column].astype(float), strict=True))

    @property
    def attention(self) -> np.ndarray | None:
        """(N,), sums to 1; None where the model has none."""
        values = self.patches["attention"].to_numpy(float)
        return None if np.isnan(values).any() else values

    @property
    def coords(self) -> np.ndarray | None:
        """(N, 2) level-0 pixels; None where a slide has none."""
        return None if self.patches["x"].isna().any() else self.patches[["x", "y"]].to_numpy(np.int64)


@dataclass(frozen=True, eq=False)
class Model:
    """A model folder, loaded. precision: the study's, or fp32 where that was a GPU's and this is none."""

    config: Config
    network: mil.Model
    device: str
    folder: Path

    @property
    def precision(self) -> str:
        """The precision that this device predicts in."""
        half = self._moved and self.device == "cpu" and self.config.precision != "fp64"
        return "fp32" if half else self.config.precision

    @property
    def _moved(self) -> bool:
        """Whether the study computed on another kind of device."""
        return self.config.device.split(" ")[0].split(":")[0] != self.device.split(":")[0]

    def predict(
        self, slides: Sequence[str | Path], patient_id: str | None = None, patch_px: int | None = None
    ) -> Prediction:
        """Predict for one patient from the feature files of all the patient's slides, in the cohort table's order.

        patient_id: the first slide's name where it is not given; it also draws the patches of a bag that is sampled.
        patch_px: edge of a patch in level-0 pixels, where files and coordinates do not tell it. Raises `Refused` for
        files that cannot be read or are not what the model was trained on.
        """
        paths = [Path(slide) for slide in slides]
        bag = Bag.read(paths, self.config, patient_id)
        with single_thread():
            row = self._row(bag)
            batch = bag_of([self.network], bag, bag.patient_id, self._compute)  # type: ignore[arg-type]
            mixed = None if self.network.merging is None else mixture_of(self.network, batch, self.config.dataset)
            attention = None if self.network.pooling_network(batch) is None else attention_of(self.network, batch)
        patches, edges = bag.places(self.config.inputs.max_patches), {}
        patches["attention"] = np.nan if attention is None else attention
        patches["rank"] = patches["attention"].rank(method="first", ascending=False).astype("Int64")
        by_slide = patches.groupby("slide_id", observed=True)["attention"]
        patches["percentile"] = (by_slide.rank() - 0.5) / by_slide.transform("size")
        for slide in bag.slides:
            edges[slide.name] = patch_px or slide.edge(self.config.inputs.patch_size_px)
        width, risk = self.config.network.bin_width_days, float(row["risk"])
        curve = row.filter(regex=r"^survival_\d+$").to_numpy(float)
        return Prediction(
            patient_id=bag.patient_id,
            risk=risk,
            percentile=self.percentile(risk),
            survival=pd.Series(curve, index=width * np.arange(1, len(curve) + 1), name="survival"),
            unit=self.config.endpoint.unit,
            patches=patches,
            mixture=mixed,
            edges=edges,
            files=[str(path) for path in paths],
            notes=self._notes(bag, attention),
        )

    def predict_table(self, table: str | Path) -> pd.DataFrame:
        """Predictions for many patients: patient_id, risk, percentile, survival_1..T. table: a CSV with the columns
        patient_id and path, a row per slide in each patient's order; paths are relative to the table."""
        table = Path(table)
        if not table.is_file():
            raise Refused(f"no table at {table}; expected a CSV with the columns patient_id and path.")
        rows = read_csv(table)
        lacking = [name for name in ("patient_id", "path") if name not in rows]
        if lacking or rows.empty:
            raise Refused(f"{table} lacks {' and '.join(lacking) or 'rows'}; expected the columns patient_id and path.")
        found = []
        for patient, own in track(list(rows.groupby("patient_id", sort=False)), "predict"):
            bag = Bag.read([table.parent / path for path in own["path"]], self.config, str(patient))
            with single_thread():
                row = self._row(bag)
            row["percentile"] = self.percentile(float(row["risk"]))
            found.append(row)
        whole = pd.DataFrame(found).reset_index(drop=True)
        return whole[["patient_id", "risk", "percentile", *whole.filter(regex=r"^survival_\d+$")]]

    def percentile(self, risk: float) -> float:
        """Of the training patients, how many in 100 have a lower risk; ties count one half."""
        risks = np.array(self.config.training.risks)
        return float(100 * ((risks < risk).mean() + 0.5 * (risks == risk).mean()))

    def _row(self, bag: Bag) -> pd.Series:
        """The study's own prediction, as it stands in its ``predictions.csv``."""
        row = predict_patients(self.network, bag, [bag.patient_id], self._compute).iloc[0]  # type: ignore[arg-type]
        if not np.isfinite(row["risk"]):
            raise Refused(f"{bag.patient_id}: the risk is {row['risk']}: features this large are of no use to a model.")
        return row

    @property
    def _compute(self) -> Compute:
        return Compute(self.device, self.precision, self.config.inputs.max_patches)

    def _notes(self, bag: Bag, attention: np.ndarray | None) -> list[str]:
        notes = []
        without = [slide.name for slide in bag.slides if slide.coords is None]
        if without:
            notes.append(f"No map can be drawn: {', '.join(without)} has no coordinates.")
        if attention is None:
            notes.append(
                f"{self.config.title} does not pool patches by an attention of its own: there is none to show."
            )
        limit = self.config.inputs.max_patches
        if limit is not None and bag.size > limit:
            notes.append(f"{limit:,} of {bag.size:,} patches were read, as in the study.")
        if self._moved:
            notes.append(
                f"The study computed on {self.config.device} in {self.config.precision}, this is {self.device} in "
                f"{self.precision}: numbers agree up to rounding, not to the last bit."
            )
        return notes


def load_model(folder: str | Path, device: str = "cpu") -> Model:
    """Load a model folder that `steph export` made. Nothing in it is run; it may come from anybody.

    Raises `Refused` for a folder that is missing, damaged, altered or of a newer format, and a device that is not here.
    """
    check_device(device)
    config, network = read_model(Path(folder))
    return Model(config, network, device, Path(folder))


# ------------------------------------------------------------------------------------------------ slides


@dataclass(frozen=True, eq=False)
class Slide:
    """A slide's patches: features (N, D) in the format of the study's store; coords (N, 2) int64, or None; attributes
    of the coordinates, as the tool that cut the patches wrote them."""

    name: str
    features: np.ndarray
    coords: np.ndarray | None
    attributes: dict[str, Any]

    def edge(self, otherwise: int) -> int:
        """Edge of a patch in level-0 pixels: what the file says, else the distance of neighbours, else `otherwise`."""
        said = self.attributes.get("patch_size_level0")
        if isinstance(said, int | float) and said >= 1:
            return int(said)
        found = None if self.coords is None else patch_size(self.coords[:, 0], self.coords[:, 1])
        return found or otherwise


def read_slide(path: Path, inputs: Inputs) -> Slide:
    """A slide's feature file, checked. Raises `Refused` for one that is not what the model was trained on: missing or
    unreadable, no patches, another width, another encoder or patch size where the file names them, values that are not
    finite or too large for the study's format."""
    if not path.exists():
        raise Refused(f"no feature file at {path}. Give the .h5 file (or .pt) of a slide's patch features.")
    if path.is_dir():
        raise Refused(f"{path} is a folder; give the feature files of one patient's slides one by one.")
    expected = Features(**inputs.model_dump(include={"encoder", "dim", "precision", "patch_size_px", "magnification"}))
    problem = check_slides([path.stem], {path.stem: path}, inputs.dim, expected)["problem"].iloc[0]
    if problem:
        raise Refused(f"{path}: {problem}. The model reads {inputs.dim} numbers a patch of {_extraction(inputs)}.")
    named = _encoder_named(path)
    if named is not None and _plain(named) != _plain(inputs.encoder):
        raise Refused(
            f"{path}: its features are {named}'s, the model reads {inputs.encoder}'s. Features of another encoder mean "
            f"something else, also where they are as wide; extract the slide again with {inputs.encoder}."
        )
    features, coords = read(path)
    with np.errstate(over="ignore"):
        stored = features.astype(inputs.precision, copy=False)
    finite = np.isfinite(stored).all(axis=1)
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        raise Refused(
            f"{path}: {int((~finite).sum())} of {len(finite)} patches hold values that are not finite in "
            f"{inputs.precision} (first: patch {first}). Extract the slide again."
        )
    return Slide(path.stem, stored, None if coords is None else coords.astype(np.int64), inspect(path).attributes)


def _extraction(inputs: Inputs) -> str:
    return f"{inputs.encoder}, patches of {inputs.patch_size_px} pixels at {inputs.magnification:g}x"


def _encoder_named(path: Path) -> str | None:
    """The encoder that a feature file names, None where it names none."""
    if path.suffix == ".pt":
        return None
    try:
        with h5py.File(path, "r", locking=False) as file:
            for part in (file, file["features"], file.get("coords")):
                for key in ENCODER_KEYS if part is not None else ():
                    value = part.attrs.get(key)
                    if isinstance(value, bytes):
                        value = value.decode(errors="replace")
                    if isinstance(value, str) and value not in ("", "None"):
                        return value
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise Refused(f"{path}: not readable ({error}); download or extract it again") from None
    return None


def _plain(encoder: str) -> str:
    letters = "".join(c for c in encoder.lower() if c.isalnum())
    return SAME_ENCODER.get(letters, letters)


@dataclass(frozen=True, eq=False)
class Bag:
    """One patient's slides, in order: a data set of one, as far as `steph.training.engine.predict` asks it. name: the data set
    that the model is for."""

    name: str
    patient_id: str
    slides: list[Slide]
    seed: int

    @classmethod
    def read(cls, paths: Sequence[Path], config: Config, patient_id: str | None = None) -> Bag:
        """Read the feature files of one patient. Raises `Refused` for none, and for two slides of one name."""
        if not paths:
            raise Refused("no slide given: name the feature file of at least one.")
        names = [path.stem for path in paths]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise Refused(f"slide {', '.join(twice)} is given twice; a patient's bag holds each slide once.")
        slides = [read_slide(path, config.inputs) for path in paths]
        return cls(config.dataset, patient_id or names[0], slides, config.inputs.sample_seed)

    @property
    def size(self) -> int:
        """Patches of all slides."""
        return sum(len(slide.features) for slide in self.slides)

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(self.slides[0].features.shape[1])

    def n_patches(self, patient_ids: Sequence[str]) -> np.ndarray:
        """Patches of the bag, of each patient asked for: (B,) int64."""
        return np.full(len(patient_ids), self.size)

    @cached_property
    def _features(self) -> np.ndarray:
        parts = [slide.features for slide in self.slides]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def batch(
        self,
        patient_ids: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        coords: bool = False,
        max_patches: int | None = None,
    ) -> RaggedBatch:
        """The patient's bag, as `steph.data.dataset.Dataset.batch` gives it."""
        kept = self._kept(max_patches)
        features = torch.from_numpy(self._features if kept is None else self._features[kept])
        features = features.to(device, dtype, copy=True)  # in memory of torch's own, as everywhere in a study
        if not coords:
            return RaggedBatch(features, (0, len(features)))
        places = self.places(max_patches)
        sizes = places["slide_id"].value_counts(sort=False)
        slides = (0, *accumulate(n for n in sizes if n))
        where = torch.from_numpy(places[["x", "y"]].to_numpy(np.int32))
        return RaggedBatch(features, (0, len(features)), where, slides)

    def _kept(self, max_patches: int | None) -> np.ndarray | None:
        if max_patches is None or self.size <= max_patches:
            return None
        return sampled(self.size, max_patches, self.seed, self.patient_id)

    def places(self, max_patches: int | None = None) -> pd.DataFrame:
        """The patches that are read: slide_id, patch (its place among the slide's patches), x, y."""
        parts = []
        for slide in self.slides:
            n = len(slide.features)
            part = pd.DataFrame({"slide_id": slide.name, "patch": np.arange(n)})
            for axis, name in enumerate("xy"):
                part[name] = pd.array([pd.NA] * n if slide.coords is None else slide.coords[:, axis], dtype="Int64")
            parts.append(part)
        table = pd.concat(parts, ignore_index=True)
        table["slide_id"] = pd.Categorical(table["slide_id"], [slide.name for slide in self.slides])
        kept = self._kept(max_patches)
        return table if kept is None else table.iloc[kept].reset_index(drop=True)

    def check_coords(self, patient_ids: Sequence[str], network: str) -> None:
        """Raise `Refused` where a slide has no coordinates, which `network` needs."""
        without = [slide.name for slide in self.slides if slide.coords is None]
        if without:
            raise Refused(
                f"{network} needs patches' coordinates, and {', '.join(without)} has none. Give feature files with "
                "`coords` (h5; a .pt has none), or use a model that needs none."
            )

    def labels(self, patient_ids: Sequence[str]) -> pd.DataFrame:
        """Nothing is known of how a new patient fares."""
        return pd.DataFrame({"patient_id": list(patient_ids), "time_days": np.nan, "event": 0})
