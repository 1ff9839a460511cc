"""The plain reference: ABMIL and STEPH as anyone would first write them, in the shape of the authors' release.

A loop over bags; for each bag one pass of the hypernetwork, a sum over the kept task vectors for every parameter, one
functional call; autograd through it all, and the graphs of all bags kept for a single backward pass. Nothing of the
library's own engine is used, so that what is measured against it, and compared with it, is not itself.
"""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from steph.merging.steph import STEPH
from steph.mil import ABMIL
from steph.survival import nll_loss


class PlainABMIL(nn.Module):
    """A copy of an `ABMIL`: same parameters under the same names, a bag at a time."""

    def __init__(self, network: ABMIL) -> None:
        super().__init__()
        self.embed, self.score = copy.deepcopy(network.embed), copy.deepcopy(network.score)
        self.gate_tanh, self.gate_sigmoid = copy.deepcopy(network.gate_tanh), copy.deepcopy(network.gate_sigmoid)
        self.head: nn.Module = copy.deepcopy(network.head)
        self.dropout = network.dropout

    def encode(self, bag: Tensor) -> Tensor:
        """Bag feature (1, dim_emb) of one bag (N, D)."""
        embedded = F.relu(self.embed(bag))
        tanh = F.dropout(torch.tanh(self.gate_tanh(embedded)), self.dropout, self.training)
        sigmoid = F.dropout(torch.sigmoid(self.gate_sigmoid(embedded)), self.dropout, self.training)
        attention = torch.softmax(self.score(tanh * sigmoid).T, dim=1)
        return attention @ embedded

    def forward(self, bag: Tensor) -> Tensor:
        """Logits (1, T) of one bag (N, D)."""
        return self.head(self.encode(bag))


class PlainSTEPH(nn.Module):
    """A copy of a `STEPH` on ABMIL models with weights and lambda from hypernetworks: same trained parameters, a bag at
    a time."""

    def __init__(self, model: STEPH) -> None:
        super().__init__()
        assert isinstance(model.encoder.network, ABMIL)
        self.network = PlainABMIL(model.encoder.network)
        self.network.head = nn.Identity()
        self.network.requires_grad_(False)
        self.base, self.target, *self.sources = [
            {name: value.clone() for name, value in state.items()} for state in model.encoder.states()
        ]
        hyper = model.hyper
        assert hyper.embed is not None and hyper.weight_head is not None and hyper.mix_head is not None
        self.embed, self.weight_head, self.mix_head, self.head = (
            copy.deepcopy(layer) for layer in (hyper.embed, hyper.weight_head, hyper.mix_head, model.head)
        )
        self.top_k, self.beta, self.gamma = model.top_k, model.beta, model.gamma
        self.auxiliary: list[Tensor] = []

    def forward(self, bag: Tensor) -> Tensor:
        """Logits (1, T) of one bag (N, D); its auxiliary loss is added to `auxiliary`."""
        mean = F.relu(self.embed(bag)).mean(0)
        w = F.relu(self.weight_head(mean))
        lam = 1 / (1 + F.relu(self.mix_head(mean)))
        kept = w.argsort(descending=True, stable=True)[: self.top_k]
        self.auxiliary.append(
            self.beta * lam[kept].square().mean()
            + self.gamma * (torch.logsumexp(w, dim=0).square() + w[kept].mean())
        )  # fmt: skip
        merged = {}
        for name, value in self.base.items():
            for j in kept.tolist():
                value = value + w[j] * self.sources[j][name]
            for j in kept.tolist():
                value = value + w[j] * lam[j] * (self.target[name] - self.sources[j][name])
            merged[name] = value
        return self.head(functional_call(self.network, merged, (bag,)))


def loss(model: PlainABMIL | PlainSTEPH, bags: list[Tensor], bins: Tensor, event: Tensor) -> Tensor:
    """The training loss of bags (N_i, D), one after the other: likelihood, and the auxiliary losses where there are."""
    if isinstance(model, PlainSTEPH):
        model.auxiliary = []
    total = nll_loss(torch.sigmoid(torch.cat([model(bag) for bag in bags])), bins, event)
    return total + torch.stack(model.auxiliary).mean() if isinstance(model, PlainSTEPH) else total
