"""Sparse task vector mixup with hypernetworks (STEPH) for whole-slide image prognosis.

`run` carries out one run of a study, `results` reads all that are finished, `load_model` opens an exported model. Each
is imported when it is first asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steph.deploy import load_model
    from steph.study import results, run

__all__ = ["Refused", "__version__", "load_model", "results", "run"]
__version__ = "0.1.0"

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "project").is_dir()
PROJECT = PACKAGE / "project" if INSTALLED else PACKAGE.parent
"""The checkout: notebooks/ and data_manifest/ lie in it. Of an installed package, its copies of these (setup.py)."""
WORKPLACE = Path.cwd() if INSTALLED else PROJECT
"""Where build/ lies: the checkout, or, of an installed package, the folder in which one stands."""


class Refused(Exception):
    """Something a person gave cannot be used. The message says what was found, where, what was expected, what to do."""


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from steph import deploy as room
    elif name in __all__:
        from steph import study as room  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module 'steph' has no attribute {name!r}")
    return getattr(room, name)
