"""The contracts: `Model`, whatever maps bags of patches to logits of hazards, and `MIL`, a network that does so alone.

What the training engine, prediction, model folders and analyses need to know of a model stands here and is asked for
nowhere else. `tests/mil/test_contract.py` and `tests/merging/test_contract.py` take every subclass through the same
checks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steph import Refused
from steph.data.bags import RaggedBatch, as_batch
from steph.mil.gated_attention import Save

Bags = Sequence[Tensor] | RaggedBatch
"""What a model is given: a list of bags of patches (N_i, D), or a ragged batch of them."""


class ForwardPass(NamedTuple):
    """What one pass over B bags gives: logits of the hazards (B, T), and for models that have them a scalar auxiliary
    loss and the numbers that `Model.monitored` names, (k,), without a gradient."""

    logits: Tensor
    auxiliary_loss: Tensor | None = None
    monitored: Tensor | None = None


def _undefined(kind: "type[Model]", method: str, so: str = "") -> Refused:
    """A method that only some classes of model need is asked of one that lacks it."""
    return Refused(f"the class {kind.__name__} {so}does not define `{method}` (see steph.mil.base).")


class Model(nn.Module, ABC):
    """Whatever is trained, or predicts. What requires a gradient is what is trained.

    Raises `Refused` where a method is asked for that a class says it has (or, to be exported, needs) and lacks.

    supervised: the likelihood trains the model; False where the auxiliary loss alone does.
    has_frozen_features: a part of it is not trained; `frozen_features` computes that part once per patient, not in
    every epoch, and `forward_pass` takes it back.
    reads_patches: it needs the patches in training; False where the frozen features are enough.
    runs_on_shapes: it can run on PyTorch's device "meta", where tensors have shapes and no numbers.
    monitored: names of the numbers that training follows. facts: what the method's builder found out when it made the
    model, plain data. networks_per_bag: through how many networks a bag goes.
    """

    supervised: ClassVar[bool] = True
    has_frozen_features: ClassVar[bool] = False
    reads_patches: ClassVar[bool] = True
    runs_on_shapes: ClassVar[bool] = True
    KINDS: ClassVar[dict[str, "type[Model]"]] = {}
    """Every class of model that a model folder can hold, by the name that the folder gives it."""

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        Model.KINDS[cls.__name__.lower()] = cls

    def __init__(self) -> None:
        super().__init__()
        self.monitored: list[str] = []
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def forward_pass(self, bags: Bags | None, frozen: Tensor | None = None) -> ForwardPass:
        """One pass over B bags. frozen: (B, ...) what `frozen_features` gave for them; where it is given and the model
        does not read patches, bags may be None."""

    def forward(self, bags: Bags) -> Tensor:
        """Logits of the hazards (B, T) of B bags of patches (N_i, D)."""
        return self.forward_pass(bags).logits

    def frozen_features(self, bags: Bags) -> Tensor:
        """What the parts that are not trained make of B bags, (B, ...)."""
        raise _undefined(type(self), "frozen_features")

    @property
    def networks_per_bag(self) -> int:
        return 1

    @property
    def merging(self) -> "Model | None":
        """The part that merges a model for each bag; None where there is none."""
        return None

    def pooling_network(self, batch: RaggedBatch) -> "MIL | None":
        """The network whose attention pools a bag (a batch of one); None where patches are pooled otherwise."""
        return None

    def deployed(self) -> "Model":
        """The model that predicts: itself, or one plain network where all patients get the same weights."""
        return self

    def architecture(self) -> dict[str, Any]:
        """What `rebuild` needs to make a model of the same form, as plain data; "kind" names the class. Without it, a
        model folder cannot hold the model."""
        raise _undefined(type(self), "architecture", "cannot be exported: it ")

    @classmethod
    def rebuild(cls, architecture: Mapping[str, Any], part: Callable[[Mapping[str, Any]], Any]) -> "Model":
        """A model of this form, its numbers still to be filled in. part: makes a part from its own architecture."""
        raise _undefined(cls, "rebuild", "cannot be exported: it ")

    @property
    def kind(self) -> str:
        """The class as model folders name it."""
        return type(self).__name__.lower()


class BagEncoder(Model):
    """A model with bag features: an encoder under a linear prediction head."""

    head: nn.Linear

    @abstractmethod
    def encode(self, bags: Bags) -> Tensor:
        """Bag features (B, H), float32 also where patches are in half precision."""


class MIL(BagEncoder):
    """A multi-instance network. Everything but `head` is its encoder, the part that is merged.

    needs_coords: its batches must carry the coordinates of patches. order_invariant: the order of patches does not
    matter. pools_by_attention: `attention` tells what it reads. encodes_each: it offers `encode_each` and
    `encode_each_backward`, by which a hypernetwork's bags are encoded together, each under weights of its own.
    recompute: its hand-written parts keep as little as possible for the way back (`steph.mil.gated_attention`).
    made_as: its name in `steph.mil.NETWORKS` and its width; None for a network that was made without the registry.
    """

    needs_coords: ClassVar[bool] = False
    order_invariant: ClassVar[bool] = True
    pools_by_attention: ClassVar[bool] = True
    encodes_each: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False
        self.made_as: dict[str, Any] | None = None

    def forward_pass(self, bags: Bags | None, frozen: Tensor | None = None) -> ForwardPass:
        assert bags is not None
        return ForwardPass(self.head(self.encode(bags)))

    @abstractmethod
    def attention(self, bag: Tensor | RaggedBatch) -> Tensor:
        """Attention (N,) over the patches of one bag (N, D); not negative, sums to 1."""

    def encode_under(self, weights: Mapping[str, Tensor], batch: RaggedBatch) -> Tensor:
        """Bag features (B, H), bag i under the encoder weights ``weights[name][i]``, differentiable in them. Bags go
        through one after the other; a network may know a faster way."""
        encoder, features = Encoder(self), []
        rows = {f"network.{name}": value.unbind() for name, value in weights.items()}
        for i in range(len(batch)):
            of_bag = {name: row[i] for name, row in rows.items()}
            features.append(functional_call(encoder, of_bag, (batch.single(i),), tie_weights=False))
        return torch.cat(features)

    def encode_each(
        self, weights: Mapping[str, Tensor], bags: Tensor, absent: Tensor | None, save: Save
    ) -> tuple[Tensor, Any]:
        """Bag features (G, H) of G padded bags (G, n, D), bag g under the weights ``weights[name][g]``, and what
        `encode_each_backward` needs. absent: (G, n) True where there is no patch, None where all bags are full."""
        raise _undefined(type(self), "encode_each")

    def encode_each_backward(self, saved: Any, grad: Tensor, out: Mapping[str, Tensor]) -> None:
        """Gradient of each bag's weights, written to ``out[name]`` (G, ...), from that of the features (G, H)."""
        raise _undefined(type(self), "encode_each_backward")

    def pooling_network(self, batch: RaggedBatch) -> "MIL | None":
        return self if self.pools_by_attention else None

    def architecture(self) -> dict[str, Any]:
        if self.made_as is None:
            raise Refused(
                f"a {type(self).__name__} that was not made by its name in steph.mil.NETWORKS cannot be exported: a "
                "model folder holds networks of that registry."
            )
        return {"kind": "network", **self.made_as}


