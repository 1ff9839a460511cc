"""The registry of methods: each row of the paper's tables, and each control of our own, is one entry.

Every file of this folder that defines `METHODS` is a family of methods and is found by itself: a new family is one
file, a new method one entry.
"""

import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from steph import Refused
from steph.data.manifest import refuse_unknown
from steph.methods.base import Method

FIRST = (
    "vanilla", "finetuned_head", "finetuned_representation", "finetuned_representation_nearest", "roupkt",
    "model_average", "adamerging", "ties_am", "surgery_am", "iso_c_am", "iso_cts_am", "steph",
)  # fmt: skip
"""The order of the paper's Table 1, in which tables begin; what is not named here follows family by family."""


_entries: dict[str, Method] = {}
for _module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _module.name != Path(__file__).stem:
        _family = getattr(import_module(f"steph.methods.{_module.name}"), "METHODS", {})
        if _twice := _entries.keys() & _family.keys():
            raise Refused(f"steph/methods/{_module.name}.py: {', '.join(sorted(_twice))} has an entry already.")
        _entries |= _family

METHODS = {name: _entries[name] for name in dict.fromkeys([*FIRST, *_entries])}


def method(name: str) -> Method:
    """A method by name. "steph@KIPAN" is STEPH with KIPAN as its only source, and so for any method that merges.

    Raises `Refused`, with the nearest names, for an unknown one, and for a source given to a method without sources.
    """
    base, at, source = name.partition("@")
    refuse_unknown("method", [base], METHODS, "the registry steph.methods.METHODS")
    entry = METHODS[base]
    if not at:
        return entry
    if not source:
        raise Refused(f"method {name!r} names no data set after @; write {base}@CANCER, or {base!r} for all sources.")
    if not entry.needs_sources or entry.after:
        raise Refused(f"method {name!r}: {entry.title} cannot be given one source; write {base!r}.")
    options = {**entry.options, "top_k": 1} if entry.sparse else entry.options
    only = f"{entry.title}, {source} only"
    return replace(entry, title=only, options=options, sweep=None, in_book=False, only=source)


def known_method(name: str) -> bool:
    """Whether `method` has an entry for a name."""
    try:
        method(name)
    except Refused:
        return False
    return True


def title(name: str) -> str:
    """A method's name as tables and figures show it; a name without an entry as it is."""
    return method(name).title if known_method(name) else name
