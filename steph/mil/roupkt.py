"""ROUPKT: a router that mixes experts on the bag features of all cancers' models (routing-based knowledge transfer)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.mil.base import BagEncoder, Bags, ForwardPass, Frozen, Model

BALANCE, Z = 0.01, 0.01
"""Weights of the auxiliary losses, the release's."""


class ROUPKT(Model):
    """Routing-based transfer (ROUPKT, MoE-PKT in its release): a mixture of experts, one on each finished model.

    The router, a network of its own with a linear layer without bias as its head, gives each expert a probability from
    the patches; the `top_k` largest are used, not normalised anew. Expert i is a linear layer and ReLU on the bag
    feature of model i. Their weighted sum goes through a new prediction head.

    router: a new network; its head is replaced. models: finished ones by name, the target's own first (as in the
    release), then the sources. Raises `Refused` for a K outside 1..n.
    """

    has_frozen_features = True
    runs_on_shapes = False  # which experts take part depends on numbers

    def __init__(self, router: BagEncoder, models: Mapping[str, BagEncoder], top_k: int = 5) -> None:
        super().__init__()
        n = len(models)
        if not 1 <= top_k <= n:
            raise Refused(f"top_k = {top_k} of {n} experts; choose 1 to {n}.")
        self.names, self.top_k = list(models), top_k
        self.models = nn.ModuleList([Frozen(model) for model in models.values()])
        dim, bins, dtype = router.head.in_features, router.head.out_features, router.head.weight.dtype
        self.router = router
        self.router.head = nn.Linear(dim, n, bias=False).to(dtype)
        self.experts = nn.ModuleList([nn.Linear(dim, dim).to(dtype) for _ in range(n)])
        self.head = nn.Linear(dim, bins).to(dtype)
        self.monitored = [f"p_{name}" for name in self.names]

    def frozen_features(self, bags: Bags) -> Tensor:
        """Bag features of every model, (B, n, H)."""
        return torch.stack([model.encode(bags) for model in self._frozen_models], dim=1)

    def forward_pass(self, bags: Bags | None, frozen: Tensor | None = None) -> ForwardPass:
        """The auxiliary loss is BALANCE * (largest probability) + Z * logsumexp(logits)^2, the mean over bags.
        Monitored is each expert's mean probability, (n,)."""
        assert bags is not None
        logits = self.router(bags)
        probabilities = torch.softmax(logits, dim=1)
        mixed = self.mixed(probabilities, self.frozen_features(bags) if frozen is None else frozen)
        loss = BALANCE * probabilities.amax(1) + Z * torch.logsumexp(logits, dim=1).square()
        return ForwardPass(self.head(mixed), loss.mean(), probabilities.detach().mean(0))

    def mixed(self, probabilities: Tensor, features: Tensor) -> Tensor:
        """The experts' weighted sum (B, H), from the router's probabilities (B, n) and the models' bag features
        (B, n, H)."""
        selected = probabilities.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]
        weights = torch.zeros_like(probabilities).scatter(1, selected, probabilities.gather(1, selected))
        # An expert that no bag chose takes no part, so that it gets no gradient and the optimizer leaves it alone.
        chosen = torch.unique(selected).tolist()
        values = features[:, chosen].transpose(0, 1)  # (n, B, H)
        layers, biases = zip(*((self.experts[i].weight, self.experts[i].bias) for i in chosen), strict=True)
        values = F.relu(torch.baddbmm(torch.stack(biases).unsqueeze(1), values, torch.stack(layers).transpose(1, 2)))
        return (values * weights[:, chosen].T.unsqueeze(2)).sum(0)

    @property
    def _frozen_models(self) -> list[Frozen]:
        return [model for model in self.models if isinstance(model, Frozen)]

    @property
    def networks_per_bag(self) -> int:
        return len(self.models) + 1

    def architecture(self) -> dict[str, Any]:
        network = self._frozen_models[0].network.architecture()
        return {"kind": self.kind, "network": network, "models": self.names, "options": {"top_k": self.top_k}}

    @classmethod
    def rebuild(cls, architecture: Mapping[str, Any], part: Callable[[Mapping[str, Any]], Any]) -> "ROUPKT":
        router = part(architecture["network"])
        models = {name: part(architecture["network"]) for name in architecture["models"]}
        return cls(router, models, architecture["options"]["top_k"])
