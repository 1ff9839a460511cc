"""Figures: files come out, look alike, and never hide that a cohort is synthetic."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from steph import plots
from steph.analysis.dynamics import at_the_end
from steph.data.cohort import cohort_from
from steph.data.manifest import load_study
from steph.methods import METHODS
from steph.results import paper_table

DATASETS = list(paper_table("table_s1_datasets")["dataset"])


@pytest.fixture(autouse=True)
def _style(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    with plt.rc_context():
        plots.set_style()
        yield
    plt.close("all")


def parameters(study: str = "tiny", **changed: object) -> SimpleNamespace:
    found = load_study(study)
    given = {
        "study": found,
        "dataset": "all",
        "folds": list(range(found.folds)),
        "seed": found.seed,
        "precision": "fp32",
    }
    return SimpleNamespace(**{**given, **changed})


def cohort(name: str, n: int = 30):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "patient_id": [f"P{i}" for i in range(n)],
            "slide_id": [f"S{i}" for i in range(n)],
            "project": name,
            "time_days": rng.integers(30, 3000, n),
            "event": rng.integers(0, 2, n),
        }
    )
    return cohort_from(table, name, "test")


def c_indices(undefined: bool = False) -> pd.DataFrame:
    rows = [
        {"dataset": d, "method": m, "fold": k, "c_index": 0.5 + 0.01 * k, "external_c_index": 0.6}
        for d, m, k in product(["SARC", "LIHC"], ["vanilla", "steph", "hypernetwork_only"], range(3))
    ]
    table = pd.DataFrame(rows)
    if undefined:
        table.loc[(table["dataset"] == "SARC") & (table["method"] == "steph") & (table["fold"] == 2), "c_index"] = None
    return table


def course(seeds: int = 3, sources: list[str] = DATASETS[1:]) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"seed": s, "epoch": e, "source": name, "w": rng.random(), "lambda": rng.random()}
        for s, e, name in product(range(seeds), range(1, 5), sources)
    ]
    return pd.DataFrame(rows)


def differences() -> pd.DataFrame:
    return pd.DataFrame(
        {"label": ["a", "b"], "difference": [0.1, 0], "low": [0, -0.1], "high": [0.2, 0.1], "paper": [0.1, np.nan]}
    )


def gained() -> pd.DataFrame:
    values = [[0.1, -0.2, np.nan], [0.0, 0.01, 0.02]]
    return pd.DataFrame(values, index=["STEPH", "ROUPKT"], columns=["SARC", "LIHC", "Avg."])


def swept() -> pd.DataFrame:
    """Three values of a setting: the default in the middle, the last without a mean."""
    return pd.DataFrame(
        {
            "row": ["0", "0.05", "0.1"], "mean": [0.6, 0.7, np.nan], "gain": [-0.1, np.nan, np.nan],
            "low": [-0.2, np.nan, np.nan], "high": [0.0, np.nan, np.nan], "paper_gain": [-0.02, np.nan, -0.04],
        }
    )  # fmt: skip


def controlled(external: bool = True) -> pd.DataFrame:
    """Two comparisons in two places; one has no answer."""
    kinds = ["test folds", "external patients"] if external else ["test folds"]
    rows = [
        {
            "where": where, "rival": rival, "comparison": name, "on": on,
            "difference": value, "low": value - 0.02, "high": value + 0.02,
        }
        for where, (rival, name, value), on in product(
            ["study", "its twin"], [(False, "A − B", 0.05), (True, "B − C", np.nan)], kinds
        )
    ]  # fmt: skip
    return pd.DataFrame(rows)


def started(targets: list[str], seeds: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [{"target": t, "seed": s, "gain": rng.normal(0, 0.05)} for t, s in product(targets, range(seeds))]
    return pd.DataFrame(rows)


def chosen(targets: list[str], columns: int = 3) -> pd.DataFrame:
    names = ["same target, other start", "same start, other target", "what was planted"][:columns]
    return pd.DataFrame(0.3, index=[*targets, "Mean"], columns=names)


FIGURES = {
    "follow_up": lambda: plots.follow_up([cohort("SARC"), cohort("LIHC")]),
    "kaplan_meier": lambda: plots.kaplan_meier([cohort(name) for name in DATASETS[:5]]),
    "kaplan_meier of one": lambda: plots.kaplan_meier([cohort("SARC")]),
    "similarity": lambda: plots.similarity(pd.DataFrame(np.eye(3), index=DATASETS[:3], columns=DATASETS[:3])),
    "c_index": lambda: plots.c_index(c_indices()),
    "c_index, undefined": lambda: plots.c_index(c_indices(undefined=True)),
    "c_index, external": lambda: plots.c_index(c_indices(), value="external_c_index"),
    "intervals": lambda: plots.intervals(differences(), 0.025),
    "gains": lambda: plots.gains({"here": gained(), "paper": gained().iloc[:1, :2]}, "Vanilla"),
    "gains on one data set": lambda: plots.gains({"here": gained().iloc[:, :1]}, "Vanilla"),
    "sweeps": lambda: plots.sweeps({"β": swept(), "K": swept()}),
    "dynamics": lambda: plots.course(course(1), "BRCA"),
    "dynamics of starts": lambda: plots.courses(course(5)),
    "dynamics of one start": lambda: plots.courses(course(1, ["SARC", "LIHC"])),
    "starts": lambda: plots.starts(at_the_end(course())),
    "starts, planted": lambda: plots.starts(at_the_end(course()), pd.Series(0.5, index=DATASETS[1:])),
    "controls": lambda: plots.transfer_controls(controlled(), {"study": "here", "its twin": "twin"}),
    "controls, one place": lambda: plots.transfer_controls(controlled(external=False), {"study": "here"}),
    "starts of all": lambda: plots.starts_of_all(chosen(DATASETS), started(DATASETS)),
    "starts of all, no correlation": lambda: plots.starts_of_all(chosen(DATASETS[:3], 0), started(DATASETS[:3], 1)),
}


def texts(fig) -> str:
    return "\n".join(text.get_text() for text in fig.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_fits_the_page_and_is_opaque(name):
    fig = FIGURES[name]()
    fig.canvas.draw()
    assert fig.get_size_inches()[0] <= plots.WIDTH + 0.01
    assert fig.get_facecolor() == (1, 1, 1, 1)


@pytest.mark.parametrize(("study", "stamped"), [("tiny", True), ("demo_twin", True), ("tcga", False)])
def test_the_stamp_is_on_every_synthetic_figure_and_on_no_other(study, stamped):
    fig = plots.intervals(differences(), 0.025)
    plots.stamp(fig, load_study(study))
    plots.stamp(fig, load_study(study))
    found = [text for text in fig.texts if text.get_gid() == "stamp"]
    assert len(found) == stamped
    if stamped:
        assert "Synthetic demo cohort" in found[0].get_text() and "not TCGA" in found[0].get_text()


def test_show_figure_writes_both_kinds_with_the_stamp_and_the_same_each_time(tmp_path):
    paths = []
    for name in ("a", "b"):
        png = plots.show_figure(plots.intervals(differences(), 0.025), name, parameters())
        assert png == tmp_path / "tiny" / "figures" / f"{name}.png" and png.read_bytes()[:4] == b"\x89PNG"
        paths.append(png.with_suffix(".svg"))
    first, second = (path.read_bytes() for path in paths)
    assert b'id="stamp"' in first
    assert first == second
    assert not plt.get_fignums()
    assert sorted(path.name for path in png.parent.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]


def test_show_table_writes_what_it_shows_unrounded(tmp_path):
    table = pd.DataFrame({"method": ["STEPH <b>"], "mean": [1 / 3], "n": [1234]})
    path = plots.show_table(table, "means", parameters(), index=False)
    read = pd.read_csv(path)
    assert path == tmp_path / "tiny" / "tables" / "means.csv"
    assert read["mean"][0] == pytest.approx(1 / 3, abs=1e-15)
    assert read["cohort"][0] == "synthetic (tiny)"
    assert "cohort" not in pd.read_csv(plots.show_table(table, "means", parameters("tcga"), index=False))


def test_wide_tables_are_one_file_in_blocks_that_fit(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda styler: shown.append(styler.data))
    table = pd.DataFrame([range(14)], index=["STEPH"], columns=[*DATASETS, "Avg."])
    path = plots.show_blocks(table, "wide", parameters("tcga"))
    assert [block.shape[1] for block in shown] == [7, 7]
    assert pd.concat(shown, axis=1).equals(table)
    assert list(pd.read_csv(path).columns[1:]) == list(table.columns)
    plots.show_blocks(table.iloc[:, :7], "narrow", parameters("tcga"))
    assert len(shown) == 3


def test_cells_of_a_map_are_hundredths_and_a_missing_one_is_blank():
    fig = plots.gains({"here": gained()}, "Vanilla")
    assert [text.get_text() for text in fig.axes[0].texts] == ["+10.0", "-20.0", "+0.0", "+1.0", "+2.0"]


def test_a_sweep_is_drawn_around_its_default_and_leaves_out_what_is_undefined():
    ax = plots.sweeps({"β": swept()}).axes[0]
    here, paper = ax.lines[-2].get_ydata(), ax.lines[-1].get_ydata()
    assert here[:2].tolist() == [-0.1, 0] and np.isnan(here[2])
    assert paper.tolist() == [-0.02, 0, -0.04]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.05", "0.1"]


def test_controls_are_drawn_where_they_have_an_answer_and_beside_their_heading():
    fig = plots.transfer_controls(controlled(), {"study": "here", "its twin": "twin"})
    ax = fig.axes[0]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["If it is transfer, beyond the band:", "A − B", "Gains without any source:", "B − C"]
    drawn = {line.get_label(): line.get_xydata() for line in ax.lines if line.get_label() in texts(fig)}
    assert drawn["test folds"] == pytest.approx(np.array([[0.05, 0.85]]))
    assert drawn["external patients"] == pytest.approx(np.array([[0.05, 1.15]]))


def test_the_mean_gain_of_a_start_is_that_over_all_targets():
    gains = started(["SARC", "LIHC"], 1).assign(gain=[0.1, 0.2])
    for values, mean in (([0.1, 0.2], 0.15), ([0.1, np.nan], np.nan)):
        ax = plots.starts_of_all(chosen(["SARC", "LIHC"]), gains.assign(gain=values)).axes[1]
        dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
        assert dots[0].tolist() == pytest.approx([*values, mean], nan_ok=True)


def test_tables_are_shown_rounded_and_escaped():
    table = pd.DataFrame(
        {("method", "x"): ["<b>"], ("mean", "x"): [1 / 3], ("n", "x"): [1234], ("none", "x"): [np.nan]}
    )
    html = plots.styled(table, {"mean": "{:.1f}"}).to_html()
    assert "&lt;b&gt;" in html and ">0.3<" in html and ">1,234<" in html and "nan" not in html


def test_short_brackets_of_a_cell_stay_on_one_line():
    text = "0.6648 (± 0.032) (a remark that is rather long)"
    html = plots.styled(pd.DataFrame({"c": [text]})).to_html()
    assert "0.6648 (±\u00a00.032) (a remark that is rather long)" in html


def test_file_names_tell_the_choice_of_parameters():
    assert plots.file_name("table1", parameters()) == "table1"
    narrowed = parameters(dataset="SARC", folds=[1], seed=7, precision="fp64")
    assert plots.file_name("table1", narrowed) == "table1-SARC-fold1-seed7-fp64"


def test_an_undefined_mean_is_written_where_its_bar_would_be():
    assert "STEPH: undefined (fold 2)" in texts(plots.c_index(c_indices(undefined=True)))


def test_the_papers_means_stand_beside_test_folds_only():
    assert "the paper's mean" in texts(plots.c_index(c_indices()))
    assert "the paper's mean" not in texts(plots.c_index(c_indices(), value="external_c_index"))


def test_at_risk_counts_are_the_patients_still_followed():
    own = cohort("SARC")
    fig = plots.kaplan_meier([own])
    years = own.patients["time_days"] / plots.DAYS_PER_YEAR
    for label in fig.axes[0].get_xticklabels():
        year, at_risk = label.get_text().split("\n")
        assert int(at_risk) == (years >= float(year)).sum()


def test_the_paper_data_sets_look_different_and_always_the_same():
    looks = [(plots.colour_of_dataset(name), str(plots.line_of_dataset(name))) for name in DATASETS]
    assert len(set(looks)) == len(DATASETS)
    assert plots.colour_of_dataset("MY_COHORT") == plots.colour_of_dataset("MY_COHORT")


def test_methods_have_colours_and_those_of_the_first_chapters_differ():
    assert len({plots.colour_of(name) for name in ("vanilla", "model_average", "steph", "hypernetwork_only")}) == 4
    assert all(matplotlib.colors.is_color_like(plots.colour_of(name)) for name in METHODS)


def test_labels_at_line_ends_do_not_overlap_and_move_little():
    _, ax = plt.subplots()
    ax.set_ylim(0, 1)
    ends = pd.Series(dict.fromkeys(DATASETS[:6], 0.0) | {"SARC": 1.0, "CESC": 0.5})
    plots.label_ends(ax, ends, 1.0)
    places = {a.get_text(): a.xyann[1] for a in ax.texts}
    ordered = sorted(places.values())
    assert min(np.diff(ordered)) > 1 / 17 and ordered[0] >= 0 and ordered[-1] <= 1
    assert places["CESC"] == pytest.approx(0.5) and places["SARC"] == pytest.approx(1.0)
