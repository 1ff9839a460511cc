"""STEPH without training: w and lambda in closed form, the same for every patient, under the target's own head.

The paper leaves this open (its third limitation). Three ways are tried here. Each gives weights w (m,), 0 but for K
sources, and ratios lambda (m,), for the merged encoder M_0 + sum_j w_j [lambda_j tau_t + (1 - lambda_j) tau_sj].
Where nothing speaks for any source, all of them give M_t back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steph.data.bags import RaggedBatch
from steph.merging.merged_encoder import MergedEncoder
from steph.merging.task_vectors import Layout, State, apply_task_vector, encoder_part, task_vector
from steph.survival import nll_loss

Mixture = tuple[Tensor, Tensor]
"""w (m,) and lambda (m,)."""


def by_worth(target: float, worth: Tensor, top_k: int | None) -> Mixture:
    """The mixture in which the target counts `target` and source j counts worth_j >= 0, (m,):

        w_j = worth_j / sum of the K largest,    lambda_j = target / (target + worth_j).

    The w sum to 1: the merged vector is a weighted mean, and keeps the length of the vectors that it is made of.
    """
    w, selected = _largest(worth, top_k)
    if w.sum() == 0:
        return w.index_fill(0, selected, 1 / len(selected)), torch.ones_like(worth)
    return w / w.sum(), torch.where(worth > 0, target / (target + worth), 1.0)


def _largest(values: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Values (m,) with all but the K largest set to 0, and where these stand, (K,)."""
    selected = values.argsort(descending=True, stable=True)[:top_k]
    return torch.zeros_like(values).index_copy(0, selected, values[selected]), selected


def by_cosine(null_state: State, target_state: State, source_states: Sequence[State], top_k: int | None) -> Mixture:
    """Data-free: a source is worth max(0, cos(tau_t, tau_sj)), the target 1.

    Training on few patients moves a model along what is to be learnt, and at random. What two cancers learnt alike
    shows as a positive cosine, while random parts are orthogonal in many dimensions. A source at a right angle gets
    w = 0; one that is the target's twin counts as much as the target.
    """
    layout = Layout.of(encoder_part(null_state))
    target, *sources = (layout.flatten(task_vector(s, null_state)).double() for s in (target_state, *source_states))
    cosines = torch.cosine_similarity(torch.stack(sources), target, dim=1)
    return by_worth(1.0, cosines.clamp(min=0), top_k)


def by_concordance(target: float, sources: Sequence[float], top_k: int | None) -> Mixture:
    """From the fold's training patients: a model is worth max(0, C - 1/2), by how far its C-index exceeds chance.

    target, sources: C-index on these patients of the target's model and of each source's, unchanged. The sources have
    never seen them; the target's model was trained on them, so its C-index is too good and lambda errs towards it.
    """
    worth = (torch.tensor([target, *sources], dtype=torch.float64) - 0.5).clamp(min=0)
    # A target that does no better than chance on its own training patients has learnt nothing; the sources stand alone.
    return by_worth(worth[0].item(), worth[1:], top_k)


def by_scores(scores: Tensor, top_k: int | None) -> Mixture:
    """From the fold's training patients: one scoring step from M_t, in the coefficients c of all task vectors.

    scores: (N, 1 + m) gradient of each patient's loss by the coefficients, the target's first, at c_0 = (1, 0, ..., 0)
    (`patient_scores`). Before the patients are looked at, c is taken to be normal about c_0 with variance 1: changes
    much beyond 1 are not believed, and where patients say nothing M_t stays. With S the matrix of scores, S^T S the
    empirical Fisher information (Berndt, Hall, Hall and Hausman, 1974), the step to the most probable c is

        c = c_0 - (S^T S + I)^-1 S^T 1.

    Negative coefficients become 0, the sources' K largest are selected, and c is written as a mixture: one lambda =
    c_t / (c_t + sum c_s) for all sources, and w_j = c_sj / (1 - lambda).
    """
    eye = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
    start = eye[0] - torch.linalg.solve(scores.T @ scores + eye, scores.sum(0))
    target = start[0].clamp(min=0)
    sources, selected = _largest(start[1:].clamp(min=0), top_k)
    if sources.sum() == 0:
        return sources.index_fill(0, selected, target.item() / len(selected)), torch.ones_like(sources)
    ratio = target / (target + sources.sum())
    return sources / (1 - ratio), ratio.expand(len(sources)).clone()


def patient_scores(
    encoder: MergedEncoder, head: nn.Module, batch: RaggedBatch, bins: Tensor, event: Tensor, alpha: float
) -> Tensor:
    """Gradient (B, 1 + m) of each patient's loss by the coefficients of its merged encoder, at the target's own model.

    encoder: on M_0, with the target's vector first. head: the target's own. No parameter is looked at or changed.
    """
    coefficients = encoder.stack.new_zeros(len(batch), encoder.n_vectors)
    coefficients[:, 0] = 1
    coefficients.requires_grad_(True)
    hazards = torch.sigmoid(head(encoder(coefficients, batch)))
    loss = nll_loss(hazards, bins, event, alpha=alpha, reduction="none")
    return torch.autograd.grad(loss.sum(), coefficients)[0]


def merged(
    null_state: State, target_state: State, source_states: Sequence[State], mixture: Mixture
) -> dict[str, Tensor]:
    """The network's parameters under a mixture; the head is the target's own."""
    w, lam = mixture
    of_target = (w * lam).sum().item()
    tau = {name: of_target * value for name, value in task_vector(target_state, null_state).items()}
    for share, state in zip((w * (1 - lam)).tolist(), source_states, strict=True):
        if share:
            tau = {name: tau[name] + share * value for name, value in task_vector(state, null_state).items()}
    return {**target_state, **apply_task_vector(encoder_part(null_state), encoder_part(tau))}
