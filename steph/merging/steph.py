"""STEPH: sparse task vector mixup with hypernetworks (section 4 of the paper).

For a bag X, hypernetworks give a weight w_i >= 0 and a mixing coefficient lambda_i for each source cancer i. The K
sources of largest w are selected and the model for this very bag is

    M* = M_0 + sum_j w_j [lambda_j tau_t + (1 - lambda_j) tau_sj]        (Eq. 3-5)

so every bag is encoded under coefficients of tau_t and of the tau_s alone: ``sum_j w_j lambda_j`` and
``w_j (1 - lambda_j)``. Where the paper and the authors' release differ, the default is the release, which made the
paper's numbers, and an option gives the paper's reading.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch, as_batch, sample_each
from steph.merging.merged_encoder import Merged, MergedEncoder
from steph.merging.task_vectors import Layout, State, task_vector
from steph.mil.abmil import ABMIL, renamed
from steph.mil.base import MIL, BagEncoder, Bags, ForwardPass, Model, one_bag
from steph.mil.mean_mil import mean_of_embedded
from steph.mil.state import load_into

RELEASED_NAMES = {
    "regulate_layer_emb.0": "hyper.embed",
    "regulate_layer_prj.0": "hyper.weight_head.0",
    "regulate_layer_prj.3": "hyper.weight_head.3",
    "vecmix_layer.0": "hyper.mix_head.0",
    "vecmix_layer.3": "hyper.mix_head.3",
    "pred_head": "head",
}
"""Layers of the release's STEPH and the same layers here."""


EXPORTED = (
    "top_k", "mix", "weight", "dim_hidden", "hyper_head", "bounded_lambda", "clamp_weights", "merge_head",
    "sample_patches", "sample_seed", "w_activation", "lambda_activation", "separate_encoders",
)  # fmt: skip
"""Options that a model folder must know: they decide which parameters there are, or what is predicted."""


Activation = Callable[[Tensor], Tensor]
W_ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "softplus": F.softplus, "sigmoid": torch.sigmoid}
LAMBDA_ACTIVATIONS: dict[str, Activation] = {"ratio": lambda z: 1 / (1 + F.relu(z)), "sigmoid": torch.sigmoid}
"""What makes w and lambda of the hypernetwork's output; by default as released."""


class Mixtures(NamedTuple):
    """What is merged for each of B bags: w (B, m) and lambda (B, m) of the sources, in the order of
    `STEPH.source_names`, and which of them are selected, (B, K), by falling w."""

    w: Tensor
    lam: Tensor
    selected: Tensor


