"""What a model says of one patient, as files: a report to read, numbers to use, a map to open in QuPath.

    report.html          one file that needs nothing else, not even a network
    prediction.json      risk, percentile, survival, w and lambda
    attention.csv        a row per patch
    <slide>.geojson      its patches as squares in level-0 pixels, coloured by attention

Everything that comes from a file or a person is text in the report, never markup.
"""

import base64
import json
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import PercentFormatter
from pandas import DataFrame

from steph.deploy.predict import Prediction, sources_in_use
from steph.files.atomic import atomic_folder
from steph.files.records import write_json
from steph.files.templates import render

RESEARCH = "Research only. Not a medical device: no decision about a patient may rest on it."
SYNTHETIC = "Synthetic: this model was trained on made-up patients. It says nothing about cancer or about anybody."
CLASSES = (
    (0.9, 0.95, "Attention: top 10 %"),
    (0.75, 0.825, "Attention: next 15 %"),
    (0.5, 0.625, "Attention: upper half"),
    (0.0, 0.25, "Attention: lower half"),
)
"""Classes of patches in QuPath: the percentile of their slide that they begin at, that whose colour they have, name."""
COLOURS = {"muted": "#5b6472", "line": "#d7dce2", "patient": "#0072b2", "cohort": "#8a5a00"}
"""What figures are drawn in, by the names of the page's CSS variables."""
LARGEST_MAP = 1500  # pixels along a side of a map; where patches lie further apart, several share one
YEAR = 365  # days of the years that the report counts in: those of the networks' intervals


def write_report(prediction: Prediction, out: Path) -> None:
    """Write all files to the new folder `out`, whole or not at all. Raises `Refused` where `out` is taken."""
    with atomic_folder(out) as folder:
        write_json(folder / "prediction.json", as_data(prediction))
        (folder / "report.html").write_text(html_report(prediction), encoding="utf-8")
        if prediction.attention is None:
            return
        prediction.patches.to_csv(folder / "attention.csv", index=False)
        for slide, patches in prediction.patches.groupby("slide_id", observed=True):
            if patches["x"].notna().all():
                squares = geojson(patches, prediction.edges[str(slide)], len(prediction.patches))
                (folder / f"{slide}.geojson").write_text(json.dumps(squares, ensure_ascii=False), encoding="utf-8")


def summary(prediction: Prediction) -> str:
    """A prediction in a few lines of text."""
    p, c = prediction, prediction.model.config
    curve = ", ".join(f"{end:g}: {probability:.1%}" for end, probability in p.followed.items())
    lines = [
        f"{p.patient_id}: {len(p.files)} slide(s), {len(p.patches):,} patches, {c.name}",
        f"risk {p.risk:.4f} (higher is worse), above {p.percentile:.0f} % of {c.training.patients:,} training patients",
        f"survival by {c.endpoint.unit}: {curve}",
    ]
    if p.mixture is not None:
        rows = sources_in_use(p.mixture)[["source", "w", "lambda"]].to_numpy()
        used = [f"{source} (w {w:.3f}, λ {lam:.2f})" for source, w, lam in rows]
        lines.append(f"in use: {', '.join(used) or 'no source: the encoder is M₀, untrained'}")
    return "\n".join([*lines, *p.notes, *_limits(p)])


