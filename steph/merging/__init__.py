"""Model merging: task vectors and what is made of them. Nothing here knows the layers of any network."""

# ruff: noqa: F401
from steph.merging.average import model_average
from steph.merging.iso import iso_c, iso_cts
from steph.merging.merged_encoder import MergedEncoder
from steph.merging.pairs import PAIR_MERGES, merge_pairs
from steph.merging.steph import STEPH
from steph.merging.surgery import Surgery
from steph.merging.task_vectors import apply_task_vector, task_vector
from steph.merging.ties import ties
