"""Using a model: a patient's slides in, a risk, a survival curve and an attention map out.

    from steph.deploy import load_model
    model = load_model("models/steph-sarc")
    prediction = model.predict(["slide.h5"])

The numbers are those of the study that the model was exported from, to the last bit on the same device: slides are
brought into the format of its store, and the study's own function predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from steph import Refused, mil
from steph.analysis.mixing.attention import attention_of, bag_of, mixture, patch_size, with_attention
from steph.data.bags import sampled
from steph.data.cohort import no_id, patient_ids, refuse_rows
from steph.data.features import open_slide
from steph.data.patients import PatientData, Piece
from steph.data.preflight import check_slides, problems_message
from steph.data.store import DTYPES, NO_COORDS
from steph.deploy.model_folder import Config, Inputs, read_model
from steph.files.progress import track
from steph.files.tables import read_csv
from steph.training.device import Compute, check_device, single_thread
from steph.training.engine import predict as predict_patients


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one patient.

    risk: higher is worse. percentile: of the model's own training patients, how many in 100 have a lower risk (ties
    count one half). survival: probability of surviving to the end of each interval, by its end in days. mixture: w,
    lambda, what is kept and the coefficient of each task vector; None where a model does not merge by patient.
    patches: a row per patch: slide_id, patch, x, y (level-0 pixels, missing where the file has none), attention (sums
    to 1 over the patient, missing where the model has none), rank (1 is the most attended of the patient), percentile
    (among the patches of its slide, 0 to 1). edges: edge of each slide's patches in level-0 pixels. notes: what the
    reader should know.
    """

    model: "LoadedModel"
    patient_id: str
    risk: float
    percentile: float
    survival: pd.Series
    patches: pd.DataFrame = field(repr=False)
    mixture: pd.DataFrame | None = field(repr=False)
    edges: dict[str, int]
    files: list[str]
    notes: list[str]

    @property
    def w(self) -> dict[str, float] | None:
        """Weight of each source, by name."""
        return self._of_sources("w")

    @property
    def lam(self) -> dict[str, float] | None:
        """Share of the target's own task vector in each source's mixture, by name."""
        return self._of_sources("lambda")

    def _of_sources(self, column: str) -> dict[str, float] | None:
        table = self.mixture
        return None if table is None else dict(zip(table["source"][1:], table[column][1:].tolist(), strict=True))

    @property
    def attention(self) -> np.ndarray | None:
        """(N,), sums to 1; None where the model has none."""
        values = self.patches["attention"].to_numpy(float)
        return None if np.isnan(values).any() else values

    @property
    def coords(self) -> np.ndarray | None:
        """(N, 2) level-0 pixels; None where a slide has none."""
        return None if self.patches["x"].isna().any() else self.patches[["x", "y"]].to_numpy(np.int64)

    @property
    def followed(self) -> pd.Series:
        """The part of `survival` that training patients were followed through, and the interval behind it."""
        return self.survival.iloc[: len(self.model.config.training.observed) + 1]