def as_data(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain data."""
    p, c = prediction, prediction.model.config
    return {
        "patient_id": p.patient_id,
        "risk": p.risk,
        "percentile": p.percentile,
        "unit": c.endpoint.unit,
        "survival": [{"end": end, "probability": float(probability)} for end, probability in p.survival.items()],
        "mixture": None if p.mixture is None else json.loads(p.mixture.to_json(orient="records")),
        "slides": p.files,
        "patches": len(p.patches),
        "notes": [*_limits(p), *p.notes],
        "model": {"name": c.name, "run": c.run, "synthetic": c.synthetic, "files": c.files},
        "device": p.model.compute.device,
        "precision": p.model.compute.precision,
    }


def _limits(prediction: Prediction) -> list[str]:
    """What nobody may overlook."""
    config = prediction.model.config
    return [*([SYNTHETIC] if config.synthetic else []), *config.warnings, RESEARCH]


def geojson(patches: DataFrame, edge: int, n: int) -> dict[str, Any]:
    """A slide's patches as GeoJSON that QuPath opens: a detection per patch, a square of `edge` level-0 pixels, with
    its class, colour and measurements. n: patches of the whole bag, for attention over an even share."""
    rgb = colours(np.array([middle for _, middle, _ in CLASSES]))[:, :3].tolist()
    classes = [(start, {"name": name, "color": c}) for (start, _, name), c in zip(CLASSES, rgb, strict=True)]
    features = []
    for patch in patches.to_dict("records"):
        left, top = patch["x"], patch["y"]
        right, bottom = left + edge, top + edge
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        properties = {
            "objectType": "detection",
            "classification": next(kind for start, kind in classes if patch["percentile"] >= start),
            "measurements": {
                "Attention": patch["attention"],
                "Attention, times an even share": patch["attention"] * n,
                "Attention percentile in the slide": 100 * patch["percentile"],
                "Attention rank in the patient": patch["rank"],
            },
        }
        shape = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": shape, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def html_report(prediction: Prediction) -> str:
    """The report, one HTML page with everything in it."""
    p = prediction
    return render(
        "steph.deploy",
        "report.html",
        p=p,
        c=p.model.config,
        synthetic=SYNTHETIC,
        research=RESEARCH,
        year=YEAR,
        risk_strip=risk_strip(p),
        survival_curve=survival_curve(p),
        in_use=None if p.mixture is None else sources_in_use(p.mixture)["source"].tolist(),
        maps=[] if p.attention is None else _maps(p),
        ramp=[f"rgb{tuple(colour)}" for colour in colours(np.linspace(0, 1, 9))[:, :3].tolist()],
        top_patches=p.patches.sort_values("rank").head(5),
        slides=[Path(file).name for file in p.files],
    )


def _maps(prediction: Prediction) -> list[dict[str, Any]]:
    """The slides' maps for the page; without a picture where a slide has no coordinates."""
    maps: list[dict[str, Any]] = []
    for slide, patches in prediction.patches.groupby("slide_id", observed=True):
        maps.append({"slide": slide, "png": None, "patches": len(patches), "edge": prediction.edges[str(slide)]})
        if patches["x"].notna().all():
            image, (rows, columns) = attention_png(patches, maps[-1]["edge"])
            maps[-1] |= {"png": base64.b64encode(image).decode(), "rows": rows, "columns": columns}
    return maps


def colours(values: np.ndarray) -> np.ndarray:
    """Colours (..., 4) of 8 bits for values from 0 to 1, dark to light."""
    return mpl.colormaps["viridis"](values, bytes=True)


def risk_strip(prediction: Prediction) -> str:
    """The patient's risk among those of the training patients, a thin line each."""
    ax = Figure(figsize=(6, 0.75), layout="constrained").subplots()
    risks, risk = prediction.model.config.training.risks, prediction.risk
    ax.vlines(risks, 0.3, 0.7, color=COLOURS["muted"], linewidth=0.8, alpha=0.6)
    ax.vlines(risk, 0.15, 0.85, color=COLOURS["patient"], linewidth=2.5)
    side = "left" if 2 * risk < min(*risks, risk) + max(*risks, risk) else "right"
    ax.text(risk, 0.95, f"this patient, {risk:.3f}", color=COLOURS["patient"], ha=side)
    ax.text(0, 0, "lower risk", color=COLOURS["muted"], transform=ax.transAxes, ha="left")
    ax.text(1, 0, "higher risk", color=COLOURS["muted"], transform=ax.transAxes, ha="right")
    ax.set(ylim=(-0.4, 1.2))
    ax.set_axis_off()
    return _svg(ax)


def survival_curve(prediction: Prediction) -> str:
    """The patient's survival curve, as far as somebody was followed, and the training cohort's."""
    ax, config = Figure(figsize=(6, 3), layout="constrained").subplots(), prediction.model.config
    predicted, observed = [1.0, *prediction.followed], [1.0, *config.training.observed]
    years = np.array([0.0, *prediction.followed.index]) / YEAR
    ax.plot(years, predicted, "o-", color=COLOURS["patient"], linewidth=2, markersize=4, clip_on=False, zorder=3)
    ax.plot(years[: len(observed)], observed[: len(years)], "--", color=COLOURS["cohort"], linewidth=1.4)
    names = ["this patient, predicted", "training cohort, observed (Kaplan-Meier)"]
    ax.legend(names, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, labelcolor="linecolor", labelspacing=0.2)
    ax.set(xlim=(0, years[-1]), ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.set_xlabel(f"years of {YEAR} {config.endpoint.unit} from the start of follow-up", color=COLOURS["muted"])
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    ax.tick_params(length=0, labelcolor=COLOURS["muted"])
    ax.spines[:].set_visible(False)
    return _svg(ax)


def attention_png(patches: DataFrame, edge: int) -> tuple[bytes, tuple[int, int]]:
    """A slide's attention as a PNG, a pixel per patch, and its rows and columns; empty where no patch lies.
    edge: of a patch, in the level-0 pixels of x and y."""
    corner = patches[["x", "y"]].to_numpy(np.int64)
    corner = corner - corner.min(axis=0)
    step = max(edge, int(corner.max()) // LARGEST_MAP + 1)
    columns, rows = corner.max(axis=0) // step + 1
    pixels = np.zeros((rows, columns, 4), np.uint8)
    percentile = patches["percentile"].to_numpy(float)
    order = np.argsort(percentile, kind="stable")  # of two in a pixel, the higher is seen
    column, row = (corner[order] // step).T
    pixels[row, column] = colours(percentile[order])
    file = BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue(), (int(rows), int(columns))


def _svg(ax: Axes) -> str:
    """A figure as an SVG element, text as text, in the page's colours."""
    file = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none"}):
        ax.get_figure().savefig(file, format="svg", transparent=True, metadata=nothing)  # type: ignore[union-attr]
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
