"""The demo cohort: a synthetic pan-cancer data set whose prognostic factors, and what cancers share of them, are known.

A patient has a tissue composition ``p`` (the share of the tumour and of five background phenotypes) and a tumour state
``u``. The true log-risk is one part tumour state and one part composition,

    eta = 1.2 / sqrt(2) * (beta_c . u + gamma_c . z(p)),

where the unit vectors beta_c and gamma_c belong to the cancer c: with sharing, related cancers have similar ones; in
the twin without sharing, no cancer can learn from another. Survival times follow eta; patches show p and u through
noise. These are the demo's numbers, fields of the manifest's section `synthetic`, as is how much cancers share.
``book/demo_cohort.md`` explains it, with the numbers' reasons and with what such a cohort cannot show.

Every random number comes from a stream named after its purpose, so data sets do not depend on one another, external
patients do not change the cohort, and the twin has the very slides of the demo, with other outcomes.
"""

import ast
import hashlib
import heapq
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.data.cohort import Cohort, cohort_from, write_cohort
from steph.data.manifest import Study, Synthetic, refuse_unknown
from steph.data.packing import write_store
from steph.files.records import fingerprint
from steph.files.tables import write_csv

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
"""How much each cancer belongs to the squamous, gut, gynaecological, vascular and mesenchymal cancers."""

PHENOTYPES = ("tumour", "background 1", "background 2", "background 3", "background 4", "background 5")
N_FACTORS = 6  # of the tumour state; as many as phenotypes, so that beta and gamma are made alike
WEIBULL_SHAPE = 1.2
PATCH_PX = 256  # edge of a patch, and of the grid that patches lie on
GRID = 17  # cells along the side of the square in which a slide's tissue grows
MIN_SHARE = 0.02  # floor of logarithms: a share far below one patch in a bag cannot be seen, and must not rule the risk
SIZES = ("patients", "slides", "survival_rate_pct", "mean_patches")  # what the manifest must say of a data set
RECIPE = 1  # to be raised whenever the numbers that are made change: stores of an older recipe are then refused
SOURCE = "synthetic: made by steph.data.synthetic, not patients"
Stream = tuple[int | str, ...]  # name of a stream of random numbers: seed, data set, group of patients


@dataclass(frozen=True, eq=False)
class Drawn:
    """Patients of one made cancer, with everything that is true about them.

    patients: one row each, patient_id, project, log_risk, time_days, event, n_slides, n_patches, phenotypes' shares.
    slides: one row each in the patients' order, the same with slide_id and the slide's own n_patches. Per patch, in the
    slides' order: features float32 (N, D); coords int32 (N, 2), level-0 pixels of the upper left corner, x before y;
    phenotype int64 (N,), a position in `PHENOTYPES`.
    """

    patients: pd.DataFrame
    slides: pd.DataFrame
    features: np.ndarray
    coords: np.ndarray
    phenotype: np.ndarray


def make_dataset(study: Study, dataset: str) -> None:
    """Make one data set of a synthetic study, below ``study.data``: ``labels/<D>.csv``, ``oracle/<D>.csv`` (patient_id,
    log_risk) and ``stores/<D>.h5`` of the cohort, and the same below ``external/`` for patients never trained on.

    The same study and data set give the same content, bit for bit. Raises `Refused` for a study that is not synthetic,
    a data set without planted factors, or sizes that cannot be made.
    """
    for external in (True, False) if _synthetic(study).external_patients else (False,):
        folder = study.data / "external" if external else study.data
        drawn = draw(study, dataset, external)
        write_cohort(made_cohort(study, dataset, external), folder / "labels" / f"{dataset}.csv")
        write_csv(drawn.patients[["patient_id", "log_risk"]], folder / "oracle" / f"{dataset}.csv")
        sizes = dict(zip(drawn.slides["slide_id"], drawn.slides["n_patches"].tolist(), strict=True))
        ends = np.cumsum(list(sizes.values()))[:-1]
        slides = zip(np.split(drawn.features, ends), np.split(drawn.coords, ends), strict=True)
        made_from = provenance(study, dataset, external)
        write_store(folder / "stores" / f"{dataset}.h5", study.features, slides, sizes, made_from)


def made_cohort(study: Study, dataset: str, external: bool) -> Cohort:
    """The cohort that `make_dataset` writes, or its external patients, without drawing a patch."""
    return cohort_from(_slides(_draw_patients(study, dataset, external)), dataset, f"the synthetic cohort {dataset}")