class STEPH(BagEncoder):
    """A target cancer's model, merged anew for each bag from its own and other cancers' models.

    null_state, target_state, source_states: parameters of M_0, M_t and the M_s by name, all of one network.
    top_k: how many mixtures are selected (K); None: all. mix: what gives lambda: "hypernetwork" (per bag), "parameter"
    (one trained vector) or a constant. weight: what gives w: "hypernetwork" or "parameter".
    dim_hidden: width of the hypernetworks. beta, gamma: weights of the auxiliary losses (Eq. 7).
    network: the network whose states these are; None takes ABMIL and reads its dimensions off the states.
    sample_patches: the hypernetworks read at most so many patches of a bag, drawn by `sample_seed` (see
    `steph.data.bags.sample_each`); the merged encoder still reads all. None, the paper's, lets them read all.

    Options for what the paper says otherwise than the release (numbers of the book's list of differences):
    hyper_head "linear" (D1: one layer in place of two); balance_term False (D2: Eq. 7 alone); fresh_head False (D3: the
    target's head, frozen, in place of a new one that is trained); bounded_lambda (D4: keeps a trained lambda vector in
    (0, 1]); lambda_activation "sigmoid" (D4: lambda covers (0, 1) with a gradient everywhere, in place of "ratio",
    1 / (1 + ReLU)); clamp_weights (D10: w stays in [0, 1], as in the original AdaMerging); merge_head (D5: the head is
    merged like the encoder); base "target" (D12: mixtures are added to M_t).

    Options of the release that no number of the paper stands on: w_activation "softplus" or "sigmoid" in place of
    "relu"; separate_encoders (its `fnn`: lambda's hypernetwork has a patch embedding of its own).

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
        network: MIL | None = None,
        sample_patches: int | None = None,
        sample_seed: int = 0,
        hyper_head: Literal["mlp", "linear"] = "mlp",
        balance_term: bool = True,
        fresh_head: bool = True,
        bounded_lambda: bool = False,
        clamp_weights: bool = False,
        merge_head: bool = False,
        base: Literal["null", "target"] = "null",
        w_activation: Literal["relu", "softplus", "sigmoid"] = "relu",
        lambda_activation: Literal["ratio", "sigmoid"] = "ratio",
        separate_encoders: bool = False,
    ) -> None:
        super().__init__()
        m = len(source_states)
        if m == 0:
            raise Refused("STEPH needs at least one source model; the pool is empty.")
        if top_k is not None and not 1 <= top_k <= m:
            raise Refused(f"top_k = {top_k} of a pool of {m} source models; choose 1 to {m}, or None to keep all.")
        if mix not in ("hypernetwork", "parameter") and not (isinstance(mix, float | int) and 0 <= mix <= 1):
            raise Refused(f"mix = {mix!r}; expected 'hypernetwork', 'parameter' or a constant lambda from 0 to 1.")
        if weight not in ("hypernetwork", "parameter"):
            raise Refused(f"weight = {weight!r}; expected 'hypernetwork' or 'parameter'.")
        if w_activation not in W_ACTIVATIONS or lambda_activation not in LAMBDA_ACTIVATIONS:
            raise Refused(
                f"w_activation = {w_activation!r}, lambda_activation = {lambda_activation!r}; expected one of "
                f"{', '.join(W_ACTIVATIONS)}, and one of {', '.join(LAMBDA_ACTIVATIONS)}."
            )
        if sample_patches is not None and sample_patches < 1:
            raise Refused(f"sample_patches = {sample_patches}; expected at least 1 patch per bag, or None for all.")
        self.sample_patches, self.sample_seed = sample_patches, sample_seed
        self.source_names = list(source_states)
        self.top_k, self.mix, self.weight = top_k, mix, weight
        self.dim_hidden, self.hyper_head, self.merge_head = dim_hidden, hyper_head, merge_head
        self.bounded_lambda, self.clamp_weights = bounded_lambda, clamp_weights
        self.beta, self.gamma, self.balance_term = beta, gamma, balance_term
        self.w_activation, self.lambda_activation = w_activation, lambda_activation
        self.separate_encoders = separate_encoders

        network = network or _abmil_of(null_state, dropout)
        vectors = [task_vector(state, null_state) for state in (target_state, *source_states.values())]
        start = null_state if base == "null" else target_state
        self.encoder = MergedEncoder(network, start, vectors)
        self.head = _head(network, None if fresh_head else target_state)
        self.merged_head = None
        if merge_head:
            self.head.requires_grad_(False)
            merged = {name: value for name, value in start.items() if name.startswith("head.")}
            self.merged_head = Merged(Layout.of(merged), start, vectors)
        first = next(module for module in network.modules() if isinstance(module, nn.Linear))
        weights, ratios = weight == "hypernetwork", mix == "hypernetwork"
        form = hyper_head, separate_encoders
        self.hyper = Hypernetwork(first.in_features, dim_hidden, m, weights, ratios, dropout, *form)
        self.weight_vector = nn.Parameter(torch.full((m,), 1 / m)) if weight == "parameter" else None
        self.ratio_vector = nn.Parameter(torch.zeros(m)) if mix == "parameter" else None
        self.monitored = [f"{number}_{name}" for number in ("w", "lambda") for name in self.source_names]

    def forward_pass(self, bags: Bags | None, frozen: Tensor | None = None) -> ForwardPass:
        """Each bag goes through its own merged model. Monitored are the means of w and lambda over the bags, (2 m,)."""
        assert bags is not None
        batch = as_batch(bags)
        mixtures = self.batch_coefficients(batch)
        coefficients = self._coefficients(mixtures)
        features = self.encoder(coefficients, batch)
        if self.merged_head is None:
            logits = self.head(features)
        else:
            head = self.merged_head.weights(coefficients)  # one for each bag, or one for all
            logits = (head["head.weight"] @ features.unsqueeze(2)).squeeze(2) + head["head.bias"]
        monitored = torch.cat([mixtures.w.detach().mean(0), mixtures.lam.detach().mean(0)])
        return ForwardPass(logits, self.auxiliary_loss(mixtures), monitored)

    def encode(self, bags: Bags) -> Tensor:
        """Bag features (B, H), each bag's under its own merged encoder."""
        batch = as_batch(bags)
        return self.encoder(self._coefficients(self.batch_coefficients(batch)), batch)

    def _coefficients(self, mixtures: Mixtures) -> Tensor:
        """Coefficients of task vectors, a row for each bag, or one for all."""
        return mixture_coefficients(*(values[:1] if self.same_for_all_bags else values for values in mixtures))

    @property
    def same_for_all_bags(self) -> bool:
        """Whether all bags have the same weights, as there is no hypernetwork."""
        return self.hyper.embed is None

    def batch_coefficients(self, bags: Bags) -> Mixtures:
        """What is merged for each of B bags."""
        batch = as_batch(bags)
        read = batch if self.sample_patches is None else sample_each(batch, self.sample_patches, self.sample_seed)
        w_logits, z = self.hyper(read)
        n = len(batch)
        activation = W_ACTIVATIONS[self.w_activation]
        w = activation(w_logits) if w_logits is not None else self.weight_vector.expand(n, -1)  # type: ignore[union-attr]
        if self.clamp_weights:
            w = w.clamp(0, 1)
        if z is not None:
            lam = LAMBDA_ACTIVATIONS[self.lambda_activation](z)
        elif self.ratio_vector is not None:
            ratio = F.relu(self.ratio_vector) if self.bounded_lambda else self.ratio_vector
            lam = (1 / (1 + ratio)).expand(n, -1)
        else:
            lam = torch.full_like(w, float(self.mix))
        # A stable order gives ties (often several w are 0) to the first source, on every device.
        selected = w.argsort(dim=1, descending=True, stable=True)[:, : self.top_k or w.shape[1]]
        return Mixtures(w, lam, selected)

    def coefficients(self, bag: Tensor | RaggedBatch) -> Mixtures:
        """w (m,), lambda (m,) and the selected sources (K,) of one bag (N, D)."""
        return Mixtures(*(values[0] for values in self.batch_coefficients(one_bag(bag))))

    def merged_state(self, bag: Tensor | RaggedBatch) -> dict[str, Tensor]:
        """The parameters of the network that this bag (N, D) is seen through."""
        coefficients = mixture_coefficients(*self.batch_coefficients(one_bag(bag)))[0]
        plain_head: dict[str, Tensor] = {f"head.{name}": value for name, value in self.head.named_parameters()}
        head = plain_head if self.merged_head is None else self.merged_head.state(coefficients)
        return {**self.encoder.state(coefficients), **head}

    def auxiliary_loss(self, mixtures: Mixtures) -> Tensor:
        """beta L_mix + gamma L_agg (Eq. 7), the mean over the bags that are merged so.

        With the balance term (the release), the mean of the selected w is added to L_agg; it exists only with a K.
        """
        w, lam, selected = mixtures
        if not self.beta and not self.gamma:
            return w.new_zeros(())
        mask, k = selection_mask(w, selected), selected.shape[1]
        loss = (lam * mask).square().sum() * (self.beta / k) + torch.logsumexp(w, dim=1).square().sum() * self.gamma
        if self.balance_term and self.top_k is not None:
            loss = loss + (w * mask).sum() * (self.gamma / k)
        return loss / len(w)

    @property
    def networks_per_bag(self) -> int:
        return 2

    @property
    def merging(self) -> "STEPH":
        return self

    def pooling_network(self, batch: RaggedBatch) -> MIL | None:
        return self._network(batch) if self.encoder.network.pools_by_attention else None

    def deployed(self) -> Model:
        if not self.same_for_all_bags:
            return self
        return self._network(RaggedBatch(self.encoder.stack.new_zeros(1, 1), (0, 1)))  # any bag will do

    def _network(self, batch: RaggedBatch) -> MIL:
        """The network that is merged for one bag."""
        network = deepcopy(self.encoder.network)
        load_into(network, self.merged_state(batch))
        return network

    def architecture(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "network": self.encoder.network.architecture(),
            "sources": self.source_names,
            "order": list(self.encoder.layout.shapes),  # in memory too: libraries round by where a number lies
            "options": {name: getattr(self, name) for name in EXPORTED},
        }

    @classmethod
    def rebuild(cls, architecture: Mapping[str, Any], part: Callable[[Mapping[str, Any]], Any]) -> "STEPH":
        network = part(architecture["network"])
        parameters = dict(network.named_parameters())
        names = dict.fromkeys([*architecture["order"], *parameters])
        empty = {name: torch.zeros_like(parameters[name]) for name in names}
        sources = dict.fromkeys(architecture["sources"], empty)
        return cls(empty, empty, sources, network=network, **architecture["options"])


