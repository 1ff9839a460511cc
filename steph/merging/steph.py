"""STEPH: sparse task vector mixup with hypernetworks (section 4 of the paper).

For a bag X, hypernetworks give a weight w_i >= 0 and a mixing coefficient lambda_i for each source cancer i. The K
sources of largest w are kept and the model for this very bag is

    M* = M_0 + sum_j w_j [lambda_j tau_t + (1 - lambda_j) tau_sj]        (Eq. 3-5)

so every bag is encoded under coefficients of tau_t and of the tau_s alone: ``sum_j w_j lambda_j`` and
``w_j (1 - lambda_j)``. Where the paper and the authors' release differ, the default is the release, which made the
paper's numbers, and an option gives the paper's reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch, as_batch, sample_each
from steph.merging.merged_encoder import Merged, MergedEncoder
from steph.merging.task_vectors import Layout, State, task_vector
from steph.mil.abmil import ABMIL
from steph.mil.mean_mil import mean_of_embedded

RELEASED_NAMES = {
    "regulate_layer_emb.0": "hyper.embed",
    "regulate_layer_prj.0": "hyper.weight_head.0",
    "regulate_layer_prj.3": "hyper.weight_head.3",
    "vecmix_layer.0": "hyper.mix_head.0",
    "vecmix_layer.3": "hyper.mix_head.3",
    "pred_head": "head",
}
"""Layers of the release's STEPH, and ours."""


