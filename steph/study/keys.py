"""Keys: what decides a result, as hashes. Code that can change a number changes a key when it is changed; comments, and
what a method does not use, do not.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from steph import Refused, merging, mil, survival, training
from steph.data import bags
from steph.files.records import fingerprint
from steph.methods import Inputs, Method
from steph.mil import NETWORKS
from steph.training import engine

NUMERIC = tuple(module.__name__ for module in (survival, mil, merging, training, bags))
"""Modules and rooms whose code decides numbers; what data went in is told by the data's own fingerprints."""


def is_numeric(module: str) -> bool:
    """Whether a module, by name, is one of `NUMERIC` or lies in one of them."""
    return any(module == room or module.startswith(f"{room}.") for room in NUMERIC)


@cache
def code_fingerprint(*modules: str) -> str:
    """Hash of the code of modules and of all that they import from `NUMERIC`, docstrings and comments left out."""
    waiting, sources = list(modules), {}
    while waiting:
        name = waiting.pop()
        if name not in sources:
            sources[name], imported = _module_code(name)
            waiting += [module for module in imported if is_numeric(module)]
    return fingerprint(sources)


@cache
def _module_code(module: str) -> tuple[str, list[str]]:
    """A module's code, and the modules that it imports from."""
    tree = ast.parse(Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8"))
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("steph"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in names if _is_package(node.module) and find_spec(name)]
            imported += submodules or [node.module]
    return _without_docstrings(tree), imported


def _is_package(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def method_code(entry: Method) -> str:
    """Hash of the code that decides a method's numbers: its builder with the functions, classes and plain values of the
    methods' files (or of the notebook) that it uses, and the modules of networks, merging and training behind them.

    Raises `Refused` for a builder of a notebook that uses a value which is no plain data: changes would not be seen.
    """
    return _method_code(entry.build, NETWORKS[entry.network])


@cache
def _method_code(build: Callable[..., Any], network: Callable[..., Any]) -> str:
    waiting: list[Any] = [build, network, Inputs]
    modules = {engine.__name__, survival.__name__}
    sources: dict[str, Any] = {}
    while waiting:
        item = waiting.pop()
        label = f"{item.__module__}.{item.__qualname__}"
        if label in sources:
            continue
        functions = list(_functions(item))
        sources[label] = [_source(function) for function in functions]
        if inspect.isclass(item):
            waiting += [base for base in item.__bases__ if base.__module__.startswith("steph.methods")]
            modules |= {base.__module__ for base in item.__mro__ if is_numeric(base.__module__)}
            sources[f"{label}, values"] = repr({k: v for k, v in sorted(vars(item).items()) if _is_plain(v, k)})
        for function in functions:
            for name in sorted(set(_names(function.__code__)) & function.__globals__.keys()):
                value = function.__globals__[name]
                if isinstance(value, ModuleType):
                    modules |= {value.__name__} if is_numeric(value.__name__) else set()
                elif inspect.isfunction(value) or inspect.isclass(value):
                    home = value.__module__
                    if is_numeric(home) and not _is_package(home):
                        modules.add(home)
                    elif is_numeric(home) or home.startswith("steph.methods") or home == item.__module__:
                        waiting.append(value)
                elif _is_plain(value):
                    sources[f"{label}, {name}"] = repr(value)
                elif item.__module__ == "__main__" and not callable(value):
                    raise Refused(
                        f"{item.__qualname__} uses {name}, a {type(value).__name__} of this notebook: hand it over as "
                        f"an option of the method (options={{{name!r}: ...}}), so that runs with another value are "
                        "other runs."
                    )
    return fingerprint([sources, code_fingerprint(*sorted(modules))])


def _functions(item: Any) -> Iterator[Any]:
    """A function itself; of a class, the functions that are defined in it."""
    if inspect.isfunction(item):
        yield item
    elif inspect.isclass(item):
        for value in vars(item).values():
            function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
            # Functions that `dataclass` makes have no file.
            written = inspect.isfunction(function) and function.__code__.co_filename != "<string>"
            if written and function.__module__ == item.__module__:
                yield function


@cache
def _source(function: Callable[..., Any]) -> str:
    """A function's code without docstrings; a lambda's line as it stands."""
    text = textwrap.dedent(inspect.getsource(function))
    return text if function.__name__ == "<lambda>" else _without_docstrings(ast.parse(text))


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function looks up, those of functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_plain(value: Any, name: str = "") -> bool:
    """Whether a value is plain data, whose text tells all of it."""
    if name.startswith("__"):
        return False
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
