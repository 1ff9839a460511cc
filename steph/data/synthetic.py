"""The demo cohort: a synthetic pan-cancer data set whose prognostic factors, and what cancers share of them, are known.

A patient has a tissue composition ``p`` (the share of the tumour and of five background phenotypes) and a tumour state
``u``. The true log-risk is one part tumour state and one part composition,

    eta = 1.2 / sqrt(2) * (beta_c . u + gamma_c . z(p)),

where the unit vectors beta_c and gamma_c belong to the cancer c: with sharing, related cancers have similar ones; in
the twin without sharing, no cancer can learn from another. Survival times follow eta; patches show p and u through
noise. ``book/demo_cohort.md`` explains it, with the constants' reasons and with what such a cohort cannot show.

Every random number comes from a stream named after what it is for (seed, data set, group of patients, quantity), never
from a running generator. So data sets do not depend on one another, nor on the order in which they are made; external
patients do not change the cohort; and the twin has the very slides of the demo, with other outcomes.
"""

from __future__ import annotations

import ast
import hashlib
import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.data.cohort import Cohort, cohort_from, write_cohort
from steph.data.manifest import DatasetEntry, Study, Synthetic, unknown
from steph.data.packing import write_store
from steph.files.records import fingerprint
from steph.files.tables import write_csv

GROUPS = ("squamous", "gut", "gynaecological", "vascular", "mesenchymal")
"""What cancers may have in common."""

MEMBERSHIPS = {
    "BRCA": (0, 0.2, 1, 0, 0),
    "UCEC": (0, 0.2, 1, 0, 0),
    "COADREAD": (0, 1, 0, 0, 0),
    "STES": (0.6, 0.8, 0, 0, 0),
    "LUNG": (0.8, 0.6, 0, 0, 0),
    "HNSC": (1, 0, 0, 0, 0),
    "BLCA": (1, 0, 0.3, 0, 0),
    "CESC": (0.9, 0, 0.5, 0, 0),
    "KIPAN": (0, 0, 0, 1, 0),
    "LIHC": (0, 0.5, 0, 0.9, 0),
    "GBMLGG": (0, 0, 0, 0, 1),
    "SKCM": (0.2, 0, 0, 0.2, 0.8),
    "SARC": (0, 0, 0, 0.2, 1),
}
"""How much each cancer belongs to each of the `GROUPS`."""

PHENOTYPES = ("tumour", "background 1", "background 2", "background 3", "background 4", "background 5")
N_FACTORS = 6  # of the tumour state; as many as phenotypes, so that beta and gamma are made alike
RHO_PAN, RHO_GROUP = 0.5, 0.75  # weights of what all cancers and what the members of a group have in common
RISK_SD = 1.2
WEIBULL_SHAPE = 1.2
PATCH_PX = 256  # edge of a patch, and of the grid that patches lie on
GRID = 17  # cells along the side of the square in which a slide's tissue grows
MIN_PATIENTS = 10
RECIPE = 1
"""To be raised whenever the numbers that are made change: stores of an older recipe are then refused."""
SOURCE = "synthetic: made by steph.data.synthetic, not patients"


@dataclass(frozen=True, eq=False)
class Drawn:
    """Patients of one made cancer, with everything that is true about them.

    patients: one row each, patient_id, log_risk, time_days, event, n_slides, then the share of each phenotype.
    slides: one row each in the patients' order, slide_id, patient_id, n_patches. Per patch, in the slides' order:
    features float32 (N, D); coords int32 (N, 2), level-0 pixels of the upper left corner, x before y; phenotype int64
    (N,), a position in `PHENOTYPES`.
    """

    patients: pd.DataFrame
    slides: pd.DataFrame
    features: np.ndarray
    coords: np.ndarray
    phenotype: np.ndarray


