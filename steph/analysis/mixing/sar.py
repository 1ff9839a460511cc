"""Subspace alignment ratio, SAR (Eq. 2, Appendix A): how much of one task vector lies in another's dominant subspace.

The paper follows it over mixtures ``tau_mix = lambda tau_t + (1 - lambda) tau_s``, for the embedding and the attention
layer (Figs. 5, 7). A number of SAR means little by itself: any R directions out of r hold a share of about sqrt(R / r)
of any matrix, and a mixture holds its own part lambda tau_t whatever the source is. So curves come with two baselines,
in which the source has nothing in common with the target:

- ``rotated``: the source's own matrix, its left singular vectors turned by a random orthogonal matrix. Norm and
  spectrum, and with them the rank that a rule gives the source, stay.
- ``noise``: Gaussian noise of the source's norm (`steph.merging.random_sources`). Its spectrum is flat, as no trained
  source's is, so a rule takes more directions of it: the rank is higher, and SAR with it.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from steph import Refused
from steph.analysis.mixing import pairs
from steph.analysis.mixing.dynamics import rank_correlation
from steph.data.manifest import Study, refuse_unknown
from steph.data.synthetic import planted_similarity
from steph.files.records import fingerprint
from steph.merging.random_sources import random_sources
from steph.merging.task_vectors import task_vector
from steph.study.cache import cached_table
from steph.study.runs import TARGET, Run, Workbench
from steph.training.device import single_thread

ALPHA = 0.95
RANK_RULES = ("released", "paper")
LAMBDAS = tuple(round(0.04 * i, 2) for i in range(26))
"""0, 0.04, ..., 1: the step of the paper's landscapes."""
EMBEDDING, ATTENTION = "embedding", "attention"
LAYERS = {
    EMBEDDING: ("embed.weight",),
    ATTENTION: ("gate_tanh.weight", "gate_sigmoid.weight"),
    "attention, tanh": ("gate_tanh.weight",),
    "attention, sigmoid": ("gate_sigmoid.weight",),
}
"""The matrices of ABMIL's layers. The gated attention has two, and the paper does not say which its f_attn is. Here
they stand side by side, (dim_attn, 2 dim_emb): row k of both belongs to attention unit k, the product of their outputs,
so they share the space of left singular vectors. Each alone is there too."""


def subspace_alignment_ratio(
    tau_target: Tensor, tau_new: Tensor, alpha: float = ALPHA, rank_rule: str = "released"
) -> float:
    """SAR (Eq. 2): norm of what the R dominant left singular vectors of `tau_new` keep of `tau_target`, over its norm.

    tau_target, tau_new: (r, c), taken in double precision. alpha, rank_rule: R, see `dominant_rank`. Returns 0 to 1.

    With R = r, as with one row, it is 1 whatever the matrices are. Where singular values are equal and R cuts through
    them (the result of Iso-C, under the released rule), which directions are dominant is the SVD routine's choice.
    Raises `Refused` for other shapes, numbers that are not finite, and a matrix of zeros, which has no directions.
    """
    target, new = _checked(tau_target, tau_new)
    left, values = left_singular(new)
    return kept_share(target, left, dominant_rank(values, alpha, rank_rule))


