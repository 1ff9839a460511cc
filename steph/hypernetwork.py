"""STEPH under its public name; its code is `steph.merging.steph`."""

from steph.merging.steph import STEPH, convert_released

__all__ = ["STEPH", "convert_released"]