def make_dataset(study: Study, dataset: str) -> None:
    """Make one data set of a synthetic study, below ``study.data``: ``labels/<D>.csv``, ``oracle/<D>.csv`` (patient_id,
    log_risk) and ``stores/<D>.h5`` of the cohort, and the same below ``external/`` for patients never trained on.

    Each file is whole or not there; the same study and data set give the same content, bit for bit. Raises `Refused`
    for a study that is not synthetic, a data set without planted factors, or sizes that cannot be made.
    """
    if _synthetic(study).external_patients:
        _write(study, dataset, study.data / "external", external=True)
    _write(study, dataset, study.data, external=False)


def _write(study: Study, dataset: str, folder: Path, external: bool) -> None:
    drawn = draw(study, dataset, external)
    write_cohort(_cohort(study, dataset, drawn.patients, drawn.slides), folder / "labels" / f"{dataset}.csv")
    write_csv(drawn.patients[["patient_id", "log_risk"]], folder / "oracle" / f"{dataset}.csv")
    ends = np.cumsum(drawn.slides["n_patches"])[:-1]
    slides = zip(drawn.slides["slide_id"], np.split(drawn.features, ends), np.split(drawn.coords, ends), strict=True)
    sizes = drawn.slides["n_patches"].tolist()
    made_from = provenance(study, dataset, external)
    write_store(folder / "stores" / f"{dataset}.h5", study.features, slides, sizes, made_from)


def made_cohort(study: Study, dataset: str, external: bool = False) -> Cohort:
    """The cohort that `make_dataset` writes, or its external patients, without drawing a patch."""
    patients, slides, _ = _patients_and_slides(study, dataset, external)
    return _cohort(study, dataset, patients, slides)


def _cohort(study: Study, dataset: str, patients: pd.DataFrame, slides: pd.DataFrame) -> Cohort:
    table = slides.merge(patients, on="patient_id", validate="many_to_one")
    projects = np.resize(study.entry(dataset).projects, len(patients))
    table["project"] = table["patient_id"].map(dict(zip(patients["patient_id"], projects, strict=True)))
    return cohort_from(table, dataset, f"the synthetic cohort {dataset}")


def made_fingerprint(provenance: Mapping[str, Any], features: Mapping[str, Any]) -> str:
    """Hash of what decides a made store's content. provenance: as `provenance` gives it; features: what the store says
    of them (`steph.data.store.describe`), with the precision."""
    return fingerprint({"provenance": provenance, "features": features, "code": _code()}, 64)


@cache
def _code() -> str:
    """Hash of this module's code; comments do not count."""
    return fingerprint(ast.dump(ast.parse(Path(__file__).read_text(encoding="utf-8"))))


def provenance(study: Study, dataset: str, external: bool = False) -> dict[str, Any]:
    """What a made store says it was made from: a store that says something else is of another demo."""
    return {
        "source": SOURCE,
        "recipe": RECIPE,
        "dataset": dataset,
        "external": external,
        "synthetic": _synthetic(study).model_dump(),
        "entry": study.entry(dataset).model_dump(mode="json", exclude={"folders"}),
    }


def truth(study: Study, dataset: str, external: bool = False) -> pd.DataFrame:
    """What each patch shows, one row per patch in the store's order: patient_id, slide_id, x, y (level-0 pixels),
    phenotype, tumour (bool). It is drawn again, as `make_dataset` drew it."""
    drawn = draw(study, dataset, external)
    table = drawn.slides.loc[drawn.slides.index.repeat(drawn.slides["n_patches"]), ["patient_id", "slide_id"]]
    return table.reset_index(drop=True).assign(
        x=drawn.coords[:, 0],
        y=drawn.coords[:, 1],
        phenotype=np.array(PHENOTYPES)[drawn.phenotype],
        tumour=drawn.phenotype == 0,
    )


def planted_similarity(study: Study) -> pd.DataFrame:
    """Planted similarity of the study's cancers, (C, C), 1 on the diagonal: half the product of their beta plus half
    that of their gamma. It is the correlation of two cancers' true log-risks over the same patients. In the twin it is
    -1/12 between any two of the 13 cancers."""
    synthetic, names = _synthetic(study), list(study.datasets)
    known = list(MEMBERSHIPS)
    rows = [known.index(_planted(name)) for name in names]
    beta, gamma = (_directions(synthetic.seed, synthetic.sharing, part)[rows] for part in ("beta", "gamma"))
    similarity = (_product(beta, beta.T) + _product(gamma, gamma.T)) / 2
    return pd.DataFrame(similarity, index=names, columns=names)