def dominant_rank(singular_values: Tensor, alpha: float = ALPHA, rank_rule: str = "released") -> int:
    """R, the number of dominant directions of a matrix with these singular values, 1 to n.

    singular_values: (n,), falling. alpha: 0 < alpha <= 1. rank_rule:

    - "released" (the authors' code): the first R whose norm sqrt(sigma_1^2 + ... + sigma_R^2) exceeds alpha of the
      whole norm: 90 % of the energy at alpha = 0.95. Where none does (alpha = 1, nothing but zeros), 1.
    - "paper" (Eq. 4, second line): the first R whose left-out energy is at most (1 - alpha)^2 of the whole: 99.75 % are
      kept at alpha = 0.95, so R is never smaller than the released one. alpha = 1 asks for every value above 0.

    At exact equality rounding decides. Raises `Refused` for another alpha or rule.
    """
    if not 0 < alpha <= 1:
        raise Refused(f"alpha = {alpha}: the share that a matrix's dominant directions keep; expected 0 < alpha <= 1.")
    refuse_unknown("rank rule", [rank_rule], RANK_RULES, "subspace alignment")
    values = torch.as_tensor(singular_values, dtype=torch.float64)
    energy = (values / values[0]) ** 2 if values[0] > 0 else values
    if rank_rule == "released":
        enough = (energy.cumsum(0) / energy.sum()).sqrt() > alpha
    else:
        summed = energy.flip(0).cumsum(0).flip(0)  # from the smallest, so that no digit is lost
        left_out = torch.cat([summed[1:], summed.new_zeros(1)])
        enough = left_out <= (1 - alpha) ** 2 * energy.sum()
    return int(enough.to(torch.int8).argmax()) + 1


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (r, n), a column each, and the n = min(r, c) singular values of a matrix (r, c), falling.

    A wide matrix is first reduced to its triangular factor, which has the same: 2.4 times as fast at 512 x 1536, and to
    the last digits the same, which the eigenvectors of ``matrix @ matrix.T`` are not.
    """
    if matrix.shape[1] > matrix.shape[0]:
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left, values


def kept_share(target: Tensor, left: Tensor, rank: int) -> float:
    """Norm of a matrix (r, c) projected onto the first `rank` columns of `left` (r, n), over its norm."""
    kept = torch.linalg.vector_norm(left[:, :rank].T @ target)
    return float((kept / torch.linalg.vector_norm(target)).clamp(max=1))


def _checked(tau_target: Tensor, tau_new: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices in double precision. Raises `Refused` where they have no alignment."""
    if tau_target.shape != tau_new.shape or tau_new.ndim != 2:
        raise Refused(
            f"tau_target is {tuple(tau_target.shape)}, tau_new {tuple(tau_new.shape)}: SAR compares one layer's matrix "
            "(r, c) in two task vectors, so both must have one shape."
        )
    for name, matrix in (("tau_target", tau_target), ("tau_new", tau_new)):
        if not torch.isfinite(matrix).all():
            raise Refused(f"{name} has {int((~torch.isfinite(matrix)).sum())} numbers that are not finite.")
        if not matrix.any():
            raise Refused(f"{name} is zero everywhere: it has no directions. Was the model trained?")
    return tau_target.detach().double(), tau_new.detach().double()


def mixture_curve(tau_target: Tensor, tau_source: Tensor, lambdas: Sequence[float] = LAMBDAS) -> pd.DataFrame:
    """SAR of tau_t with lambda tau_t + (1 - lambda) tau_s: lambda, rule, sar, rank, rows (r; R directions of r hold a
    share of about sqrt(R / r) of anything). Matrices (r, c) as in `subspace_alignment_ratio`."""
    target, source = _checked(tau_target, tau_source)
    rows = []
    for share in lambdas:
        left, values = left_singular(share * target + (1 - share) * source)
        for rule in RANK_RULES:
            rank = dominant_rank(values, rank_rule=rule)
            rows.append((share, rule, kept_share(target, left, rank), rank, len(target)))
    return pd.DataFrame(rows, columns=["lambda", "rule", "sar", "rank", "rows"])


def layer_matrix(tau: Mapping[str, Tensor], layer: str) -> Tensor:
    """The matrix (r, c) of one of `LAYERS` in a task vector of ABMIL, in double precision."""
    return torch.cat([tau[name].double() for name in LAYERS[layer]], dim=1)


def turned(matrix: Tensor, key: str) -> Tensor:
    """A matrix (r, c) with its left singular vectors turned by a random orthogonal matrix, drawn on the CPU from `key`
    (hexadecimal); the spectrum stays."""
    generator = torch.Generator().manual_seed(int(key, 16))
    drawn = torch.randn(len(matrix), len(matrix), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal().sign()).to(matrix) @ matrix  # signs: uniform over all orthogonal matrices