def sources_in_use(mixture: pd.DataFrame) -> pd.DataFrame:
    """The rows of a patient's mixture (`mixture`) whose source is kept with a weight above 0."""
    return mixture.iloc[1:].loc[lambda table: table["kept"] & (table["w"] > 0)]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model folder, loaded for a device."""

    config: Config
    network: mil.Model
    device: str

    @property
    def compute(self) -> Compute:
        """As in the study; in fp32 where that was in a GPU's precision and this is none."""
        half = self._moved and self.device == "cpu" and self.config.precision != "fp64"
        return Compute(self.device, "fp32" if half else self.config.precision, self.config.inputs.max_patches)

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
        paths, network = [Path(slide) for slide in slides], self.network
        bag = read_bag(paths, self.config, patient_id)
        with single_thread():
            row = self._row(bag).iloc[0]
            batch = bag_of(network, bag, bag.name, self.compute)
            merged = None if network.merging is None else mixture(network, batch, self.config.dataset)
            attention = None if network.pooling_network(batch) is None else attention_of(network, batch)
        survival = row.filter(like="survival_").to_numpy(float)
        ends = self.config.network.bin_width_days * np.arange(1, len(survival) + 1)
        return Prediction(
            model=self,
            patient_id=bag.name,
            risk=float(row["risk"]),
            percentile=float(row["percentile"]),
            survival=pd.Series(survival, index=ends, name="survival"),
            patches=with_attention(bag.patches, np.full(len(bag.patches), np.nan) if attention is None else attention),
            mixture=merged,
            edges=dict.fromkeys(bag.edges, patch_px) if patch_px else bag.edges,
            files=[str(path) for path in paths],
            notes=self._notes(bag, attention),
        )

    def predict_table(self, table: str | Path) -> pd.DataFrame:
        """Predictions for many patients: patient_id, risk, percentile, survival_1..T. table: a CSV with the columns
        patient_id and path, a row per slide in each patient's order; paths are relative to the table. Raises `Refused`
        for rows without an id or a path, for a slide that stands twice, and for all slides that cannot be used."""
        table = Path(table)
        if not table.is_file():
            raise Refused(f"no table at {table}; expected a CSV with the columns patient_id and path.")
        slides = read_csv(table)
        lacking = [name for name in ("patient_id", "path") if name not in slides]
        if lacking or slides.empty:
            raise Refused(f"{table} lacks {' and '.join(lacking) or 'rows'}; expected the columns patient_id and path.")
        slides = slides.assign(patient_id=patient_ids(slides["patient_id"]), path=slides["path"].str.strip())
        files = slides["path"].map(lambda path: (table.parent / path).resolve())
        named = slides.assign(path=files.map(lambda file: file.stem)).duplicated(["patient_id", "path"], keep=False)
        problems = (
            (no_id(slides["patient_id"]), "no patient_id"),
            (slides["path"] == "", "no path"),
            (files.duplicated(keep=False) | named, "a slide that stands twice; keep one row per slide"),
        )
        refuse_rows(str(table), slides, problems)
        slide_of = {f"{patient}: {file.stem}": file for patient, file in zip(slides["patient_id"], files, strict=True)}
        if unusable := problems_message(check_slides(slide_of, slide_of, self.config.inputs, content=True)):
            raise Refused(
                f"{table}: {unusable}\nNobody was predicted. The model reads {self.config.inputs.extraction}."
            )
        rows = []
        for patient, paths in track(list(slides.groupby("patient_id", sort=False)["path"]), "predict"):
            bag = read_bag([table.parent / path for path in paths], self.config, str(patient))
            with single_thread():
                rows.append(self._row(bag))
        return pd.concat(rows, ignore_index=True)

    def percentile(self, risk: float) -> float:
        """Of the training patients, how many in 100 have a lower risk; ties count one half."""
        risks = np.array(self.config.training.risks)
        return float(100 * ((risks < risk).mean() + 0.5 * (risks == risk).mean()))

    def _row(self, bag: "PatientBag") -> pd.DataFrame:
        """The study's own prediction, as it stands in its ``predictions.csv``, and the percentile of its risk."""
        row = predict_patients(self.network, bag, [bag.name], self.compute).drop(columns=["time_days", "event"])
        risk = row["risk"].iloc[0]
        if not np.isfinite(risk):
            raise Refused(f"{bag.name}: the risk is {risk}: features this large are of no use to a model.")
        row.insert(2, "percentile", self.percentile(risk))
        return row

    def _notes(self, bag: "PatientBag", attention: np.ndarray | None) -> list[str]:
        notes, config, compute = [], self.config, self.compute
        if without := list(bag.patches.loc[bag.patches["x"].isna(), "slide_id"].astype(str).unique()):
            notes.append(f"No map can be drawn: {', '.join(without)} has no coordinates.")
        if attention is None:
            notes.append(f"{config.title} does not pool patches by an attention of its own: there is none to show.")
        if len(bag.patches) < bag.size:
            notes.append(f"{len(bag.patches):,} of {bag.size:,} patches were read, as in the study.")
        if self._moved:
            notes.append(
                f"The study computed on {config.device} in {config.precision}, this is {compute.device} in "
                f"{compute.precision}: numbers agree up to rounding, not to the last bit."
            )
        return notes