def draw(study: Study, dataset: str, external: bool = False) -> Drawn:
    """Draw a data set's cohort, or its external patients. The same arguments give the same numbers, bit for bit."""
    patients, slides, latent = _patients_and_slides(study, dataset, external)
    stream = (_synthetic(study).seed, dataset, _group(external))
    n_patches = slides["n_patches"].to_numpy()
    of_slide = np.repeat(np.arange(len(patients)), latent.n_slides)
    fraction = latent.composition[of_slide, 0]
    n_tumour = np.clip(np.round(fraction * n_patches), 1, n_patches - 1).astype(int)
    coords, tumour = _lay_out(stream, n_patches, n_tumour)
    of_patch = np.repeat(of_slide, n_patches)
    phenotype = np.where(tumour, 0, _background(stream, latent.composition[of_patch]))
    features = _patches(stream, study.features.dim, latent, phenotype, of_patch, n_patches)
    return Drawn(patients, slides, features, coords, phenotype)


def _patients_and_slides(study: Study, dataset: str, external: bool) -> tuple[pd.DataFrame, pd.DataFrame, _Patients]:
    """The tables of `Drawn`, and what patients' patches follow from."""
    synthetic, entry = _synthetic(study), study.entry(dataset)
    in_cohort = _n_patients(synthetic, entry, dataset)
    n = synthetic.external_patients if external else in_cohort
    latent = _draw_patients(synthetic, entry, dataset, n, external)
    threshold = _time_scale(synthetic, entry, dataset)
    event = latent.censoring_ratio > threshold
    # Whole days, and never the day of diagnosis.
    time = np.ceil(np.where(event, np.exp(threshold) * latent.unit_time, latent.censored_at))
    width = max(4, len(str(n)))
    ids = [f"DEMO-{dataset}-{'X' if external else ''}{i:0{width}d}" for i in range(1, n + 1)]
    patients = pd.DataFrame(
        {"patient_id": ids, "log_risk": latent.log_risk, "time_days": time, "event": event, "n_slides": latent.n_slides}
    ).join(pd.DataFrame(latent.composition, columns=list(PHENOTYPES)))
    of_slide = np.repeat(np.arange(n), latent.n_slides)
    number = np.concatenate([np.arange(k) for k in latent.n_slides])
    # A patient's patches are dealt to the slides evenly.
    n_patches = latent.n_patches[of_slide] // latent.n_slides[of_slide]
    n_patches = n_patches + (number < latent.n_patches[of_slide] % latent.n_slides[of_slide])
    slides = pd.DataFrame(
        {
            "slide_id": [f"{ids[i]}-DX{j + 1}" for i, j in zip(of_slide, number, strict=True)],
            "patient_id": [ids[i] for i in of_slide],
            "n_patches": n_patches,
        }
    )
    return patients, slides, latent


@dataclass(frozen=True, eq=False)
class _Patients:
    """Latent quantities of n patients. unit_time: survival at a time scale of 1 day. censoring_ratio: log of the day of
    censoring over unit_time; a patient dies in follow-up where it exceeds the log of the time scale."""

    tumour_state: np.ndarray  # (n, N_FACTORS)
    background_state: np.ndarray  # (n, N_FACTORS)
    composition: np.ndarray  # (n, phenotypes), rows sum to 1
    log_risk: np.ndarray  # (n,)
    unit_time: np.ndarray
    censored_at: np.ndarray  # days
    n_slides: np.ndarray
    n_patches: np.ndarray

    @property
    def censoring_ratio(self) -> np.ndarray:
        return np.log(self.censored_at / self.unit_time)


