"""A finished model as a folder that predicts for new patients; pools of models; the authors' checkpoints."""
