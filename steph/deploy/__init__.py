"""A finished model as a folder that predicts for new patients; pools of models; the authors' checkpoints."""

from steph.deploy.predict import load_model

__all__ = ["load_model"]