def _draw_patients(synthetic: Synthetic, entry: DatasetEntry, dataset: str, n: int, external: bool) -> _Patients:
    stream = (synthetic.seed, dataset, _group(external))
    row = list(MEMBERSHIPS).index(_planted(dataset))
    beta, gamma = (_directions(synthetic.seed, synthetic.sharing, part)[row] for part in ("beta", "gamma"))
    state = _rng(*stream, "tumour state").standard_normal((n, N_FACTORS))
    tissue = _rng(synthetic.seed, dataset, "background phenotypes").dirichlet(np.full(len(PHENOTYPES) - 1, 8.0))
    composition = _composition(stream, tissue, n)
    # Centred and scaled with the cancer's own compositions, many of them, so that no finite cohort sets the scale.
    score = _product(_standardised(composition), gamma)
    typical = _product(_standardised(_composition((synthetic.seed, dataset, "typical"), tissue, 20_000)), gamma)
    risk = RISK_SD / np.sqrt(2) * (_product(state, beta) + (score - typical.mean()) / typical.std())
    slides_per_patient = (entry.slides or 0) / (entry.patients or 1)
    n_slides = 1 + _rng(*stream, "slides").binomial(3, (slides_per_patient - 1) / 3, n)
    median = 20 * np.sqrt((entry.mean_patches or 0) / 1e4)
    size = median * np.exp(0.35 * _rng(*stream, "bag size").standard_normal(n))
    return _Patients(
        tumour_state=state,
        background_state=_rng(*stream, "background state").standard_normal((n, N_FACTORS)),
        composition=composition,
        log_risk=risk,
        unit_time=(_rng(*stream, "survival").exponential(size=n) / np.exp(risk)) ** (1 / WEIBULL_SHAPE),
        censored_at=30 + _rng(*stream, "censoring").gamma(1.6, 692, n),
        n_slides=n_slides,
        # Enough for a tumour and something around it on every slide.
        n_patches=np.maximum(np.round(np.clip(size, 6, 40)).astype(int), 4 * n_slides),
    )


def _time_scale(synthetic: Synthetic, entry: DatasetEntry, dataset: str) -> float:
    """Log of the time scale (days) at which as many of the cohort die in follow-up as Table S1 says. A patient does
    where the censoring ratio exceeds it, so it lies between two neighbours of the sorted ratios."""
    n = _n_patients(synthetic, entry, dataset)
    ratio = np.sort(_draw_patients(synthetic, entry, dataset, n, external=False).censoring_ratio)[::-1]
    events = min(max(round(n * (1 - (entry.survival_rate_pct or 0) / 100)), 1), n - 1)
    return float(ratio[events - 1] + ratio[events]) / 2


def _composition(stream: tuple[int | str, ...], tissue: np.ndarray, n: int) -> np.ndarray:
    """Compositions (n, phenotypes) of patients whose background is on average `tissue` (5,)."""
    tumour = np.clip(_rng(*stream, "tumour fraction").beta(0.35 * 6, 0.65 * 6, (n, 1)), 0.1, 0.9)
    background = _rng(*stream, "background").dirichlet(3 * tissue, n)
    return np.hstack([tumour, (1 - tumour) * background])


def _standardised(composition: np.ndarray) -> np.ndarray:
    """z(p): the logarithms of a composition (n, phenotypes), turned so that over all tissues their entries have mean 0,
    variance 1 and no correlation. Then the product of two gamma is the correlation of what they predict."""
    centre, whitening = _whitening()
    return _product(_log(composition) - centre, whitening)


@cache
def _whitening() -> tuple[np.ndarray, np.ndarray]:
    even = np.full(len(PHENOTYPES) - 1, 1 / (len(PHENOTYPES) - 1))
    logs = _log(_composition(("any tissue",), even, 50_000))
    centred = logs - logs.mean(axis=0)
    variance, axes = np.linalg.eigh(_product(centred.T, centred) / len(logs))
    return logs.mean(axis=0), _product(axes / np.sqrt(variance), axes.T)


def _log(composition: np.ndarray) -> np.ndarray:
    """Logarithm with a floor: a share far below one patch in a bag cannot be seen, and must not rule the risk."""
    return np.log(composition + 0.02)


