"""Prediction with a finished model under its public name; its code is `steph.deploy.predict`."""

from steph.deploy.predict import load_model

__all__ = ["load_model"]