def made_fingerprint(provenance: dict[str, Any], features: dict[str, Any]) -> str:
    """Hash of what decides a made store's content: its `provenance`, its description with the precision, and this
    module's code, whose comments do not count."""
    code = ast.dump(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    return fingerprint({"provenance": provenance, "features": features, "code": code}, 64)


def provenance(study: Study, dataset: str, external: bool) -> dict[str, Any]:
    """What a made store says it was made from: a store that says something else is of another demo."""
    return {
        "source": SOURCE,
        "recipe": RECIPE,
        "dataset": dataset,
        "external": external,
        "synthetic": _synthetic(study).model_dump(mode="json"),
        "entry": study.entry(dataset).model_dump(mode="json", exclude={"folders"}),
    }


def truth(study: Study, dataset: str) -> pd.DataFrame:
    """What each patch of the cohort shows, one row per patch in the store's order: patient_id, slide_id, x, y (level-0
    pixels), phenotype, tumour (bool). It is drawn again, as `make_dataset` drew it."""
    drawn = draw(study, dataset)
    rows = drawn.slides.index.repeat(drawn.slides["n_patches"])
    table = drawn.slides.loc[rows, ["patient_id", "slide_id"]].reset_index(drop=True)
    table[["x", "y"]] = drawn.coords
    return table.assign(phenotype=np.array(PHENOTYPES)[drawn.phenotype], tumour=drawn.phenotype == 0)


def planted_similarity(study: Study) -> pd.DataFrame:
    """Planted similarity of the study's cancers, (C, C), 1 on the diagonal: the product of their beta and that of
    their gamma, added by their shares of the log-risk. It is the correlation of two cancers' true log-risks over the
    same patients. In the demo's twin it is -1/12 between any two of the 13 cancers."""
    names, share = list(study.datasets), _synthetic(study).state_share
    beta, gamma = _directions(_synthetic(study))
    similarity = share * _product(beta, beta.T) + (1 - share) * _product(gamma, gamma.T)
    return pd.DataFrame(similarity, list(MEMBERSHIPS), list(MEMBERSHIPS)).loc[names, names]


def draw(study: Study, dataset: str, external: bool = False) -> Drawn:
    """Draw a data set's cohort, or its external patients. The same arguments give the same numbers, bit for bit."""
    patients, dim = _draw_patients(study, dataset, external), study.features.dim
    if dim < N_FACTORS:
        raise Refused(f"features.dim is {dim}; the synthetic cohort needs at least {N_FACTORS} numbers a patch.")
    seed, *_ = stream = _stream(study, dataset, external)
    looks = () if _synthetic(study).shared_looks else (dataset,)
    slides = _slides(patients)
    coords, tumour = _lay_out(stream, slides["n_patches"].to_numpy(), slides["tumour"].to_numpy())
    # Background patches show phenotypes 1 to 5 with the chances of the patient's composition.
    of_patch = np.repeat(np.arange(len(patients)), patients["n_patches"])
    share = np.cumsum(patients[list(PHENOTYPES[1:])].to_numpy()[of_patch], axis=1)
    chance = _rng(*stream, "phenotypes").random((len(of_patch), 1)) * share[:, -1:]
    phenotype = np.where(tumour, 0, 1 + (chance > share[:, :-1]).sum(axis=1))
    # Features are the phenotype's prototype, the cancer's shift, the slide's batch effect, the state of the patient's
    # tumour (in a background patch one that says nothing of the risk), and noise.
    prototype = 5 * _unit(_rng(seed, *looks, "prototypes").standard_normal((len(PHENOTYPES), dim)))
    shift = _unit(_rng(seed, dataset, "shift").standard_normal((1, dim)))
    batch = _rng(*stream, "batch effect").standard_normal((len(slides), 4))
    batch = _product(batch, _rotation(dim, seed, "batch effect")[:4])
    size = (len(patients), N_FACTORS)
    states = [_rng(*stream, f"{tissue} state").standard_normal(size) for tissue in ("tumour", "background")]
    state = np.where(phenotype[:, None] == 0, states[0][of_patch], states[1][of_patch])
    state = state + 0.5 * _rng(*stream, "state noise").standard_normal(state.shape)
    signal = _product(state, _rotation(dim, seed, "factors")[:N_FACTORS])
    noise = _rng(*stream, "noise").standard_normal((len(phenotype), dim))
    features = prototype[phenotype] + shift + np.repeat(batch, slides["n_patches"], axis=0) + signal + noise
    return Drawn(patients, slides, features.astype(np.float32), coords, phenotype)


def _draw_patients(study: Study, dataset: str, external: bool) -> pd.DataFrame:
    """The table of `Drawn`."""
    synthetic, (n, sizes) = _synthetic(study), _sizes(study, dataset)
    # The time scale at which as many of the cohort die in follow-up as Table S1 says: a patient does where the log of
    # the day of censoring over that of death, at a time scale of 1 day, exceeds the scale's own log.
    _, _, days, censored_at = _outcomes(study, dataset, n, external=False)
    ratio = np.sort(np.log(censored_at / days))[::-1]
    events = min(max(round(n * (1 - sizes["survival_rate_pct"] / 100)), 1), n - 1)
    threshold = float(ratio[events - 1] + ratio[events]) / 2
    n = synthetic.external_patients if external else n
    stream = _stream(study, dataset, external)
    composition, log_risk, days, censored_at = _outcomes(study, dataset, n, external)
    event = np.log(censored_at / days) > threshold
    n_slides = 1 + _rng(*stream, "slides").binomial(3, (sizes["slides"] / sizes["patients"] - 1) / 3, n)
    median = synthetic.bag_median * np.sqrt(sizes["mean_patches"] / 1e4)
    bag_size = median * np.exp(0.35 * _rng(*stream, "bag size").standard_normal(n))
    patients = {
        "patient_id": [f"DEMO-{dataset}-{'X' if external else ''}{i:04d}" for i in range(1, n + 1)],
        "project": np.resize(study.entry(dataset).projects, n),
        "log_risk": log_risk,
        "time_days": np.ceil(np.where(event, np.exp(threshold) * days, censored_at)),  # never the day of diagnosis
        "event": event,
        "n_slides": n_slides,
        "n_patches": np.maximum(
            np.round(np.clip(bag_size, *synthetic.bag_range)).astype(int), 4 * n_slides
        ),  # tumour and tissue
    }
    return pd.DataFrame(patients | dict(zip(PHENOTYPES, composition.T, strict=True)))


def _slides(patients: pd.DataFrame) -> pd.DataFrame:
    """The table of `Drawn`: a patient's patches are dealt to the slides evenly."""
    slides = patients.loc[patients.index.repeat(patients["n_slides"])].reset_index(drop=True)
    number = slides.groupby("patient_id").cumcount()
    more = number < slides["n_patches"] % slides["n_slides"]
    names = slides["patient_id"] + "-DX" + (number + 1).astype(str)
    return slides.assign(slide_id=names, n_patches=slides["n_patches"] // slides["n_slides"] + more)


def _outcomes(study: Study, dataset: str, n: int, external: bool) -> tuple[np.ndarray, ...]:
    """Of n patients: composition, true log-risk, survival in days at a time scale of 1 day, day of censoring."""
    synthetic, stream = _synthetic(study), _stream(study, dataset, external)
    beta, gamma = _directions(synthetic)[:, list(MEMBERSHIPS).index(dataset)]
    tissue = _rng(synthetic.seed, dataset, "background phenotypes").dirichlet(np.full(len(PHENOTYPES) - 1, 8.0))
    composition = _composition(stream, tissue, n, synthetic.tumour)
    # Centred and scaled with the cancer's own compositions, many of them, so that no finite cohort sets the scale.
    many = _composition((synthetic.seed, dataset, "typical"), tissue, 20_000, synthetic.tumour)
    score, typical = (_product(_standardised(p, synthetic.tumour), gamma) for p in (composition, many))
    state = _product(_rng(*stream, "tumour state").standard_normal((n, N_FACTORS)), beta)
    of_state, of_composition = np.sqrt(2 * synthetic.state_share), np.sqrt(2 * (1 - synthetic.state_share))
    log_risk = of_state * state + of_composition * (score - typical.mean()) / typical.std()
    log_risk = synthetic.risk_sd / np.sqrt(2) * log_risk
    days = (_rng(*stream, "survival").exponential(size=n) / np.exp(log_risk)) ** (1 / WEIBULL_SHAPE)
    return composition, log_risk, days, 30 + _rng(*stream, "censoring").gamma(1.6, 692, n)


def _composition(stream: Stream, tissue: np.ndarray, n: int, fraction: tuple[float, float, float]) -> np.ndarray:
    """Compositions (n, phenotypes) of patients whose background is on average `tissue` (5,). fraction: of tumour, its
    mean and its limits."""
    mean, least, most = fraction
    tumour = np.clip(_rng(*stream, "tumour fraction").beta(6 * mean, 6 * (1 - mean), (n, 1)), least, most)
    background = _rng(*stream, "background").dirichlet(3 * tissue, n)
    return np.hstack([tumour, (1 - tumour) * background])


def _standardised(composition: np.ndarray, fraction: tuple[float, float, float]) -> np.ndarray:
    """z(p): the logarithms of a composition (n, phenotypes), turned so that over all tissues their entries have mean 0,
    variance 1 and no correlation. Then the product of two gamma is the correlation of what they predict."""
    centre, whitening = _whitening(fraction)
    return _product(np.log(composition + MIN_SHARE) - centre, whitening)


@cache
def _whitening(fraction: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    logs = np.log(_composition(("any tissue",), np.full(5, 0.2), 50_000, fraction) + MIN_SHARE)
    centred = logs - logs.mean(axis=0)
    variance, axes = np.linalg.eigh(_product(centred.T, centred) / len(logs))
    return logs.mean(axis=0), _product(axes / np.sqrt(variance), axes.T)


def _directions(synthetic: Synthetic) -> np.ndarray:
    """beta and gamma of all cancers of `MEMBERSHIPS`, unit rows (2, 13, 6).

    With sharing, a cancer's direction leans to one that all cancers have, to those of its groups, and to its own.
    Without, it is its own alone. Thirteen own directions cannot be orthogonal in six dimensions. But beta and gamma
    side by side have twelve, enough for a regular simplex: the directions wind around the circle at three frequencies
    in beta and at three others in gamma, so that any two cancers' products add up to -1/6.
    """
    seed, directions = synthetic.seed, []
    place = _rng(seed, "own directions").permutation(len(MEMBERSHIPS))
    member = _unit(np.array(list(MEMBERSHIPS.values()), dtype=float))
    for part, frequency in (("beta", np.arange(1, 4)), ("gamma", np.arange(4, 7))):
        angle = 2 * np.pi * np.outer(place, frequency) / len(MEMBERSHIPS)
        circles = np.hstack([np.cos(angle), np.sin(angle)]) / np.sqrt(3)
        own = _product(circles, _rotation(6, seed, part, "own directions"))
        if synthetic.sharing:
            shared = _rotation(6, seed, part, "shared directions")
            pan, group = synthetic.pan_weight, synthetic.group_weight
            common = pan * shared[0] + group * _product(member, shared[1:])
            own = _unit(common + np.sqrt(1 - pan**2 - group**2) * own)
        directions.append(own)
    return np.array(directions)


def _lay_out(stream: Stream, n_patches: np.ndarray, fraction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of all slides' patches: coords (N, 2) in pixels, column by column, and whether they are tumour (N,).

    Tissue grows cell by cell from the middle of a grid, preferring the inside of an ellipse; the tumour grows from
    one of its cells. So both are connected over edges.
    """
    n, rng = len(n_patches), _rng(*stream, "layout")
    n_tumour = np.clip(np.round(fraction * n_patches), 1, n_patches - 1).astype(int)
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


def _grow(start: int, n: int, cost: list[float], allowed: range | set[int]) -> list[int]:
    """n connected cells of the grid, from `start` on always the cheapest allowed neighbour."""
    region: list[int] = []
    waiting, reached = [(cost[start], start)], {start}
    while len(region) < n:
        _, cell = heapq.heappop(waiting)
        region.append(cell)
        for neighbour in (cell - GRID, cell + GRID, cell - 1, cell + 1):
            around_the_edge = abs(neighbour % GRID - cell % GRID) > 1
            if neighbour in allowed and neighbour not in reached and not around_the_edge:
                reached.add(neighbour)
                heapq.heappush(waiting, (cost[neighbour], neighbour))
    return region


def _stream(study: Study, dataset: str, external: bool) -> Stream:
    return (_synthetic(study).seed, dataset, "external" if external else "cohort")


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


def _synthetic(study: Study) -> Synthetic:
    if study.synthetic is None:
        raise Refused(f"study {study.name} is not synthetic, so no cohort is made: its manifest has no `synthetic`.")
    return study.synthetic


def _sizes(study: Study, dataset: str) -> tuple[int, dict[str, Any]]:
    """Patients of the cohort, and the manifest's `SIZES`. Raises `Refused` where no cohort can be made from them."""
    sizes, scale = study.entry(dataset).model_dump(include=set(SIZES)), _synthetic(study).scale
    refuse_unknown("cancer", [dataset], MEMBERSHIPS, "the synthetic cohort")
    if missing := [name for name in SIZES if sizes[name] is None]:
        raise Refused(f"data set {dataset}: a synthetic cohort needs {', '.join(missing)}; give them in the manifest.")
    patients, slides = sizes["patients"], sizes["slides"]
    if not patients <= slides <= 4 * patients:
        raise Refused(f"data set {dataset}: {slides} slides of {patients} patients; 1 to 4 a patient can be made.")
    n = round(scale * patients)
    if n < 10:
        raise Refused(f"{dataset}: synthetic.scale {scale} of {patients} patients leaves {n}; at least 10 are needed.")
    return n, sizes
