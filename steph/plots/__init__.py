"""Figures and tables: one file per subject, all of them at hand as `plots.NAME`."""

# ruff: noqa: F401
from steph.plots.attention import attention_agreement, attention_by_dataset, attention_maps, attention_on_tumour
from steph.plots.cohort import follow_up, kaplan_meier, patches, similarity
from steph.plots.comparison import c_index, gains, intervals, sweeps
from steph.plots.controls import starts_of_all, transfer_controls
from steph.plots.display import (
    file_name,
    show_blocks,
    show_figure,
    show_link,
    show_styled,
    show_table,
    show_text,
    styled,
    write_table,
)
from steph.plots.dynamics import course, courses, starts, trajectories
from steph.plots.efficiency import epochs, epochs_by_sources, performance_and_cost, predictions, sampling
from steph.plots.evidence import (
    accuracy,
    auc_by_year,
    calibration,
    gains_by_dataset,
    hazard_ratios,
    risk_groups,
    transferability,
)
from steph.plots.landscape import loss_planes, loss_planes_of_pairs
from steph.plots.sar import against_rotated, alignment, dominant_directions
from steph.plots.style import (
    DAYS_PER_YEAR,
    WIDTH,
    colour_of,
    colour_of_dataset,
    label_ends,
    line_of_dataset,
    marker_of,
    set_style,
    stamp,
)
from steph.plots.vicinal import convexity, nearness, tested_mixtures
