"""Figures and tables: one file per subject, all of them at hand as `plots.NAME`."""

# ruff: noqa: F401
from steph.plots.attention import attention_agreement, attention_by_dataset, attention_maps, attention_on_tumour
from steph.plots.cohort import follow_up, kaplan_meier, patches, similarity
from steph.plots.comparison import c_index, gains, gains_by_dataset, intervals, starts_of_all, sweeps, transfer_controls
from steph.plots.display import show_blocks, show_figure, show_link, show_styled, show_table, show_text, write_table
from steph.plots.efficiency import epochs, epochs_by_sources, performance_and_cost, predictions, sampling
from steph.plots.evidence import accuracy, auc_by_year, calibration, hazard_ratios, power, risk_groups, transferability
from steph.plots.landscape import course, courses, loss_planes, starts, trajectories
from steph.plots.mixtures import against_rotated, alignment, convexity, dominant_directions, nearness, tested_mixtures
from steph.plots.style import set_style