class STEPH(nn.Module):
    """A target cancer's model, merged anew for each bag from its own and other cancers' models.

    null_state, target_state, source_states: parameters of M_0, M_t and the M_s by name, all of one network.
    top_k: how many mixtures are kept (K); None keeps all. mix: how lambda is found: "hypernetwork" (per bag),
    "parameter" (one trained vector) or a constant. weight: how w is found: "hypernetwork" or "parameter".
    dim_hidden: width of the hypernetworks. beta, gamma: weights of the auxiliary losses (Eq. 7).
    network: the network whose states these are; None takes ABMIL and reads its dimensions off the states.
    sample_patches: the hypernetworks read at most so many patches of a bag, drawn by `sample_seed` (see
    `steph.data.bags.sample_each`); the merged encoder still reads all. None, the paper's, lets them read all.

    Options for what the paper says otherwise than the release (numbers of the book's list of differences):
    hyper_head "linear" (D1: one layer in place of two); balance_term False (D2: Eq. 7 alone); fresh_head False (D3: the
    target's head, frozen, in place of a new one that is trained); bounded_lambda (D4: keeps a trained lambda vector in
    (0, 1]); clamp_weights (D10: w stays in [0, 1], as in the original AdaMerging); merge_head (D5: the head is merged
    like the encoder); base "target" (D12: mixtures are added to M_t).

    Raises `Refused` for states of different networks, models with another M_0, an empty pool, K outside 1..m.
    """

    def __init__(
        self,
        null_state: State,
        target_state: State,
        source_states: Mapping[str, State],
        top_k: int | None = 5,
        mix: Literal["hypernetwork", "parameter"] | float = "hypernetwork",
        weight: Literal["hypernetwork", "parameter"] = "hypernetwork",
        dim_hidden: int = 512,
        dropout: float = 0.25,
        beta: float = 0.05,
        gamma: float = 0.005,
        network: nn.Module | None = None,
        sample_patches: int | None = None,
        sample_seed: int = 0,
        hyper_head: Literal["mlp", "linear"] = "mlp",
        balance_term: bool = True,
        fresh_head: bool = True,
        bounded_lambda: bool = False,
        clamp_weights: bool = False,
        merge_head: bool = False,
        base: Literal["null", "target"] = "null",
    ) -> None:
        super().__init__()
        m = len(source_states)
        _check_options(m, top_k, mix, weight)
        if sample_patches is not None and sample_patches < 1:
            raise Refused(f"sample_patches = {sample_patches}; expected at least 1 patch per bag, or None for all.")
        self.sample_patches, self.sample_seed = sample_patches, sample_seed
        self.source_names = list(source_states)
        self.top_k, self.mix, self.weight = top_k, mix, weight
        self.bounded_lambda, self.clamp_weights = bounded_lambda, clamp_weights
        self.beta, self.gamma, self.balance_term = beta, gamma, balance_term

        network = network or _abmil_of(null_state, dropout)
        vectors = [task_vector(state, null_state) for state in (target_state, *source_states.values())]
        start = null_state if base == "null" else target_state
        self.encoder = MergedEncoder(network, start, vectors)
        self.head = _head(network, None if fresh_head else target_state)
        self.merged_head = MergedHead(start, vectors) if merge_head else None
        if merge_head:
            self.head.requires_grad_(False)
        self.hyper = Hypernetwork(
            _dim_in(network), dim_hidden, m, weight == "hypernetwork", mix == "hypernetwork", dropout, hyper_head
        )
        self.weight_vector = nn.Parameter(torch.full((m,), 1 / m)) if weight == "parameter" else None
        self.ratio_vector = nn.Parameter(torch.zeros(m)) if mix == "parameter" else None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Logits of the hazards (B, T) of B bags of patches (N_i, D), each bag under its own merged model."""
        coefficients, features = self._merge_and_encode(as_batch(bags))
        if self.merged_head is None:
            return self.head(features)
        return self.merged_head(coefficients.expand(len(features), -1), features)

    def encode(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features (B, H), each bag's under its own merged encoder."""
        return self._merge_and_encode(as_batch(bags))[1]

    def _merge_and_encode(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        w, lam, selected = self._last = self.batch_coefficients(batch)
        rows = len(batch) if self.hyper.embed is not None else 1  # without hypernetworks all bags have the same
        coefficients = mixture_coefficients(w[:rows], lam[:rows], selected[:rows])
        return coefficients, self.encoder(coefficients, batch)

    def batch_coefficients(self, bags: Sequence[Tensor] | RaggedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """w (B, m), lambda (B, m) and the kept sources (B, K), by falling w, of B bags."""
        batch = as_batch(bags)
        read = batch if self.sample_patches is None else sample_each(batch, self.sample_patches, self.sample_seed)
        w_logits, z = self.hyper(read)
        n = len(batch)
        w = F.relu(w_logits) if w_logits is not None else self.weight_vector.expand(n, -1)  # type: ignore[union-attr]
        if self.clamp_weights:
            w = w.clamp(0, 1)
        if z is not None:
            lam = 1 / (1 + F.relu(z))
        elif self.ratio_vector is not None:
            ratio = F.relu(self.ratio_vector) if self.bounded_lambda else self.ratio_vector
            lam = (1 / (1 + ratio)).expand(n, -1)
        else:
            lam = torch.full_like(w, float(self.mix))
        # A stable order gives ties (often several w are 0) to the first source, on every device.
        selected = w.argsort(dim=1, descending=True, stable=True)[:, : self.top_k or w.shape[1]]
        return w, lam, selected

    def coefficients(self, bag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w (m,), lambda (m,) and the kept sources (K,) of one bag (N, D); in the order of `source_names`."""
        w, lam, selected = self.batch_coefficients([bag])
        return w[0], lam[0], selected[0]

    def merged_state(self, bag: Tensor) -> dict[str, Tensor]:
        """The parameters of the network that this bag (N, D) is seen through."""
        coefficients = mixture_coefficients(*self.batch_coefficients([bag]))[0]
        if self.merged_head is None:
            head: dict[str, Tensor] = {f"head.{k}": v for k, v in self.head.named_parameters()}
        else:
            head = self.merged_head.state(coefficients)
        return {**self.encoder.state(coefficients), **head}

    def auxiliary_loss(
        self, beta: float | None = None, gamma: float | None = None, balance_term: bool | None = None
    ) -> Tensor:
        """beta L_mix + gamma L_agg (Eq. 7) of the last forward pass, the mean over its bags.

        With the balance term (the release), the mean of the kept w is added to L_agg; it exists only with a K.
        """
        if self._last is None:
            raise Refused("auxiliary_loss() needs a forward pass first.")
        w, lam, selected = self._last
        beta, gamma = self.beta if beta is None else beta, self.gamma if gamma is None else gamma
        if not beta and not gamma:
            return w.new_zeros(())
        kept, k = _kept(w, selected), selected.shape[1]
        loss = (lam * kept).square().sum() * (beta / k) + torch.logsumexp(w, dim=1).square().sum() * gamma
        if (self.balance_term if balance_term is None else balance_term) and self.top_k is not None:
            loss = loss + (w * kept).sum() * (gamma / k)
        return loss / len(w)

    @property
    def monitored(self) -> list[str]:
        """What `monitor` gives, by name: `w_NAME` and `lambda_NAME` of each source."""
        return [f"{what}_{name}" for what in ("w", "lambda") for name in self.source_names]

    def monitor(self) -> Tensor:
        """Mean w and lambda of each source over the bags of the last forward pass, (2 m,), see `monitored`."""
        if self._last is None:
            raise Refused("monitor() needs a forward pass first.")
        return torch.cat([x.detach().mean(0) for x in self._last[:2]])


class Hypernetwork(nn.Module):
    """H_agg and H_mix: one shared patch embedding (linear, ReLU, mean over patches) with a head for each."""

    def __init__(
        self, dim_in: int, dim_hidden: int, m: int, weights: bool, ratios: bool, dropout: float, head: str
    ) -> None:
        super().__init__()

        def new_head() -> nn.Module:
            if head == "linear":
                return nn.Linear(dim_hidden, m)
            hidden = nn.Linear(dim_hidden, dim_hidden)
            return nn.Sequential(hidden, nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim_hidden, m))

        self.embed = nn.Linear(dim_in, dim_hidden) if weights or ratios else None
        self.weight_head = new_head() if weights else None
        self.mix_head = new_head() if ratios else None

    def forward(self, batch: RaggedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Logits of w (B, m) and z (B, m), lambda = 1 / (1 + ReLU(z)); None where no hypernetwork gives them."""
        if self.embed is None:
            return None, None
        mean = mean_of_embedded(batch, self.embed)
        return (
            None if self.weight_head is None else self.weight_head(mean),
            None if self.mix_head is None else self.mix_head(mean),
        )


class MergedHead(Merged):
    """The prediction head under merged weights, like `MergedEncoder` (the paper's reading of Eq. 5)."""

    def __init__(self, base: State, vectors: Sequence[State]) -> None:
        super().__init__(Layout({k: tuple(v.shape) for k, v in base.items() if k.startswith("head.")}), base, vectors)

    def forward(self, coefficients: Tensor, features: Tensor) -> Tensor:
        weights = self.weights(coefficients)
        return torch.baddbmm(
            weights["head.bias"].unsqueeze(2), weights["head.weight"], features.unsqueeze(2)
        ).squeeze(2)  # fmt: skip


def mixture_coefficients(w: Tensor, lam: Tensor, selected: Tensor) -> Tensor:
    """Coefficients (B, 1 + m) of tau_t and of each tau_s in sum_j w_j [lambda_j tau_t + (1 - lambda_j) tau_sj]."""
    kept = w * _kept(w, selected)
    of_target = kept * lam
    return torch.cat([of_target.sum(1, keepdim=True), kept - of_target], dim=1)


def _kept(w: Tensor, selected: Tensor) -> Tensor:
    """(B, m): 1 where a source is kept, 0 elsewhere."""
    return torch.zeros_like(w, requires_grad=False).scatter_(1, selected, 1.0)


def convert_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trainable parameters of the release's STEPH under our names."""
    return {f"{RELEASED_NAMES[layer]}.{kind}": v for k, v in state.items() for layer, _, kind in [k.rpartition(".")]}


def _check_options(m: int, top_k: int | None, mix: object, weight: str) -> None:
    if m == 0:
        raise Refused("STEPH needs at least one source model; the pool is empty.")
    if top_k is not None and not 1 <= top_k <= m:
        raise Refused(f"top_k = {top_k} of a pool of {m} source models; choose 1 to {m}, or None to keep all.")
    if mix not in ("hypernetwork", "parameter") and not (isinstance(mix, float | int) and 0 <= mix <= 1):
        raise Refused(f"mix = {mix!r}; expected 'hypernetwork', 'parameter' or a constant lambda from 0 to 1.")
    if weight not in ("hypernetwork", "parameter"):
        raise Refused(f"weight = {weight!r}; expected 'hypernetwork' or 'parameter'.")


def _abmil_of(state: State, dropout: float) -> ABMIL:
    """An ABMIL of the dimensions of a state. Raises `Refused` for the state of another network."""
    expected = ABMIL(1, 1, 1, 1).state_dict()
    if set(state) != set(expected):
        raise Refused(f"the states are not ABMIL's (parameters {sorted(state)[:3]}...): give their `network`.")
    dim_emb, dim_in = state["embed.weight"].shape
    n_attn, n_bins = len(state["gate_tanh.weight"]), len(state["head.weight"])
    return ABMIL(dim_in, dim_emb, n_attn, n_bins, dropout).to(state["embed.weight"].dtype)


def _head(network: nn.Module, target_state: State | None) -> nn.Linear:
    """A new prediction head like the network's, or the target's, frozen."""
    old = network.head
    assert isinstance(old, nn.Linear)
    head = nn.Linear(old.in_features, old.out_features).to(old.weight.dtype)
    if target_state is not None:
        head.load_state_dict({"weight": target_state["head.weight"], "bias": target_state["head.bias"]})
        head.requires_grad_(False)
    return head


def _dim_in(network: nn.Module) -> int:
    first = next(module for module in network.modules() if isinstance(module, nn.Linear))
    return first.in_features
