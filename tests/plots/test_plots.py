"""Figures: files come out, look alike, and never hide that a cohort is synthetic."""

import io
from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from steph import plots
from steph.analysis.mixing import attention, sar, vicinal
from steph.analysis.mixing.dynamics import at_the_end
from steph.analysis.mixing.landscape import grid
from steph.data.cohort import cohort_from
from steph.data.manifest import load_study
from steph.methods.registry import METHODS
from steph.plots import display, style
from steph.study.paper import paper_table
from steph.study.runs import Workbench

DATASETS = list(paper_table("table_s1")["dataset"])


@pytest.fixture(autouse=True)
def _style(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    plots.set_style()
    yield
    plt.close("all")


def parameters(study: str = "tiny", **changed: object) -> SimpleNamespace:
    found = load_study(study)
    plain = {"study": found, "dataset": "all", "folds": list(range(found.folds)), "seed": found.seed}
    bench = Workbench(found, precision=str(changed.pop("precision", "auto")))
    return SimpleNamespace(**{**plain, "bench": bench, **changed})


def crossed(**axes: Sequence) -> pd.DataFrame:
    """A row for each combination of values, by column."""
    return pd.DataFrame(list(product(*axes.values())), columns=list(axes))


def cohort(name: str, n: int = 30):
    rng = np.random.default_rng(0)
    patients = {"patient_id": [f"P{i}" for i in range(n)], "slide_id": [f"S{i}" for i in range(n)], "project": name}
    events = {"time_days": rng.integers(30, 3000, n), "event": rng.integers(0, 2, n)}
    return cohort_from(pd.DataFrame({**patients, **events}), name, "test")


def c_indices(undefined: bool = False) -> pd.DataFrame:
    table = crossed(dataset=["SARC", "LIHC"], method=["vanilla", "steph", "hypernetwork_only"], fold=range(3))
    table = table.assign(c_index=0.5 + 0.01 * table["fold"], external_c_index=0.6)
    if undefined:
        table.loc[table.query("dataset == 'SARC' and method == 'steph' and fold == 2").index, "c_index"] = None
    return table


def course(seeds: int = 3, sources: list[str] = DATASETS[1:]) -> pd.DataFrame:
    table = crossed(seed=range(seeds), epoch=range(1, 5), source=sources)
    w, shares = np.random.default_rng(0).random((len(table), 2)).T
    return table.assign(w=w, **{"lambda": shares})


def differences() -> pd.DataFrame:
    return pd.DataFrame(
        {"label": ["a", "b"], "difference": [0.1, 0], "low": [0, -0.1], "high": [0.2, 0.1], "paper": [0.1, np.nan]}
    )


def gained() -> pd.DataFrame:
    values = [[0.1, -0.2, np.nan], [0.0, 0.01, 0.02]]
    return pd.DataFrame(values, index=["STEPH", "ROUPKT"], columns=["SARC", "LIHC", "Avg."])


def swept() -> pd.DataFrame:
    """Three values of a setting: the default in the middle, the last without a mean."""
    rows = [("0", 0.6, -0.1, -0.2, 0.0, -0.02), ("0.05", 0.7, *[np.nan] * 4), ("0.1", *[np.nan] * 4, -0.04)]
    return pd.DataFrame(rows, columns=["row", "mean", "gain", "low", "high", "paper_gain"])


def controlled(external: bool = True) -> pd.DataFrame:
    """Two comparisons in two places; one has no answer."""
    kinds = ["test folds", "external patients"] if external else ["test folds"]
    table = crossed(where=["study", "its twin"], comparison=["A − B", "B − C"], on=kinds)
    value = table["comparison"].map({"A − B": 0.05, "B − C": np.nan})
    return table.assign(rival=table["comparison"] == "B − C", difference=value, low=value - 0.02, high=value + 0.02)


def started(targets: list[str], seeds: int = 3) -> pd.DataFrame:
    table = crossed(target=targets, seed=range(seeds))
    return table.assign(gain=np.random.default_rng(0).normal(0, 0.05, len(table)))


def chosen(targets: list[str], columns: int = 3) -> pd.DataFrame:
    names = ["same target, other start", "same start, other target", "what was planted"][:columns]
    return pd.DataFrame(0.3, index=[*targets, "Mean"], columns=names)


def epoch_rounds() -> pd.DataFrame:
    names = ["vanilla", "model_average", "adamerging", "steph", "steph_m6", "steph_m12"]
    table = crossed(method=names, round=range(3)).assign(once=0.0, device="x")
    return table.assign(seconds=(1 + 0.1 * table["round"]).where(table["method"] != "model_average", 0.0))


def costs() -> pd.DataFrame:
    rows = [("vanilla", 0.6, 20, 1), ("steph", 0.65, 40, 2), ("roupkt", 0.65, 300, 14)]
    table = pd.DataFrame(rows, columns=["method", "c_index", "gflops", "networks"])
    return table.assign(operations=table["gflops"], patches=100, seconds=1.0 * table["networks"], memory=1e6)


def sampled() -> pd.DataFrame:
    rows = [(n, name, 1.2, 1.3) for n in (200, 1000) for name in ("vanilla", "steph", "steph_r256")[: 1 + n // 200]]
    table = pd.DataFrame(rows, columns=["patches", "method", "operations", "ratio"])
    return table.assign(low=0.9 * table["ratio"], high=1.1 * table["ratio"])


def judged(problem: str = "") -> pd.DataFrame:
    """Two methods on two data sets, looked at in every way that the evidence has; the last possibly undefined."""
    numbers = {"auc": 0.6, "skill": -0.1, "low": 0.05, "high": 0.9, "hazard_ratio": 0.5, "p": 0.01, "gain": 0.1}
    table = crossed(dataset=["SARC", "LIHC"], method=["vanilla", "steph"], year=[1, 2]).assign(problem="", **numbers)
    year = table["year"]
    table = table.assign(against=table["method"], predicted=0.2 * year, observed=0.25 * year)
    if problem:
        table.loc[len(table) - 1, [*numbers, "observed", "problem"]] = [*[np.nan] * (len(numbers) + 1), problem]
    return table


def chances() -> pd.DataFrame:
    names = ["CESC (49 events)", "HNSC (121 events)", "GBMLGG (400 events)", "mean of these 13", "mean of 13"]
    return pd.DataFrame(np.linspace(0, 1, 5)[:, None] ** np.arange(1, 6), index=np.linspace(0, 0.15, 5), columns=names)


def last_judged(problem: str = "") -> pd.DataFrame:
    return judged(problem).drop_duplicates(["dataset", "method"], keep="last")


def groups(high: bool | None = None) -> pd.DataFrame:
    patients = cohort("SARC").patients
    split = patients.index % 2 == 0 if high is None else high
    return crossed(dataset=["SARC", "LIHC"], method=["vanilla", "steph"]).merge(patients.assign(high=split), "cross")


def transferred(columns: int = 13) -> pd.DataFrame:
    values = np.random.default_rng(0).random((13, columns))
    return pd.DataFrame(values, index=DATASETS, columns=DATASETS[:columns])


def aligned(sources: list[str]) -> pd.DataFrame:
    """Curves of subspace alignment as `steph.analysis.mixing.sar.curves` gives them, made up."""
    axes = {"source": sources, "layer": sar.LAYERS, "draw": (0, 1), "lambda": (0, 0.5, 1), "rule": sar.RANK_RULES}
    table = crossed(**axes, kind=("source", "rotated", "noise")).query("kind != 'source' or draw == 0")
    noise = 0.1 * np.random.default_rng(0).random(len(table))
    return table.assign(target="BRCA", sar=0.5 + 0.4 * table["lambda"] + noise, rank=4, rows=16)


def spectra(models: list[str]) -> pd.DataFrame:
    table = crossed(model=models, layer=sar.LAYERS, direction=range(1, 9))
    value = 0.5 ** (table["direction"] - 1)
    return table.assign(value=value, kept=1 - 0.3 * value, rows=8)


def mixed_training() -> pd.DataFrame:
    """Comparisons as `steph.analysis.mixing.vicinal.compare` gives them, made up."""
    axes = {"seed": range(3), "steps": (1, 10, 100), "lambda": (0.25, 0.5)}
    table = crossed(**axes, reference=(vicinal.LOSSES, vicinal.FEATURES), candidate=vicinal.CANDIDATES)
    table = table.assign(nll_reference=0.7, c_index=0.6, c_index_reference=0.6)
    cosine = 1 - 0.01 * table["seed"] - 0.001 * table["steps"]
    return vicinal.summary(table.assign(cosine=cosine, distance=0.01 * table["steps"], nll=1 / table["steps"]))


def inequalities() -> pd.DataFrame:
    statements = (vicinal.CONVEX, vicinal.EQ_9, vicinal.EQ_10)
    return crossed(place=["M_0", "random logits"], statement=statements).assign(holds=0.6)[:-1]


def attended(n: int = 6) -> pd.DataFrame:
    """Attention of n patients of two data sets, measured against known tissue."""
    rng = np.random.default_rng(0)
    patches = pd.DataFrame({"tumour": np.arange(20) < 8, "zone": np.repeat(list(attention.ZONES), [3, 5, 5, 7])})
    methods = ["vanilla", "steph", "model_average", "untrained"]
    parts = [
        attention.numbers({m: rng.dirichlet(np.ones(20)) for m in methods}, patches).assign(
            dataset=DATASETS[i % 2], fold=0, patient_id=f"P{i}"
        )
        for i in range(n)
    ]
    return pd.concat(parts, ignore_index=True)


def attention_map(n: int, tumour: bool = False) -> pd.DataFrame:
    """A patient's two maps: n patches on each of two slides."""
    rng, patch = np.random.default_rng(0), np.tile(np.arange(n), 2)
    slides = pd.Categorical(np.repeat(["S1", "S2"], n))
    places = {"patient_id": "P", "slide_id": slides, "patch": patch, "x": patch % 40 * 256, "y": patch // 40 * 256}

    def drawn() -> pd.DataFrame:
        values = {"attention": rng.dirichlet(np.ones(2 * n)), "rank": 1 + rng.permutation(2 * n)}
        return pd.DataFrame({**places, **values, "percentile": rng.random(2 * n)})

    table = attention.beside({name: drawn() for name in NAMES})
    return table.assign(tumour=table["patch"] < n // 3) if tumour else table


def plane(best_s: float = 0.3, best_t: float = 0.6) -> pd.DataFrame:
    """A landscape of a pair with its least loss at one point, on training patients at M_t."""
    table = pd.DataFrame(grid(), columns=["c_s", "c_t"])
    for which, s, t in (("train", 0, 1), ("test", best_s, best_t), ("external", 0.2, 0.8)):
        table[f"loss_{which}"] = 1 + (table["c_s"] - s) ** 2 + (table["c_t"] - t) ** 2
    return table


def paths(seeds: int = 1, sources: Sequence[str] = ("SARC",), reach: float = 0.9) -> pd.DataFrame:
    table = crossed(source=sources, seed=range(seeds), epoch=range(1, 5))
    return table.assign(c_s=reach * table["epoch"] / 4, c_t=reach * table["epoch"] / 8)


NAMES = {"vanilla": "Vanilla", "steph": "STEPH"}

FIGURES = {
    "landscape of a pair": lambda: plots.loss_planes({"SARC": plane()}, "BRCA", ("loss_train", "loss_test")),
    "landscapes of one pair": lambda: plots.loss_planes({"SARC": plane()}, "BRCA"),
    "landscapes of pairs": lambda: plots.loss_planes(dict.fromkeys(DATASETS[1:6], plane()), "BRCA"),
    "trajectories": lambda: plots.trajectories(
        paths(1, DATASETS[1:4], reach=1.5), dict.fromkeys(DATASETS, plane()), "BRCA"
    ),
    "trajectories of starts": lambda: plots.trajectories(paths(5), {"SARC": plane()}, "BRCA"),
    "trajectory of one": lambda: plots.trajectories(paths(), {"SARC": plane()}, "BRCA"),
    "alignment": lambda: plots.alignment(aligned(DATASETS[1:6])),
    "alignment of one pair, gates": lambda: plots.alignment(aligned(["SARC"]), tuple(sar.LAYERS)[2:]),
    "alignment of two pairs": lambda: plots.alignment(aligned(["SARC", "LIHC"])),
    "against rotated": lambda: plots.against_rotated(sar.reading(aligned(DATASETS[1:]))),
    "dominant directions": lambda: plots.dominant_directions(spectra(DATASETS[:7])),
    "nearness": lambda: plots.nearness(mixed_training()),
    "nearness, distance": lambda: plots.nearness(mixed_training(), "distance"),
    "tested mixtures": lambda: plots.tested_mixtures(mixed_training()),
    "tested mixtures, C-index": lambda: plots.tested_mixtures(mixed_training(), c_index=True),
    "convexity": lambda: plots.convexity(inequalities()),
    "follow_up": lambda: plots.follow_up([cohort("SARC"), cohort("LIHC")]),
    "kaplan_meier": lambda: plots.kaplan_meier([cohort(name) for name in DATASETS[:5]]),
    "kaplan_meier of one": lambda: plots.kaplan_meier([cohort("SARC")]),
    "similarity": lambda: plots.similarity(pd.DataFrame(np.eye(3), index=DATASETS[:3], columns=DATASETS[:3])),
    "c_index": lambda: plots.c_index(c_indices()),
    "c_index, undefined": lambda: plots.c_index(c_indices(undefined=True)),
    "c_index, external": lambda: plots.c_index(c_indices(), value="external_c_index"),
    "intervals": lambda: plots.intervals(differences()),
    "gains": lambda: plots.gains({"here": gained(), "paper": gained().iloc[:1, :2]}, "Vanilla"),
    "gains on one data set": lambda: plots.gains({"here": gained().iloc[:, :1]}, "Vanilla"),
    "sweeps": lambda: plots.sweeps({"β": swept(), "K": swept()}),
    "dynamics": lambda: plots.course(course(1), "BRCA"),
    "dynamics of starts": lambda: plots.courses(course(5)),
    "dynamics of one start": lambda: plots.courses(course(1, ["SARC", "LIHC"])),
    "attention maps": lambda: plots.attention_maps([attention_map(60, tumour=True)], ["P, risk 1 of 9"], NAMES, 256),
    "attention maps of real slides": lambda: plots.attention_maps(
        [attention_map(900), attention_map(1)], ["P", "P"], NAMES, 256
    ),
    "attention agreement": lambda: plots.attention_agreement(attended()),
    "attention on the tumour": lambda: plots.attention_on_tumour(attended()),
    "attention on the tumour of one patient": lambda: plots.attention_on_tumour(attended(1)),
    "attention by data set": lambda: plots.attention_by_dataset(attended()),
    "starts": lambda: plots.starts(at_the_end(course())),
    "performance and cost": lambda: plots.performance_and_cost(costs(), costs().iloc[:2], "here"),
    "epochs": lambda: plots.epochs(epoch_rounds()),
    "epochs by sources": lambda: plots.epochs_by_sources(epoch_rounds()),
    "predictions": lambda: plots.predictions(costs(), costs()),
    "sampling": lambda: plots.sampling(sampled()),
    "starts, planted": lambda: plots.starts(at_the_end(course()), pd.Series(0.5, index=DATASETS[1:])),
    "controls": lambda: plots.transfer_controls(controlled(), {"study": "here", "its twin": "twin"}),
    "controls, one place": lambda: plots.transfer_controls(controlled(external=False), {"study": "here"}),
    "starts of all": lambda: plots.starts_of_all(chosen(DATASETS), started(DATASETS)),
    "starts of all, no correlation": lambda: plots.starts_of_all(chosen(DATASETS[:3], 0), started(DATASETS[:3], 1)),
    "gains by data set": lambda: plots.gains_by_dataset(last_judged(), last_judged(), "steph"),
    "power": lambda: plots.power(chances(), [0.034, 0.005], 0.8),
    "AUC by year": lambda: plots.auc_by_year(judged("no pair")),
    "accuracy": lambda: plots.accuracy(last_judged("no pair")),
    "calibration": lambda: plots.calibration(judged("nobody")),
    "calibration on one data set": lambda: plots.calibration(judged().query("dataset == 'SARC'")),
    "risk groups": lambda: plots.risk_groups(groups(), last_judged(), ["SARC", "LIHC"]),
    "risk groups, one empty": lambda: plots.risk_groups(groups(high=True), last_judged("no event"), ["SARC", "LIHC"]),
    "hazard ratios": lambda: plots.hazard_ratios(last_judged("no event")),
    "transferability": lambda: plots.transferability(transferred(), transferred()),
    "transferability to one": lambda: plots.transferability(transferred(1), transferred()),
}


WORDS = {
    "c_index": "the paper's mean",
    "power": "+.034",
    "c_index, undefined": "STEPH: undefined (fold 2)",
    "hazard ratios": "STEPH: undefined",
    "risk groups": "HR 0.50 (0.05 to 0.90)",
    "risk groups, one empty": "no event",
    "trajectories of starts": "SARC, start 1",
    "trajectory of one": "SARC → BRCA",
}
"""What figures say."""


def texts(fig) -> str:
    return "\n".join(text.get_text() for text in fig.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_fits_the_page_is_opaque_and_says_what_it_must(name):
    fig = FIGURES[name]()
    fig.canvas.draw()
    assert fig.get_size_inches()[0] <= style.WIDTH + 0.01
    assert fig.get_facecolor() == (1, 1, 1, 1)
    assert WORDS.get(name, "") in texts(fig)


@pytest.mark.parametrize(("study", "stamped"), [("tiny", True), ("demo_twin", True), ("tcga", False)])
def test_the_stamp_is_on_every_synthetic_figure_and_on_no_other(study, stamped):
    fig = plots.intervals(differences())
    style.stamp(fig, load_study(study))
    style.stamp(fig, load_study(study))
    found = [text for text in fig.texts if text.get_gid() == "stamp"]
    assert [text.get_text() for text in found] == [f"Synthetic demo cohort ({study}) – not TCGA"] * stamped


def test_show_figure_writes_both_kinds_with_the_stamp_and_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        png = plots.show_figure(plots.intervals(differences()), name, parameters())
        assert png == tmp_path / "tiny" / "figures" / f"{name}.png" and png.read_bytes()[:4] == b"\x89PNG"
    first, second = (path.read_bytes() for path in sorted(png.parent.glob("*.svg")))
    assert b'id="stamp"' in first and first == second
    assert not plt.get_fignums() and len(list(png.parent.iterdir())) == 4


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
    keep = lambda given, raw=False: None if raw else shown.append(given.data)  # noqa: E731 - raw: the link to the file
    monkeypatch.setattr("IPython.display.display", keep)
    table = pd.DataFrame([range(14)], index=["STEPH"], columns=[*DATASETS, "Avg."])
    path = plots.show_blocks(table, "wide", parameters("tcga"))
    assert [block.shape[1] for block in shown] == [7, 7]
    assert pd.concat(shown, axis=1).equals(table)
    assert list(pd.read_csv(path).columns[1:]) == list(table.columns)
    plots.show_blocks(table.iloc[:, :7], "narrow", parameters("tcga"))
    assert len(shown) == 3


def test_cells_of_a_map_are_hundredths_and_a_missing_one_is_blank():
    cells = [text.get_text() for text in FIGURES["gains"]().axes[0].texts]
    assert cells == ["+10.0", "-20.0", "", "+0.0", "+1.0", "+2.0"]


def test_one_outlier_does_not_wash_out_a_map_of_gains_and_all_maps_mean_the_same():
    table = pd.DataFrame(0.01, index=["A", "B"], columns=DATASETS)
    table.iloc[0, 0] = 0.47
    assert plots.gains({"here": table}, "Vanilla").axes[0].images[0].get_clim() == pytest.approx((-0.04, 0.04))
    for name in ("gains", "similarity", "starts of all", "transferability", "convexity"):
        maps = [image.get_cmap().name for ax in FIGURES[name]().axes for image in ax.images]
        assert set(maps) == {style.DIVERGING}, name


def test_a_sweep_is_drawn_around_its_default_and_leaves_out_what_is_undefined():
    ax = FIGURES["sweeps"]().axes[0]
    here, paper = ax.lines[-2].get_ydata(), ax.lines[-1].get_ydata()
    assert here[:2].tolist() == [-0.1, 0] and np.isnan(here[2])
    assert paper.tolist() == [-0.02, 0, -0.04]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.05", "0.1"]


def test_controls_are_drawn_where_they_have_an_answer_and_beside_their_heading():
    ax = FIGURES["controls"]().axes[0]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["Must be above 0 if it is transfer:", "A − B", "Rivals, better where below 0:", "B − C"]
    drawn = {line.get_label(): pd.DataFrame(line.get_xydata()).dropna() for line in ax.lines}
    for patients, height in (("test folds", 0.85), ("external patients", 1.15)):
        assert drawn[patients].to_numpy() == pytest.approx(np.array([[0.05, height]]))


def test_the_mean_gain_of_a_start_is_that_over_all_targets():
    gains = started(["SARC", "LIHC"], 1).assign(gain=[0.1, 0.2])
    for values, mean in (([0.1, 0.2], 0.15), ([0.1, np.nan], np.nan)):
        ax = plots.starts_of_all(chosen(["SARC", "LIHC"]), gains.assign(gain=values)).axes[1]
        dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
        assert dots[0].tolist() == pytest.approx([*values, mean], nan_ok=True)


def test_tables_are_shown_rounded_and_escaped_and_short_brackets_stay_on_one_line():
    cells = {"method": "<b>", "mean": 1 / 3, "n": 1234, "none": np.nan, "text": "0.66 (± 0.03) (a remark that is long)"}
    table = pd.DataFrame({(name, "x"): [cell] for name, cell in cells.items()})
    html = display.styled(table, {"mean": "{:.1f}"}).to_html()
    assert "&lt;b&gt;" in html and ">0.3<" in html and ">1,234<" in html and "nan" not in html
    assert "0.66 (±\u00a00.03) (a remark that is long)" in html


def test_file_names_tell_the_choice_of_parameters():
    assert display.file_name("table1", parameters()) == "table1"
    narrowed = parameters(dataset="SARC", folds=[1], seed=7, precision="fp64")
    assert display.file_name("table1", narrowed) == "table1-SARC-fold1-seed7-fp64"


def test_the_papers_means_stand_beside_test_folds_only():
    assert "the paper's mean" not in texts(FIGURES["c_index, external"]())


def test_groups_of_risk_have_their_patients_at_risk_written():
    own = groups().query("dataset == 'SARC' and method == 'steph'")
    counts = [t.get_text() for t in FIGURES["risk groups"]().axes[1].texts if t.get_text().isdigit()]
    assert counts[0] == str((~own["high"]).sum()) and counts[len(counts) // 2] == str(own["high"].sum())


def test_a_map_of_transfer_frames_the_own_models_only():
    frames = [patch for ax in FIGURES["transferability to one"]().axes[:2] for patch in ax.patches]
    assert [patch.get_xy() for patch in frames] == [(-0.5, -0.5)] * 2


def test_at_risk_counts_are_the_patients_still_followed():
    own = cohort("SARC")
    fig = plots.kaplan_meier([own])
    years = own.patients["time_days"] / style.DAYS_PER_YEAR
    for label in fig.axes[0].get_xticklabels():
        year, at_risk = label.get_text().split("\n")
        assert int(at_risk) == (years >= float(year)).sum()


def test_the_paper_s_data_sets_and_the_methods_of_the_first_chapters_look_different():
    assert len({str(style.line_of_dataset(name)) for name in DATASETS}) == len(DATASETS)
    assert len({style.colour_of(name) for name in ("vanilla", "model_average", "steph", "hypernetwork_only")}) == 4
    assert all(matplotlib.colors.is_color_like(style.colour_of(name)) for name in METHODS)


def test_labels_at_line_ends_do_not_overlap_and_move_little():
    _, ax = plt.subplots()
    ax.set_ylim(0, 1)
    ends = pd.Series(dict.fromkeys(DATASETS[:6], 0.0) | {"SARC": 1.0, "CESC": 0.5})
    style.label_ends(ax, ends, 1.0, 16)
    places = {a.get_text(): a.xyann[1] for a in ax.texts}
    ordered = sorted(places.values())
    assert min(np.diff(ordered)) > 1 / 17 and ordered[0] >= 0 and ordered[-1] <= 1
    assert places["CESC"] == pytest.approx(0.5) and places["SARC"] == pytest.approx(1.0)


def test_red_arrows_stand_where_mixtures_have_less_loss_than_the_target_and_nowhere_else():
    axes = plots.loss_planes({"SARC": plane()}, "BRCA", ("loss_train", "loss_test")).axes
    arrows = [[text for text in ax.texts if text.arrow_patch is not None] for ax in axes[:2]]
    assert not arrows[0]  # training patients want M_t
    ends = [arrow.xy for arrow in arrows[1]]
    assert len(ends) == 2 and all(sum(end) == pytest.approx(1) for end in ends)
    # Below M_t for lambda from 0.3 on, of (C_s, C_t) = (1 - lambda, lambda); at 0.32 and 0.96 on the grid.
    assert sorted(end[1] for end in ends) == pytest.approx([0.32, 0.96])


def test_a_trajectory_that_leaves_the_landscape_is_shown_whole():
    assert FIGURES["trajectories"]().axes[0].get_xlim()[1] > 1.5


@pytest.mark.parametrize("name", ["$\\frac$", "$x$", "$", "a_b^c $"])
def test_a_patient_s_name_is_no_formula(name):
    figure = plots.attention_maps([attention_map(9)], [name], NAMES, 256)
    figure.savefig(io.BytesIO())
    assert name.replace("$", r"\$") in figure.axes[0].get_title(loc="left")


def test_a_link_is_quoted(tmp_path, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("IPython.display.display", lambda data, raw: written.write(data["text/html"]))
    plots.show_link(tmp_path / 'a"><script>.csv')
    assert "<script>" not in written.getvalue() and written.getvalue().count('"') == 4