def curves(
    bench: Workbench, models: Mapping[str, Run], seed: int, lambdas: Sequence[float] = LAMBDAS, draws: int = 3
) -> pd.DataFrame:
    """`mixture_curve` of a target with each source, for every one of `LAYERS`, with baselines. Computed once.

    models: finished runs (`steph.analysis.mixing.pairs.models`). seed: of the baselines, of which there are `draws`
    each. Returns target, source, layer, kind ("source", "rotated", "noise"), draw (0 where kind is "source"), and the
    columns of `mixture_curve`.
    """

    def compute() -> pd.DataFrame:
        null, device, parts = bench.null_state("abmil"), bench.compute.device, []
        states = {role: bench.state(run) for role, run in models.items()}
        tau_target = task_vector(states.pop(TARGET), null)
        with single_thread():
            for name, state in states.items():
                tau = task_vector(state, null)
                seeds = [int(fingerprint([seed, draw], 8), 16) for draw in range(draws)]
                noises = [task_vector(random_sources(null, {name: state}, drawn)[name], null) for drawn in seeds]
                for layer in LAYERS:
                    target, own = layer_matrix(tau_target, layer), layer_matrix(tau, layer)
                    sources = {("source", 0): own}
                    for draw, noise in enumerate(noises):
                        sources["rotated", draw] = turned(own, fingerprint([seed, draw, name, layer]))
                        sources["noise", draw] = layer_matrix(noise, layer)
                    for (kind, draw), source in sources.items():
                        curve = mixture_curve(target.to(device), source.to(device), lambdas)
                        parts.append(curve.assign(source=name, layer=layer, kind=kind, draw=draw))
        return pd.concat(parts, ignore_index=True).assign(target=models[TARGET].dataset)

    keys = {role: bench.key(run) for role, run in models.items()}
    return cached_table(bench, "sar", {"runs": keys, "seed": seed, "lambdas": list(lambdas), "draws": draws}, compute)


def spectra(bench: Workbench, models: Mapping[str, Run]) -> pd.DataFrame:
    """Singular values of the models' task vectors: model (target or source), layer, direction (1, 2, ...), value, kept
    (norm of this many directions over the whole norm), rows (r). Computed once."""
    runs = {run.dataset: run for run in models.values()}

    def compute() -> pd.DataFrame:
        null, parts = bench.null_state("abmil"), []
        with single_thread():
            for (name, run), layer in product(runs.items(), LAYERS):
                matrix = layer_matrix(task_vector(bench.state(run), null), layer)
                values = left_singular(matrix.to(bench.compute.device))[1].cpu()
                kept = (values.square().cumsum(0) / values.square().sum()).sqrt()
                part = pd.DataFrame({"direction": range(1, len(values) + 1), "value": values, "kept": kept})
                parts.append(part.assign(model=name, layer=layer, rows=len(matrix)))
        return pd.concat(parts, ignore_index=True)

    return cached_table(bench, "sar_spectra", {name: bench.key(run) for name, run in runs.items()}, compute)


def ranks(spectrum: pd.DataFrame) -> pd.DataFrame:
    """R of each model's layers by both rules (columns), from `spectra`: index layer, model; and rows (r)."""
    rows = []
    for (layer, model), part in spectrum.groupby(["layer", "model"], sort=False):
        values = torch.from_numpy(part["value"].to_numpy())
        by_rule = {rule: dominant_rank(values, rank_rule=rule) for rule in RANK_RULES}
        rows.append({"layer": layer, "model": model, **by_rule, "rows": part["rows"].iloc[0]})
    return pd.DataFrame(rows).set_index(["layer", "model"])


def reading(table: pd.DataFrame) -> pd.DataFrame:
    """Curves in numbers, a row per target, source, layer and rule.

    at: SAR at the lambda nearest to 0.5; zero: at lambda 0, tau_t in the source's own directions. rotated,
    rotated_zero, noise: means of the baselines' draws at the middle, at 0, at the middle. gain, gain_zero: SAR less
    that of the rotated source. rank, rows: R and r at the middle.
    """
    lambdas = table["lambda"].unique()
    middle = lambdas[np.abs(lambdas - 0.5).argmin()]
    names = ["target", "source", "layer", "rule"]
    sar = table.pivot_table("sar", names, ["kind", "lambda"], sort=False)  # the mean over draws
    at, zero = sar.xs(middle, axis=1, level="lambda"), sar.xs(0.0, axis=1, level="lambda")
    own = table[(table["kind"] == "source") & (table["lambda"] == middle)].set_index(names)
    columns = {
        "at": at["source"], "zero": zero["source"],
        "rotated": at["rotated"], "rotated_zero": zero["rotated"], "noise": at["noise"],
        "gain": at["source"] - at["rotated"], "gain_zero": zero["source"] - zero["rotated"],
        "rank": own["rank"], "rows": own["rows"],
    }  # fmt: skip
    return pd.DataFrame(columns, index=sar.index).reset_index()