def keep_sources(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], sources: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and tensors (as a model folder holds them) of a STEPH with only some of its sources."""
    names, options = list(architecture["sources"]), architecture["options"]
    rows = torch.tensor([names.index(name) for name in sources])
    last = "" if options["hyper_head"] == "linear" else ".3"
    by_source = {f"hyper.{head}{last}.{kind}" for head in ("weight_head", "mix_head") for kind in ("weight", "bias")}
    by_source |= {"weight_vector", "ratio_vector"}
    fewer = {}
    for name, value in tensors.items():
        if name.startswith(("encoder.vectors.", "merged_head.vectors.")):
            value = value[torch.cat([torch.zeros(1, dtype=torch.int64), rows + 1])]  # the target's comes first
        fewer[name] = value[rows] if name in by_source else value
    top_k = options["top_k"] and min(options["top_k"], len(sources))
    return {**architecture, "sources": list(sources), "options": {**options, "top_k": top_k}}, fewer


class Hypernetwork(nn.Module):
    """H_agg and H_mix: one shared patch embedding (linear, ReLU, mean over patches) with a head for each; separate: an
    embedding for each too."""

    def __init__(
        self, dim_in: int, dim_hidden: int, m: int, weights: bool, ratios: bool, dropout: float, head: str,
        separate: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()

        def new_head() -> nn.Module:
            if head == "linear":
                return nn.Linear(dim_hidden, m)
            hidden = nn.Linear(dim_hidden, dim_hidden)
            return nn.Sequential(hidden, nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim_hidden, m))

        self.embed = nn.Linear(dim_in, dim_hidden) if weights or ratios else None
        self.weight_head = new_head() if weights else None
        self.mix_embed = nn.Linear(dim_in, dim_hidden) if weights and ratios and separate else None
        self.mix_head = new_head() if ratios else None

    def forward(self, batch: RaggedBatch) -> tuple[Tensor | None, Tensor | None]:
        """What w (B, m) and lambda (B, m) are activations of; None where no hypernetwork gives them."""
        if self.embed is None:
            return None, None
        mean = mean_of_embedded(batch, self.embed)
        w_logits = None if self.weight_head is None else self.weight_head(mean)
        if self.mix_embed is not None:
            mean = mean_of_embedded(batch, self.mix_embed)
        return w_logits, None if self.mix_head is None else self.mix_head(mean)


def mixture_coefficients(w: Tensor, lam: Tensor, selected: Tensor) -> Tensor:
    """Coefficients (B, 1 + m) of tau_t and of each tau_s in sum_j w_j [lambda_j tau_t + (1 - lambda_j) tau_sj]."""
    w = w * selection_mask(w, selected)
    of_target = w * lam
    return torch.cat([of_target.sum(1, keepdim=True), w - of_target], dim=1)


def selection_mask(w: Tensor, selected: Tensor) -> Tensor:
    """(B, m): 1 where a source is selected, 0 elsewhere."""
    return torch.zeros_like(w, requires_grad=False).scatter_(1, selected, 1.0)


def convert_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trainable parameters of the release's STEPH under our names."""
    return renamed(state, RELEASED_NAMES)


def _abmil_of(state: State, dropout: float) -> ABMIL:
    """An ABMIL of the dimensions of a state. Raises `Refused` for the state of another network."""
    expected = ABMIL(1, 1, 1, 1).state_dict()
    if set(state) != set(expected):
        raise Refused(f"the states are not ABMIL's (parameters {sorted(state)[:3]}...): give their `network`.")
    dim_emb, dim_in = state["embed.weight"].shape
    n_attn, n_bins = len(state["gate_tanh.weight"]), len(state["head.weight"])
    return ABMIL(dim_in, dim_emb, n_attn, n_bins, dropout).to(state["embed.weight"].dtype)


def _head(network: MIL, target_state: State | None) -> nn.Linear:
    """A new prediction head like the network's, or the target's, frozen."""
    old = network.head
    head = nn.Linear(old.in_features, old.out_features).to(old.weight.dtype)
    if target_state is not None:
        head.load_state_dict({"weight": target_state["head.weight"], "bias": target_state["head.bias"]})
        head.requires_grad_(False)
    return head
