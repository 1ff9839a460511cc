"""Iso-C and Iso-CTS (Marczak et al., ICML 2025) of a pair of task vectors: merges whose singular values are all equal.

Matrices are merged so; parameters of any other shape (biases, tokens) by their mean, as in the release.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from steph import Refused
from steph.merging.task_vectors import State, check_same_network


def iso_c(tau_target: State, tau_source: State) -> dict[str, Tensor]:
    """The pair's sum with every singular value of a matrix replaced by the matrix' mean singular value.

    A matrix of one row has one singular value: it becomes the plain sum. Where the sum lacks full rank, the directions
    that it lacks are any orthonormal ones (LAPACK's), and get the mean value too.
    """
    return _merged(tau_target, tau_source, lambda target, source: _flat_spectrum(target + source))


def iso_cts(tau_target: State, tau_source: State, common_fraction: float = 0.8) -> dict[str, Tensor]:
    """Like `iso_c`, with room left for what is specific to each of the two.

    About `common_fraction` of a matrix' directions are the sum's largest; the others are shared out evenly between the
    largest directions of each task vector outside that common space. This is the published algorithm on two task
    vectors; STEPH's release writes every pair's result over one source, and its paper has no such row.
    Raises `Refused` for a fraction outside [0, 1].
    """
    if not 0 <= common_fraction <= 1:
        raise Refused(f"common_fraction = {common_fraction}: a share of directions; expected 0 to 1.")
    return _merged(tau_target, tau_source, lambda *matrices: _common_and_specific([*matrices], common_fraction))


def specific_directions(rank: int, common_fraction: float, tasks: int = 2) -> int:
    """Directions that each task gets for itself of a matrix' `rank` (its smaller side); the rest are common."""
    return round((rank - int(rank * common_fraction)) / tasks)


def _merged(tau_target: State, tau_source: State, merge: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Two task vectors with their matrices merged, all else averaged."""
    check_same_network(tau_target, tau_source)
    pairs = {name: (value, tau_source[name]) for name, value in tau_target.items()}
    return {name: merge(*pair) if pair[0].ndim == 2 else (pair[0] + pair[1]) / 2 for name, pair in pairs.items()}


def _flat_spectrum(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return s.mean() * (u @ vh)


def _common_and_specific(matrices: list[Tensor], common_fraction: float) -> Tensor:
    total = sum(matrices[1:], matrices[0])
    rank = min(total.shape)
    k = specific_directions(rank, common_fraction, len(matrices))
    if k == 0:
        return _flat_spectrum(total)
    u, s, vh = (part[..., : rank - k * len(matrices)] for part in _svd(total))
    parts = [tuple(part[..., :k] for part in _svd(matrix - u @ (u.T @ matrix))) for matrix in matrices]
    left, values, right = (torch.cat(columns, -1) for columns in zip(*parts, (u, s, vh), strict=True))
    return values.mean() * (_orthonormal(left) @ _orthonormal(right).T)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (r, n), values (n,), right vectors (c, n), a column each."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.T


def _orthonormal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns."""
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    return u @ vh