def attention_against_embedding(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's claim (4.2.2: the attention layer keeps a close alignment, the embedding does not) over pairs.

    table: of `reading`. Returns a row per rule and quantity ("at", "zero", "rotated", "rotated_zero", "gain",
    "gain_zero", as there): attention and embedding (means over pairs), wins (pairs in which the attention layer has
    more), pairs. Where "rotated" differs between layers as "at" does, the difference is not the cancers' doing.
    """
    rows = []
    for rule, part in table.groupby("rule", sort=False):
        for name in ("at", "zero", "rotated", "rotated_zero", "gain", "gain_zero"):
            wide = part.pivot(index=["target", "source"], columns="layer", values=name)
            attention, embedding = wide[ATTENTION], wide[EMBEDDING]
            row = {"rule": rule, "quantity": name, "attention": attention.mean(), "embedding": embedding.mean()}
            rows.append({**row, "wins": int((attention > embedding).sum()), "pairs": len(wide)})
    return pd.DataFrame(rows)


def finished_models(bench: Workbench, fold: int) -> list[dict[str, Run]]:
    """The models of each target with all of its sources, as `steph.analysis.mixing.pairs.models` gives them, of those
    targets where all are finished."""
    study = bench.study
    by_target = [pairs.models(bench, name, study.sources_of(name), fold) for name in study.datasets]
    return [models for models in by_target if all(bench.record(run) is not None for run in models.values())]


def every_pair(bench: Workbench, by_target: Sequence[Mapping[str, Run]], seed: int) -> pd.DataFrame:
    """`reading` of all pairs of some targets' models, with one draw of each baseline. Computed once."""
    tables = [curves(bench, models, seed, (0.0, 0.5, 1.0), draws=1) for models in by_target]
    return reading(pd.concat(tables, ignore_index=True))


def against_planted(table: pd.DataFrame, study: Study) -> pd.DataFrame | None:
    """Rank correlation (Spearman) over pairs of what curves say with what the two cancers were made to share, a row per
    layer and rule: at and zero, as in `reading`; pairs. None in a study of real patients."""
    if study.synthetic is None:
        return None
    similarity, rows = planted_similarity(study), []
    for (layer, rule), part in table.groupby(["layer", "rule"], sort=False):
        shared = pd.Series([similarity.loc[*pair] for pair in zip(part["target"], part["source"], strict=True)])
        correlations = {name: rank_correlation(part[name], shared) for name in ("at", "zero")}
        rows.append({"layer": layer, "rule": rule, **correlations, "pairs": len(part)})
    return pd.DataFrame(rows)


def take_away(compared: pd.DataFrame, rule: str) -> list[str]:
    """The claim of 4.2.2 under a rank rule in words, from `attention_against_embedding`: two list items."""
    of = compared[compared["rule"] == rule].set_index("quantity")
    at, rotated, zero, gain = of.loc["at"], of.loc["rotated"], of.loc["gain_zero"], of.loc["gain"]
    difference = at["attention"] - at["embedding"]
    by_chance = rotated["attention"] - rotated["embedding"]
    return [
        f"- Rank rule {rule}, {at['pairs']} pair(s): at λ = 0.5 SAR is {at['attention']:.3f} in the attention layer, "
        f"{at['embedding']:.3f} in the embedding, larger in the attention for {at['wins']}. With sources rotated at "
        f"random it is {rotated['attention']:.3f} and {rotated['embedding']:.3f}: the layers differ by "
        f"{difference:+.3f}, and by {by_chance:+.3f} where nothing is shared.",
        f"- What a source adds to its rotated self: {gain['attention']:+.3f} (attention) and {gain['embedding']:+.3f} "
        f"(embedding) at λ = 0.5; at λ = 0, where the target's own part does not cover it, {zero['attention']:+.3f} "
        f"and {zero['embedding']:+.3f}.",
    ]
