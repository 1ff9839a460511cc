"""Data: study manifests, cohorts, splits, patch features and the packed store."""

from steph.data.bags import RaggedBatch, as_batch

__all__ = ["RaggedBatch", "as_batch"]
