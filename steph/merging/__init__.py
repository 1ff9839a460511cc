"""Model merging: task vectors and what is made of them. Nothing here knows the layers of any network."""

from steph.merging.average import model_average
from steph.merging.merged_encoder import MergedEncoder
from steph.merging.task_vectors import apply_task_vector, task_vector

__all__ = ["MergedEncoder", "apply_task_vector", "model_average", "task_vector"]
