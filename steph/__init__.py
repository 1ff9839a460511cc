"""Sparse task vector mixup with hypernetworks (STEPH) for whole-slide image prognosis."""

from pathlib import Path

__version__ = "0.1.0"

PROJECT = Path(__file__).resolve().parent.parent
"""The checkout: notebooks/, data_manifest/ and build/ lie in it."""


class Refused(Exception):
    """Something a person gave cannot be used. The message says what was found, where, what was expected, what to do."""