@cache
def _directions(seed: int, sharing: bool, part: str) -> np.ndarray:
    """beta or gamma of all cancers of `MEMBERSHIPS`, unit rows (13, 6).

    With sharing, a cancer's direction leans to one that all cancers have, to those of its groups, and to its own.
    Without, it is its own alone. Thirteen own directions cannot be orthogonal in six dimensions. But beta and gamma
    side by side have twelve, enough for a regular simplex: the directions wind around the circle at three frequencies
    in beta and at three others in gamma, so that any two cancers' products add up to -1/6.
    """
    place = _rng(seed, "own directions").permutation(len(MEMBERSHIPS))
    frequency = np.arange(1, 4) + (3 if part == "gamma" else 0)
    angle = 2 * np.pi * np.outer(place, frequency) / len(MEMBERSHIPS)
    separate = _product(
        np.hstack([np.cos(angle), np.sin(angle)]) / np.sqrt(3), _rotation(6, seed, part, "own directions")
    )
    if not sharing:
        return separate
    pan, *groups = _rotation(6, seed, part, "shared directions")
    member = np.array(list(MEMBERSHIPS.values()), dtype=float)
    member /= np.linalg.norm(member, axis=1, keepdims=True)
    mixed = (
        RHO_PAN * pan
        + RHO_GROUP * _product(member, np.array(groups))
        + np.sqrt(1 - RHO_PAN**2 - RHO_GROUP**2) * separate
    )
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def _patches(
    stream: tuple[int, str, str],
    dim: int,
    patients: _Patients,
    phenotype: np.ndarray,
    of_patch: np.ndarray,
    n_patches: np.ndarray,
) -> np.ndarray:
    """Features (N, dim) of patches: the phenotype's prototype, the cancer's shift, the slide's batch effect, the
    state of the patient's tumour (or of the background, in a background patch), and noise."""
    seed, dataset, _ = stream
    if dim < N_FACTORS:
        raise Refused(f"features.dim is {dim}; the synthetic cohort needs at least {N_FACTORS} numbers a patch.")
    prototype = 5 * _unit(_rng(seed, "prototypes").standard_normal((len(PHENOTYPES), dim)))
    shift = _unit(_rng(seed, dataset, "shift").standard_normal((1, dim)))
    batch = _rng(*stream, "batch effect").standard_normal((len(n_patches), 4))
    batch = _product(batch, _rotation(dim, seed, "batch effect")[:4])
    state = np.where(phenotype[:, None] == 0, patients.tumour_state[of_patch], patients.background_state[of_patch])
    state = state + 0.5 * _rng(*stream, "state noise").standard_normal(state.shape)
    noise = _rng(*stream, "noise").standard_normal((len(phenotype), dim))
    signal = _product(state, _rotation(dim, seed, "factors")[:N_FACTORS])
    return (prototype[phenotype] + shift + np.repeat(batch, n_patches, axis=0) + signal + noise).astype(np.float32)


def _background(stream: tuple[int, str, str], composition: np.ndarray) -> np.ndarray:
    """A background phenotype (1..5) for each patch, by the patients' composition (N, phenotypes)."""
    share = np.cumsum(composition[:, 1:], axis=1)
    chance = _rng(*stream, "phenotypes").random((len(composition), 1)) * share[:, -1:]
    return 1 + (chance > share[:, :-1]).sum(axis=1)


