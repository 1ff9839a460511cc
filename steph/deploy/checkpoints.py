"""The authors' checkpoints (``.pth``) and ours (``.safetensors``): weights, read from the one and written as the other.

Two kinds are known: a prognostic network (ABMIL: a cancer's own model, or the null model) and what STEPH trains (its
hypernetworks and its head; the models that it merges are files of their own). Values are carried over bit for bit.
"""

import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steph import Refused
from steph.files.atomic import atomic_path, refuse_taken
from steph.files.tables import shortened
from steph.merging import steph as hypernetwork
from steph.merging.steph import Hypernetwork
from steph.merging.task_vectors import check_same_network
from steph.mil import abmil
from steph.mil.state import ModelState, load_state, origin_of, save_state, shape_difference, state_fingerprint

OURS, THEIRS = ".safetensors", (".pth", ".pt")
NAMES = {
    kind: {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in layers.items() for part in ("weight", "bias")}
    for kind, layers in {
        "ABMIL": {theirs: ours for ours, theirs in abmil.RELEASED_NAMES.items()},
        "STEPH": hypernetwork.RELEASED_NAMES,
    }.items()
}
"""The release's names of each kind's parameters, and ours."""


def convert(source: Path, target: Path, null: Path | None = None) -> str:
    """Write the weights of `source` as `target`, in the names and the format of its ending; returns what they are.

    null: the null model (M_0) that they were trained from, either format (its own file, for an M_0). Models that are
    known to come from different ones are never merged (`steph.merging.task_vectors.task_vector`).
    Raises `Refused` as `read_weights` does, for other endings, and where `target` is there already.
    """
    for path in (source, target):
        if path.suffix not in (OURS, *THEIRS):
            raise Refused(f"{path}: expected a file that ends in {', '.join((OURS, *THEIRS))}.")
    refuse_taken(target)
    state, kind, others = read_weights(source)
    if null is not None:
        start, start_kind, _ = read_weights(null)
        if start_kind != "ABMIL":
            raise Refused(f"{null} holds what {start_kind} trains; expected a null model, a network like any other.")
        if kind == "ABMIL":
            check_same_network(state, start)
        state.origin = state_fingerprint(start)
    with atomic_path(target) as temporary:
        if target.suffix == OURS:
            save_state(state, temporary)
        else:
            content = io.BytesIO()  # into a file, torch.save would write its name: the same weights are the same bytes
            torch.save({theirs: state[ours].clone() for theirs, ours in NAMES[kind].items()}, content)
            temporary.write_bytes(content.getvalue())
    left_out = f"; {len(others)} other entries left out ({shortened(others, 3)})" if others else ""
    return f"{kind}, {sum(v.numel() for v in state.values()):,} weights{left_out}"


def read_weights(path: Path) -> tuple[ModelState, str, list[str]]:
    """The weights in a file of ours or of the release, under our names; their kind, of `NAMES`; and what else the file
    holds and is left out (a checkpoint of STEPH may hold the frozen models too).

    Raises `Refused` for a missing or damaged file, one that holds Python objects, parameters that are missing or
    unknown, shapes that do not fit each other, and values that are not finite.
    """
    if not path.is_file():
        raise Refused(f"there is no file {path}.")
    ours = path.suffix == OURS
    values = load_state(path) if ours else _tensors(path)
    kind = "STEPH" if any(name.startswith(("regulate_layer", "vecmix_layer", "hyper.")) for name in values) else "ABMIL"
    names = {name: name for name in NAMES[kind].values()} if ours else NAMES[kind]
    missing = [name for name in names if name not in values]
    others = [name for name in values if name not in names]
    if missing or (others and (ours or kind == "ABMIL")):
        lacks = f"lacks {shortened(missing)}" if missing else f"has {shortened(others)} besides"
        raise Refused(
            f"{path} does not hold the weights of {kind}: it {lacks}. The release has ABMIL networks and STEPH with "
            "two hypernetworks; other networks and methods cannot be carried over."
        )
    state = ModelState({names[name]: values[name] for name in names}, origin_of(values))
    for name, value in state.items():
        if value.dim() != (2 if name.endswith("weight") else 1) or not value.is_floating_point():
            form = f"{value.dtype} of shape {tuple(value.shape)}"
            raise Refused(f"{path}: {name} is {form}; no layer of {kind} has that.")
        if not torch.isfinite(value).all():
            raise Refused(f"{path}: {name} holds numbers that are not finite: the file is damaged, or training failed.")
    if difference := shape_difference(dict(_module(state, kind).named_parameters()), state):
        raise Refused(f"{path}: its layers do not fit each other as those of {kind} do: {difference} in the file.")
    return state, kind, others


def _module(state: ModelState, kind: str) -> nn.Module:
    """The shapes that the layers of such a model have, by some of its dimensions."""
    with torch.device("meta"):
        if kind == "ABMIL":
            dim_emb, dim_in = state["embed.weight"].shape
            return abmil.ABMIL(dim_in, dim_emb, len(state["gate_tanh.weight"]), len(state["head.weight"]))
        dim_hidden, dim_in = state["hyper.embed.weight"].shape
        hyper = Hypernetwork(dim_in, dim_hidden, len(state["hyper.weight_head.3.weight"]), True, True, 0.0, "mlp")
        head = nn.Linear(state["head.weight"].shape[1], len(state["head.weight"]))
        return nn.ModuleDict({"hyper": hyper, "head": head})


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file; `weights_only` runs no code of it. A dictionary that holds the one of the weights
    ("model", "net", ...) and names that all begin with "module." are what programs write too."""
    try:
        with warnings.catch_warnings(action="ignore"):  # What torch warns of is refused below.
            values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file makes torch raise nearly anything.
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        if culprit:
            raise Refused(
                f"{path} holds Python objects ({culprit[1]}), not weights alone. Loading them can run code that came "
                "with the file, so it is not opened. Where you trust its origin, have the program that made it save "
                "the weights: torch.save(model.state_dict(), 'weights.pth')."
            ) from None
        raise Refused(f"{path} is damaged, cut off, or no PyTorch file of weights. Get it again.") from None
    if isinstance(values, dict):
        inner = [value for value in values.values() if _are_tensors(value)]
        values = inner[0] if len(inner) == 1 and not _are_tensors(values) else values
    if not _are_tensors(values):
        with_names = f" with {shortened([*map(str, values)])}" if isinstance(values, dict) else ""
        raise Refused(
            f"{path} holds a {type(values).__name__}{with_names}; expected a dictionary of tensors by name, as "
            "torch.save(model.state_dict(), ...) writes it."
        )
    if all(name.startswith("module.") for name in values):  # as torch.nn.DataParallel names them
        values = {name.removeprefix("module."): value for name, value in values.items()}
    return {name: value.detach() for name, value in values.items()}


def _are_tensors(values: Any) -> bool:
    """Whether this is a dictionary of tensors by name, with at least one, whose numbers lie one after another; of
    others, a few bytes could stand for more numbers than the memory holds."""
    if not isinstance(values, dict) or not values or not all(isinstance(name, str) for name in values):
        return False
    if not all(isinstance(v, Tensor) and v.layout == torch.strided and not v.is_quantized for v in values.values()):
        return False
    return all(value.device.type == "cpu" and value.is_contiguous() for value in values.values())