class Encoder(nn.Module):
    """A network's `encode` as a module's forward, so that it can be called under other parameters."""

    def __init__(self, network: MIL) -> None:
        super().__init__()
        self.network = network

    def forward(self, bags: RaggedBatch) -> Tensor:
        return self.network.encode(bags)


def takes_half(encode: Callable[[Any, RaggedBatch], Tensor]) -> Callable[..., Tensor]:
    """A network's `encode` that is given a `RaggedBatch` in any case, and whose layers in float32 also take patches in
    half precision; bag features are in float32 then."""

    @wraps(encode)
    def wrapped(self: Any, bags: Bags) -> Tensor:
        batch = as_batch(bags)
        if not batch.half:
            return encode(self, batch)
        with torch.autocast(batch.features.device.type, torch.bfloat16):
            return encode(self, batch).float()

    return wrapped


class AttentionPooling(MIL):
    """A network whose bag feature is the mean of its patches' embeddings, weighted by a softmax of their scores."""

    @abstractmethod
    def embed_and_score(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """Embedded patches (N, H) of all bags, and the scores (N,) of the pooling."""

    @takes_half
    def encode(self, batch: RaggedBatch) -> Tensor:
        """Bag features (B, H)."""
        patches, scores = self.embed_and_score(batch)
        return batch.softmax(scores) @ patches

    def attention(self, bag: Tensor | RaggedBatch) -> Tensor:
        """Attention (N,) of the pooling over the patches of one bag (N, D); it sums to 1."""
        return torch.softmax(self.embed_and_score(one_bag(bag))[1], dim=0)


def network_needing_coords(model: nn.Module) -> str | None:
    """The name of a network in a model, or of the model, that needs patches' coordinates; None where none does."""
    needing = [type(part).__name__ for part in model.modules() if isinstance(part, MIL) and part.needs_coords]
    return needing[-1] if needing else None


def one_bag(bag: Tensor | RaggedBatch) -> RaggedBatch:
    """A bag of patches (N, D) as a batch of one. Raises `Refused` for a batch of several."""
    batch = bag if isinstance(bag, RaggedBatch) else as_batch([bag])
    if len(batch) != 1:
        raise Refused(f"one bag was expected; this batch has {len(batch)}.")
    return batch


class Frozen(nn.Module):
    """A finished model inside one that is trained: no parameter gets a gradient, and it stays in evaluation mode (no
    dropout) whatever mode the model around it is in."""

    def __init__(self, network: BagEncoder) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Evaluation mode, always."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, bags: Bags) -> Tensor:
        """Bag features (B, H)."""
        return self.network.encode(bags)

    @property
    def head(self) -> nn.Linear:
        """The network's own prediction head, frozen too."""
        return self.network.head
