"""Representation transfer: what is trained stands on bag features of finished models, which stay as they are.

Fine-tuned: a head on one frozen encoder. ROUPKT: a router that mixes experts on the features of all cancers' models.
Frozen features are the same in every epoch; the engine computes them once per patient (see `steph.training.engine`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.mil.frozen import Frozen


class FineTuned(nn.Module):
    """A network's encoder, frozen, under a prediction head that is trained.

    network: a finished model. fresh_head: a new head in place of training on from the network's own.
    """

    reads_patches = False

    def __init__(self, network: nn.Module, fresh_head: bool) -> None:
        super().__init__()
        self.encoder = Frozen(network)
        old = self.encoder.head
        new = nn.Linear(old.in_features, old.out_features).to(old.weight.dtype) if fresh_head else deepcopy(old)
        self.head = new.requires_grad_(True)

    def frozen(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features (B, H)."""
        return self.encoder.encode(bags)

    def forward(self, bags: Sequence[Tensor] | RaggedBatch | None, frozen: Tensor | None = None) -> Tensor:
        """Logits of the hazards (B, T). With `frozen`, the bags' features, bags are not looked at."""
        if frozen is None:
            assert bags is not None
            frozen = self.frozen(bags)
        return self.head(frozen)

    def attention(self, bag: Tensor) -> Tensor:
        """Attention (N,) of the frozen encoder over the patches of one bag (N, D)."""
        return self.encoder.attention(bag)


class ROUPKT(nn.Module):
    """Routing-based transfer (ROUPKT, MoE-PKT in its release): a mixture of experts, one on each finished model.

    The router, a network of its own with a linear layer without bias as its head, gives each expert a probability from
    the patches; the `top_k` largest are used, not normalised anew. Expert i is a linear layer and ReLU on the bag
    feature of model i. Their weighted sum goes through a new prediction head.

    router: a new network; its head is replaced. models: finished ones by name, the target's own first (as in the
    release), then the sources. balance, z: weights of the auxiliary losses. expert: "identity" leaves features as they
    are. Raises `Refused` for a K outside 1..n.
    """

    def __init__(
        self,
        router: nn.Module,
        models: Mapping[str, nn.Module],
        top_k: int = 5,
        balance: float = 0.01,
        z: float = 0.01,
        expert: Literal["mlp", "identity"] = "mlp",
    ) -> None:
        super().__init__()
        n = len(models)
        if not 1 <= top_k <= n:
            raise Refused(f"top_k = {top_k} of {n} experts; choose 1 to {n}.")
        if expert not in ("mlp", "identity"):
            raise Refused(f"expert = {expert!r}; expected 'mlp' or 'identity'.")
        self.names, self.top_k, self.balance, self.z = list(models), top_k, balance, z
        self.models = nn.ModuleList([Frozen(model) for model in models.values()])
        old = router.head
        assert isinstance(old, nn.Linear)
        dim, dtype = old.in_features, old.weight.dtype
        self.router = router
        self.router.head = nn.Linear(dim, n, bias=False).to(dtype)
        self.mlp = expert == "mlp"
        self.experts = nn.ModuleList([nn.Linear(dim, dim).to(dtype) if self.mlp else nn.Identity() for _ in range(n)])
        self.head = nn.Linear(dim, old.out_features).to(dtype)
        self._last: Tensor | None = None

    def frozen(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features of every model, (B, n, H)."""
        return torch.stack([model.encode(bags) for model in self.models], dim=1)  # type: ignore[operator]

    def forward(self, bags: Sequence[Tensor] | RaggedBatch, frozen: Tensor | None = None) -> Tensor:
        """Logits of the hazards (B, T). frozen: the models' bag features (B, n, H), if they are known."""
        return self.head(self.mixed(self.router(bags), self.frozen(bags) if frozen is None else frozen))

    def mixed(self, router_logits: Tensor, features: Tensor) -> Tensor:
        """The experts' weighted sum (B, H), from the router's logits (B, n) and the models' bag features (B, n, H)."""
        self._last = router_logits
        probabilities = torch.softmax(router_logits, dim=1)
        selected = probabilities.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]
        kept = torch.zeros_like(probabilities).scatter(1, selected, probabilities.gather(1, selected))
        # An expert that no bag chose takes no part, so that it gets no gradient and the optimizer leaves it alone.
        chosen = torch.unique(selected).tolist()
        values = features[:, chosen].transpose(0, 1)  # (n, B, H)
        if self.mlp:
            weights, biases = zip(*((self.experts[i].weight, self.experts[i].bias) for i in chosen), strict=True)
            layers = torch.stack(weights).transpose(1, 2)
            values = F.relu(torch.baddbmm(torch.stack(biases).unsqueeze(1), values, layers))
        return (values * kept[:, chosen].T.unsqueeze(2)).sum(0)

    def auxiliary_loss(self) -> Tensor:
        """balance * (probability of the first expert) + z * logsumexp(logits)^2, the mean over the last pass' bags."""
        if self._last is None:
            raise Refused("auxiliary_loss() needs a forward pass first.")
        largest = torch.softmax(self._last, dim=1).amax(1)
        return (self.balance * largest + self.z * torch.logsumexp(self._last, dim=1).square()).mean()

    @property
    def monitored(self) -> list[str]:
        """What `monitor` gives, by name: `p_NAME` of each expert."""
        return [f"p_{name}" for name in self.names]

    def monitor(self) -> Tensor:
        """Mean probability of each expert over the bags of the last forward pass, (n,), see `monitored`."""
        if self._last is None:
            raise Refused("monitor() needs a forward pass first.")
        return torch.softmax(self._last.detach(), dim=1).mean(0)

    def attention(self, bag: Tensor) -> Tensor:
        """Attention (N,) of the router over the patches of one bag (N, D)."""
        return self.router.attention(bag)  # type: ignore[operator]
