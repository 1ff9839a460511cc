"""Analyses of records and models: are predictions good, what do task vectors do, what does it cost?"""

from steph.analysis.mixing.sar import subspace_alignment_ratio

__all__ = ["subspace_alignment_ratio"]