def _lay_out(
    stream: tuple[int, str, str], n_patches: np.ndarray, n_tumour: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places of all slides' patches: coords (N, 2) in pixels, column by column, and whether they are tumour (N,).

    Tissue grows cell by cell from the middle of a grid, preferring the inside of an ellipse; the tumour grows from
    one of its cells. So both are connected over edges.
    """
    n, rng = len(n_patches), _rng(*stream, "layout")
    stretch, turn = rng.uniform(1, 1.6, (n, 1)), rng.uniform(0, np.pi, (n, 1))
    rough, spread, start = rng.random((n, GRID**2)), rng.random((n, GRID**2)), rng.random(n)
    corner = PATCH_PX * rng.integers(4, 64, (n, 2))
    x, y = np.divmod(np.arange(GRID**2), GRID)
    dx, dy = x - GRID // 2, y - GRID // 2
    along, across = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    tissue_cost = np.hypot(along / stretch, across * stretch) + 1.5 * rough
    coords, tumour = [], []
    for i in range(n):
        tissue = sorted(_grow(GRID**2 // 2, n_patches[i], tissue_cost[i].tolist(), range(GRID**2)))
        seed = tissue[int(start[i] * len(tissue))]
        away = np.hypot(x - x[seed], y - y[seed]) + spread[i]
        ill = set(_grow(seed, n_tumour[i], away.tolist(), set(tissue)))
        coords.append(corner[i] + PATCH_PX * np.stack([x[tissue], y[tissue]], axis=1))
        tumour += [cell in ill for cell in tissue]
    return np.concatenate(coords).astype(np.int32), np.array(tumour)


def _grow(start: int, n: int, cost: list[float], allowed: Collection[int]) -> list[int]:
    """n connected cells of the grid, from `start` on always the cheapest allowed neighbour."""
    region: list[int] = []
    waiting, reached = [(cost[start], start)], {start}
    while len(region) < n:
        _, cell = heapq.heappop(waiting)
        region.append(cell)
        for neighbour in _neighbours()[cell]:
            if neighbour in allowed and neighbour not in reached:
                reached.add(neighbour)
                heapq.heappush(waiting, (cost[neighbour], neighbour))
    return region


@cache
def _neighbours() -> list[list[int]]:
    """Cells that share an edge with each cell of the grid."""
    steps = ((-1, 0), (1, 0), (0, -1), (0, 1))
    cells = [divmod(cell, GRID) for cell in range(GRID**2)]
    return [
        [(x + dx) * GRID + y + dy for dx, dy in steps if 0 <= x + dx < GRID and 0 <= y + dy < GRID] for x, y in cells
    ]


def _rng(*stream: int | str) -> np.random.Generator:
    """The random numbers of a named stream."""
    name = "/".join(map(str, ("steph demo cohort", *stream)))
    return np.random.default_rng(np.random.SeedSequence(int(hashlib.sha256(name.encode()).hexdigest(), 16)))


def _rotation(dim: int, *stream: int | str) -> np.ndarray:
    """A random orthogonal matrix (dim, dim), uniform over all of them."""
    q, r = np.linalg.qr(_rng(*stream).standard_normal((dim, dim)))
    return q * np.sign(np.diag(r))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Matrix product, summed in a fixed order: a multithreaded BLAS may choose another with its number of threads."""
    return np.einsum("ij,jk->ik", a, b) if b.ndim == 2 else np.einsum("ij,j->i", a, b)


def _group(external: bool) -> str:
    return "external" if external else "cohort"


def _synthetic(study: Study) -> Synthetic:
    if study.synthetic is None:
        raise Refused(
            f"study {study.name} is not synthetic: its manifest has no `synthetic`, so no cohort is made for it."
        )
    return study.synthetic


def _planted(dataset: str) -> str:
    if dataset not in MEMBERSHIPS:
        raise Refused(unknown("cancer", dataset, list(MEMBERSHIPS), "the synthetic cohort"))
    return dataset


def _n_patients(synthetic: Synthetic, entry: DatasetEntry, dataset: str) -> int:
    """Patients of the cohort. Raises `Refused` for an entry from which no cohort can be made."""
    needed = {name: getattr(entry, name) for name in ("patients", "slides", "survival_rate_pct", "mean_patches")}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise Refused(f"data set {dataset}: a synthetic cohort needs {', '.join(missing)}; give them in the manifest.")
    patients, slides = int(needed["patients"]), int(needed["slides"])
    if not patients <= slides <= 4 * patients:
        raise Refused(
            f"data set {dataset}: {slides} slides of {patients} patients; 1 to 4 slides a patient can be made."
        )
    n = round(synthetic.scale * patients)
    if n < MIN_PATIENTS:
        raise Refused(
            f"data set {dataset}: scale {synthetic.scale} of {patients} patients leaves {n}; at least {MIN_PATIENTS} "
            "are needed. Raise synthetic.scale in the manifest."
        )
    return n