def load_model(folder: str | Path, device: str = "cpu") -> LoadedModel:
    """Load a model folder that `steph export` made. Nothing in it is run; it may come from anybody.

    Raises `Refused` for a folder that is missing, damaged, altered or of a newer format, a class of model that is not
    here, and a device that is not here.
    """
    check_device(device)
    config, network = read_model(Path(folder))
    return LoadedModel(config, network, device)


def read_slide(path: Path, inputs: Inputs) -> tuple[np.ndarray, pd.DataFrame, int]:
    """A slide's feature file, checked: features (N, D) in the format of the study's store; slide_id, patch, x and y of
    the N patches (level-0 pixels, missing where the file has none); the edge of a patch in level-0 pixels, as the file
    says, else the distance of neighbours, else the study's patch size. Raises `Refused` for one that cannot be read or
    is not what the model was trained on."""
    problem = check_slides([path.stem], {path.stem: path}, inputs, content=True)["problem"].iloc[0]
    if problem:
        raise Refused(f"{path}: {problem}. The model reads {inputs.extraction}.")
    with open_slide(path) as slide:
        features, coords = slide.read()
        edge = next(iter(slide.stated["patch_size_level0"]), None)
    features = np.ascontiguousarray(features, DTYPES[inputs.precision])
    patches = pd.DataFrame(coords, range(len(features)), ["x", "y"], dtype="Int64").reset_index(names="patch")
    patches.insert(0, "slide_id", path.stem)
    if not (isinstance(edge, float) and edge >= 1):
        edge = None if coords is None else patch_size(coords[:, 0], coords[:, 1])
    return features, patches, int(edge or inputs.patch_size_px)


@dataclass(frozen=True, eq=False)
class PatientBag(PatientData):
    """One patient's slides as a data set of one, for the functions that predict. name: the patient's. size: patches of
    all slides. patches: those that are read, as `Prediction` has them. features: theirs, (N, D).
    """

    name: str
    size: int
    patches: pd.DataFrame
    features: np.ndarray
    edges: dict[str, int]

    @property
    def dim(self) -> int:
        return int(self.features.shape[1])

    def n_patches(self, patient_ids: Sequence[str]) -> np.ndarray:
        return np.full(len(patient_ids), len(self.patches))

    def pieces(self, patient_id: str, max_patches: int | None) -> list[Piece]:
        # It was sampled when it was read.
        features = torch.from_numpy(self.features)
        coords = self.patches[["x", "y"]].to_numpy(np.int32, na_value=NO_COORDS)
        slides = self.patches["slide_id"].astype(str)
        ends = [*slides.drop_duplicates().index, len(slides)]
        return [Piece(slides[start], features, coords, slice(start, stop)) for start, stop in pairwise(ends)]

    def labels(self, patient_ids: Sequence[str]) -> pd.DataFrame:
        """Of a new patient nothing is known."""
        return pd.DataFrame({"patient_id": list(patient_ids), "time_days": np.nan, "event": 0})


def read_bag(paths: Sequence[Path], config: Config, patient_id: str | None = None) -> PatientBag:
    """Read the feature files of one patient's slides, in order; a large bag is sampled as in the study.

    Raises `Refused` for no file, two slides of one name, and as `read_slide` does.
    """
    if not paths:
        raise Refused("no slide given: name the feature file of at least one.")
    names, inputs = [path.stem for path in paths], config.inputs
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise Refused(f"slide {', '.join(twice)} is given twice; a patient's bag holds each slide once.")
    parts, tables, edges = zip(*(read_slide(path, inputs) for path in paths), strict=True)
    features = np.concatenate(parts)
    patches: pd.DataFrame = pd.concat(tables, ignore_index=True).astype({"slide_id": pd.CategoricalDtype(names)})
    size, patient = len(patches), patient_id or names[0]
    if inputs.max_patches is not None and size > inputs.max_patches:
        rows = sampled(size, inputs.max_patches, inputs.sample_seed, patient)
        patches, features = patches.iloc[rows].reset_index(drop=True), features[rows]
    return PatientBag(patient, size, patches, features, dict(zip(names, edges, strict=True)))
