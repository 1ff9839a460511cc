"""Makes slide feature files in the layouts that tools really write, for a given cohort.

The features are random; they are a stand-in for real ones in form and size, never in meaning.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch

from steph.data.cohort import COLUMNS, Cohort, cohort_from
from steph.data.features import open_slide

PATCH = 256


def fabricate(cohort: Cohort, folder: Path, layout: str, dim: int, mean_patches: int, seed: int = 0) -> dict[str, Path]:
    """Write a feature file per slide of `cohort` under `folder` and return them by slide id.

    layout: "mahmoodlab", "trident" or "clam". Patch counts are log-normal with mean `mean_patches`. In a tenth to a
    half of a slide's patches, the patient's standardised risk is added along one fixed direction.
    The same cohort and seed give the same features and coordinates in every layout.
    """
    write = LAYOUTS[layout]
    risk = patient_risk(cohort)
    direction = _generator(seed, "direction").standard_normal(dim)
    direction /= np.linalg.norm(direction)
    written = {}
    for row in cohort.slides.itertuples():
        features, coords = _slide(row.slide_id, risk[row.patient_id] * direction, mean_patches, seed)
        written[row.slide_id] = write(folder, row.slide_id, row.project, features, coords)
    return written


def slides_of(name: str, folder: Path, layout: str, patient: str, slide: str) -> pd.DataFrame:
    """Write the slide files of 40 made-up patients, whose names have these shapes; the table of their follow-up."""
    generator, rows = np.random.default_rng(len(name)), []
    for i in range(40):
        who, days, event = patient.format(i), generator.integers(20, 4000), int(generator.random() < 0.5)
        rows += [[who, who + slide.format(k), name, days, event] for k in range(1, 2 + i % 2)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    fabricate(cohort_from(table, name, "made"), folder, layout, dim=12, mean_patches=10, seed=1)
    return table


def clinical_table(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The patients of such tables as TCGA-CDR has them."""
    names = {"patient_id": "bcr_patient_barcode", "project": "type", "event": "DSS", "time_days": "DSS.time"}
    return pd.concat(tables).drop_duplicates("patient_id")[list(names)].rename(columns=names)


def read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Features and coordinates of a whole feature file."""
    with open_slide(path) as slide:
        return slide.read()


def patient_risk(cohort: Cohort) -> dict[str, float]:
    """Standardised martingale residual of each patient: 1 or 0 for an event, less the Nelson-Aalen cumulative hazard
    at the patient's time. Early deaths are high, long survival is low."""
    table = cohort.patients
    time, event = table["time_days"].to_numpy(), table["event"].to_numpy()
    at_risk = (time[None, :] >= time[:, None]).sum(axis=1)
    hazard = np.where(event, 1 / at_risk, 0)
    residual = event - (hazard[None, :] * (time[None, :] <= time[:, None])).sum(axis=1)
    standard = (residual - residual.mean()) / max(residual.std(), 1e-12)
    return dict(zip(table["patient_id"], standard.tolist(), strict=True))


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _slide(slide_id: str, shift: np.ndarray, mean_patches: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """features (N, D) float32, coords (N, 2) level-0 pixels: N places of a grid, row by row, as tools list them."""
    rng = _generator(seed, slide_id)
    spread = 0.6
    n = max(int(rng.lognormal(np.log(mean_patches) - spread**2 / 2, spread)), 1)
    features = rng.standard_normal((n, len(shift)), dtype=np.float32)
    carriers = rng.random(n) < rng.uniform(0.1, 0.5)
    features[carriers] += shift.astype(np.float32)
    side = int(np.ceil(np.sqrt(2 * n)))
    places = np.sort(rng.choice(side * side, n, replace=False))
    return features, np.stack([places % side, places // side], axis=1) * PATCH


def _mahmoodlab(folder: Path, slide_id: str, project: str, features: np.ndarray, coords: np.ndarray) -> Path:
    # Of all projects, BRCA comes in two archives.
    part = ("_IDC", "_OTHERS")[hashlib.sha256(slide_id.encode()).digest()[0] % 2] if project == "BRCA" else ""
    path = folder / "TCGA" / f"TCGA-{project}{part}" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features[None]
        file["coords"] = coords[None].astype(np.int64)
        file["coords_patching"] = coords.astype(np.int64)
        file["annots"] = np.zeros((1, len(features), 1), np.float32)
    return path


def _trident(folder: Path, slide_id: str, project: str, features: np.ndarray, coords: np.ndarray) -> Path:
    path = folder / f"20x_{PATCH}px_0px_overlap" / "features_uni_v2" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, chunks=(min(len(features), 128), features.shape[1]))
        file.create_dataset("coords", data=coords.astype(np.int64)).attrs.update(
            patch_size=PATCH, patch_size_level0=PATCH * 2, level0_magnification=40, target_magnification=20, overlap=0,
            name=slide_id, savetodir="None",
        )  # fmt: skip
    path.with_suffix(".h5.lock").touch()  # Left behind by a killed run, as happens.
    return path


def _clam(folder: Path, slide_id: str, project: str, features: np.ndarray, coords: np.ndarray) -> Path:
    path, tensor = folder / "h5_files" / f"{slide_id}.h5", folder / "pt_files" / f"{slide_id}.pt"
    for each in (path, tensor):
        each.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["coords"] = coords.astype(np.int32)
    torch.save(torch.from_numpy(features), tensor)
    return path


LAYOUTS: dict[str, Callable[[Path, str, str, np.ndarray, np.ndarray], Path]] = {
    "mahmoodlab": _mahmoodlab,
    "trident": _trident,
    "clam": _clam,
}
