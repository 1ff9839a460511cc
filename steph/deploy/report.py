"""What a model says of one patient, as files: a report to read, numbers to use, a map to open in QuPath.

    report.html          one file that needs nothing else, not even a network
    prediction.json      risk, percentile, survival, w and lambda
    attention.csv        a row per patch
    <slide>.geojson      its patches as squares in level-0 pixels, coloured by attention

Everything that comes from a file or a person is text in the report, never markup.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steph.deploy.model_folder import Config, Score
from steph.deploy.predict import Model, Prediction
from steph.files.atomic import new_folder

RESEARCH = "Research only. Not a medical device: no decision about a patient may rest on it."
SYNTHETIC = "Synthetic: this model was trained on made-up patients. It says nothing about cancer or about anybody."
YEAR = 365
"""Days of the years that the report counts in: those of the networks' intervals."""

VIRIDIS = np.array(
    [(68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142),
     (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37)]
)  # fmt: skip
CLASSES = [(0.9, "Attention: top 10 %"), (0.75, "Attention: next 15 %"), (0.5, "Attention: upper half"),
           (0.0, "Attention: lower half")]  # fmt: skip
"""Classes of patches in QuPath: from which percentile of their slide on, and their name."""
LARGEST_MAP = 1500  # cells along a side of a map


def write_report(found: Prediction, model: Model, out: Path) -> None:
    """Write all files to the new folder `out`, whole or not at all. Raises `Refused` where `out` is taken."""
    with new_folder(out) as folder:
        text = json.dumps(as_data(found, model), indent=1, ensure_ascii=False)
        (folder / "prediction.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.html").write_text(html_report(found, model), encoding="utf-8")
        if found.attention is not None:
            found.patches.to_csv(folder / "attention.csv", index=False)
            for slide, patches in mapped(found):
                collection = json.dumps(geojson(patches, found.edges[slide], len(found.patches)), ensure_ascii=False)
                (folder / f"{slide}.geojson").write_text(collection, encoding="utf-8")


def summary(found: Prediction, model: Model) -> str:
    """A prediction in a few lines of text."""
    c, n = model.config, len(model.config.training.risks)
    lines = [
        f"{found.patient_id}: {len(found.files)} slide(s), {len(found.patches):,} patches, {c.name}",
        f"risk {found.risk:.4f} (higher is worse), above {found.percentile:.0f} % of {n:,} training patients",
    ]
    shown = found.survival.iloc[: len(c.training.observed) + 1]
    curve = ", ".join(f"{end:g}: {p:.1%}" for end, p in shown.items())
    lines.append(f"survival by {found.unit}: {curve}")
    if found.mixture is not None:
        used = found.mixture.iloc[1:][lambda t: t["kept"] & (t["w"] > 0)]
        said = ", ".join(f"{s} (w {w:.3f}, λ {lam:.2f})" for s, w, lam in used[["source", "w", "lambda"]].to_numpy())
        lines.append(f"in use: {said or 'no source'}")
    return "\n".join([*lines, *found.notes, *([SYNTHETIC] if c.synthetic else []), RESEARCH])


def as_data(found: Prediction, model: Model) -> dict[str, Any]:
    """A prediction as plain data."""
    c = model.config
    return {
        "patient_id": found.patient_id,
        "risk": found.risk,
        "percentile": found.percentile,
        "unit": found.unit,
        "survival": [{"end": end, "probability": float(p)} for end, p in found.survival.items()],
        "mixture": None if found.mixture is None else json.loads(found.mixture.to_json(orient="records")),
        "slides": found.files,
        "patches": len(found.patches),
        "notes": [*([SYNTHETIC] if c.synthetic else []), RESEARCH, *found.notes],
        "model": {"name": c.name, "run": c.run, "synthetic": c.synthetic, "files": c.files},
        "device": model.device,
        "precision": model.precision,
    }


def mapped(found: Prediction) -> list[tuple[str, pd.DataFrame]]:
    """The slides whose attention can be drawn, each with its patches."""
    slides = found.patches.groupby("slide_id", observed=True)
    return [(str(name), own) for name, own in slides if not own[["x", "attention"]].isna().any(axis=None)]


# ------------------------------------------------------------------------------------------------ QuPath


def geojson(patches: pd.DataFrame, edge: int, n: int) -> dict[str, Any]:
    """A slide's patches as GeoJSON that QuPath opens: a detection per patch, a square of `edge` level-0 pixels, with
    its class, colour and measurements. n: patches of the whole bag, for attention over an even share."""
    columns = (patches[name].tolist() for name in ("x", "y", "attention", "rank", "percentile"))
    classes = _classes()
    features = []
    for left, top, attention, rank, percentile in zip(*columns, strict=True):
        right, bottom = left + edge, top + edge
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        properties = {
            "objectType": "detection",
            "classification": next(kind for start, kind in classes if percentile >= start),
            "measurements": {
                "Attention": attention,
                "Attention, times an even share": attention * n,
                "Attention percentile in the slide": 100 * percentile,
                "Attention rank in the patient": rank,
            },
        }
        shape = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": shape, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def _classes() -> list[tuple[float, dict[str, Any]]]:
    """`CLASSES` with the colour of the middle of each."""
    starts = np.array([start for start, _ in CLASSES])
    middle = colours((starts + np.array([1.0, *starts[:-1]])) / 2).tolist()
    return [(start, {"name": n, "color": colour}) for (start, n), colour in zip(CLASSES, middle, strict=True)]


def colours(values: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of values from 0 to 1, dark to light."""
    places = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(values, places, VIRIDIS[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------ the report


def html_report(found: Prediction, model: Model) -> str:
    """The report, one HTML page with everything in it."""
    c = model.config
    parts = [
        _header(found, c),
        _risk(found, c),
        _survival(found, c),
        _merged(found, c) if found.mixture is not None else "",
        _attention(found),
        _provenance(found, model),
    ]
    title = escape(f"{found.patient_id}: {c.title} for {c.dataset}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f'img-src data:">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n' + "\n".join(filter(None, parts)) + "\n"
        "</main>\n</body>\n</html>\n"
    )


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2937; --muted: #5b6472; --line: #d7dce2; --soft: #f4f6f8;
  --patient: #0072b2; --cohort: #8a5a00; --alarm: #b4232a; --alarm-soft: #fdecec; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6e9ed; --muted: #a3adb9; --line: #38414c;
  --soft: #1d232a; --patient: #6cc0f0; --cohort: #e6a94e; --alarm: #ff8f8f; --alarm-soft: #3a1d20; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; } .muted { color: var(--muted); font-size: .9rem; }
.stamp { border: 1px solid var(--alarm); background: var(--alarm-soft); color: var(--alarm); font-weight: 600;
  padding: .5rem .8rem; border-radius: .4rem; }
.limits { background: var(--soft); padding: .5rem .8rem; border-radius: .4rem; margin-top: .5rem; }
.large { font-size: 2.2rem; font-weight: 600; line-height: 1.1; color: var(--patient); }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
th { text-align: right; font-weight: 600; color: var(--muted); vertical-align: bottom; }
td { text-align: right; white-space: nowrap; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.off td { color: var(--muted); }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; margin: .5rem 0; }
svg text { fill: var(--muted); font: 14px system-ui, sans-serif; } svg .patient { fill: var(--patient); }
svg .cohort { fill: var(--cohort); }
.axis { stroke: var(--line); fill: none; } .curve { stroke: var(--patient); fill: none; stroke-width: 2.5; }
.observed { stroke: var(--cohort); fill: none; stroke-width: 1.6; stroke-dasharray: 6 3; }
.one { stroke: var(--muted); stroke-opacity: .55; } .here { stroke: var(--patient); stroke-width: 3; }
.map { image-rendering: pixelated; width: 100%; height: auto; background: var(--soft); border-radius: .3rem; }
.ramp { height: .6rem; width: 12rem; border-radius: .2rem; display: inline-block; vertical-align: middle; }
.bar { background: var(--patient); height: .7rem; border-radius: .15rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def _header(found: Prediction, c: Config) -> str:
    stamp = f'<p class="stamp">{escape(SYNTHETIC)}</p>\n' if c.synthetic else ""
    slides, n = len(found.files), len(found.patches)
    return (
        f'{stamp}<p class="limits">{escape(RESEARCH)}</p>\n<h1>{escape(found.patient_id)}</h1>\n'
        f'<p class="muted">{escape(c.name)}; {slides} slide{"s" * (slides > 1)}, {n:,} patches. '
        f"Endpoint: {escape(c.endpoint.name)}, {escape(c.endpoint.description)}.</p>"
    )


def _risk(found: Prediction, c: Config) -> str:
    risks = c.training.risks
    low, high = min(risks[0], found.risk), max(risks[-1], found.risk)
    span = (high - low) or 1.0

    def x(risk: float) -> float:
        return 20 + 680 * (risk - low) / span

    ticks = "".join(f'<line class="one" x1="{x(r):.1f}" x2="{x(r):.1f}" y1="24" y2="44"/>' for r in risks)
    here, side = x(found.risk), "start" if found.risk < (low + high) / 2 else "end"
    return (
        "<h2>Risk</h2>\n"
        f'<p><span class="large">{found.percentile:.0f} %</span> of the {len(risks):,} patients who trained the model '
        "have a lower risk.</p>\n"
        f'<svg viewBox="0 0 720 62" role="img" aria-label="Risk among those of the training patients">{ticks}'
        f'<line class="here" x1="{here:.1f}" x2="{here:.1f}" y1="16" y2="48"/>'
        f'<text class="patient" x="{here:.1f}" y="12" text-anchor="{side}">this patient, {found.risk:.3f}</text>'
        '<text x="20" y="60">lower risk</text><text x="700" y="60" text-anchor="end">higher risk</text></svg>\n'
        '<p class="muted">Each thin line is a training patient. Higher is worse. The model has seen these patients, so '
        "a new one's percentile may lie less towards the ends. A risk ranks patients of one model; it is no "
        "probability.</p>"
    )


def _survival(found: Prediction, c: Config) -> str:
    ends = np.asarray(found.survival.index, float)
    curve, width = found.survival.to_numpy(), c.network.bin_width_days
    shown = min(len(c.training.observed) + 1, len(ends))
    horizon = ends[shown - 1]

    def point(day: float, p: float) -> str:
        return f"{50 + 640 * day / horizon:.1f},{20 + 230 * (1 - p):.1f}"

    path = " ".join(point(d, p) for d, p in zip([0.0, *ends[:shown]], [1.0, *curve[:shown]], strict=True))
    observed = " ".join(point(d, p) for d, p in zip([0.0, *ends], [1.0, *c.training.observed], strict=False))
    dots = "".join(
        f'<circle class="patient" r="3.5" cx="{p.split(",")[0]}" cy="{p.split(",")[1]}"/>' for p in path.split()
    )
    years = horizon / YEAR
    gap = next(g for g in (0.25, 0.5, 1, 2, 5, 10, 20, 50) if years / g <= 10 or g == 50)
    grid = "".join(
        f'<polyline class="axis" points="{point(0, p)} {point(horizon, p)}"/>'
        f'<text x="44" y="{24 + 230 * (1 - p):.0f}" text-anchor="end">{p:.0%}</text>'
        for p in (0, 0.25, 0.5, 0.75, 1)
    )
    grid += "".join(
        f'<text x="{50 + 640 * y / years:.1f}" y="268" text-anchor="middle">{y:g}</text>'
        for y in np.arange(0, years + 1e-9, gap)
    )
    rows = [
        [
            f"{day:g}",
            f"{day / YEAR:.3g}",
            f"{p:.1%}",
            f"{c.training.observed[i]:.1%}" if i < len(c.training.observed) else "",
        ]
        for i, (day, p) in enumerate(zip(ends[:shown], curve, strict=False))
    ]
    head = [f"{found.unit} from the start", "years", "this patient", "training cohort, observed"]
    return (
        "<h2>Survival</h2>\n"
        '<svg viewBox="0 0 720 300" role="img" aria-label="Survival curve of this patient and of the training cohort">'
        f'{grid}<polyline class="observed" points="{observed}"/>'
        f'<polyline class="curve" points="{path}"/>{dots}'
        f'<text x="370" y="290" text-anchor="middle">years of {YEAR} {escape(found.unit)} from the start of '
        "follow-up</text>"
        '<text class="patient" x="60" y="224">this patient, predicted</text>'
        '<text class="cohort" x="60" y="241">training cohort, observed (Kaplan-Meier)</text></svg>\n'
        f"{_table(head, rows)}"
        f'<p class="muted">Probability of being alive without the event at the end of each interval of {width:g} '
        f"{escape(found.unit)}. Nobody who trained the model was followed beyond "
        f"{c.training.longest_follow_up_days:g} {escape(found.unit)}; all {len(ends)} intervals are in "
        "prediction.json.</p>"
    )


def _merged(found: Prediction, c: Config) -> str:
    assert found.mixture is not None
    largest = max(float(found.mixture["coefficient"].abs().max()), 1e-12)
    rows, off = [], []
    for i, (name, w, lam, kept, coefficient) in enumerate(found.mixture.itertuples(index=False)):
        used = kept and (coefficient > 0 if i == 0 else w > 0)
        label, numbers = (f"{name} (its own model)", ["", ""]) if i == 0 else (name, [f"{w:.4f}", f"{lam:.3f}"])
        bar = _Markup(f'<div class="bar" style="width:{4 * abs(coefficient) / largest:.2f}rem"></div>')
        rows.append([label, *numbers, "yes" if used else "no", f"{coefficient:.4f}", bar])
        off.append(not used)
    table = _table(["cancer", "w", "λ", "in use", "coefficient", ""], rows, off)
    if all(off[1:]):
        table += "<p>No source has a weight above 0 for this patient: the encoder is M₀, the untrained network.</p>\n"
    return (
        f"<h2>What was merged for this patient</h2>\n{table}"
        '<p class="muted">The patient\'s model is M₀ plus these task vectors, each times its coefficient: w (1 − λ) of '
        "a source in use, and the sum of w λ for the target's own.</p>"
    )


def _attention(found: Prediction) -> str:
    title = "<h2>Where the model looked</h2>\n"
    if found.attention is None:
        return f'{title}<p class="muted">This model does not pool patches by an attention of its own.</p>'
    parts = [title]
    maps = dict(mapped(found))
    for slide in found.patches["slide_id"].cat.categories:
        if slide not in maps:
            parts.append(f"<p>{escape(slide)}: its file has no coordinates, so there is no map.</p>\n")
            continue
        image, (rows, columns) = attention_png(maps[slide], found.edges[slide])
        # A small slide is not blown up: a patch is at most 28 pixels wide.
        style = f"max-width:min(100%, {28 * columns}px)"
        parts.append(
            f'<p>{escape(slide)} <span class="muted">({len(maps[slide]):,} patches of {found.edges[slide]:,} level-0 '
            f'pixels)</span></p>\n<img class="map" style="{style}" width="{columns}" height="{rows}" '
            f'alt="Attention over slide {escape(slide)}" src="data:image/png;base64,'
            f'{base64.b64encode(image).decode()}">\n'
        )
    if maps:
        ramp = ", ".join(f"rgb{tuple(int(v) for v in colour)}" for colour in VIRIDIS)
        parts.append(
            f'<p class="muted">less attention <span class="ramp" style="background:linear-gradient(90deg, {ramp})">'
            "</span> more (percentile among the slide's patches)</p>\n"
        )
    top = found.patches.sort_values("rank").head(5)
    rows_of = [
        [str(rank), str(slide), _number(x), _number(y), f"{attention * len(found.patches):.2f}"]
        for rank, slide, x, y, attention in top[["rank", "slide_id", "x", "y", "attention"]].to_numpy()
    ]
    parts.append(_table(["rank", "slide", "x", "y", "times an even share"], rows_of))
    parts.append(
        '<p class="muted">Attention tells which patches were read most, not that they are good, bad or the cause of '
        "anything. All patches are in attention.csv; the .geojson files open in QuPath.</p>"
    )
    return "".join(parts)


def attention_png(patches: pd.DataFrame, edge: int) -> tuple[bytes, tuple[int, int]]:
    """A slide's attention as a PNG, a pixel per patch, and its rows and columns; empty where no patch lies."""
    corner = patches[["x", "y"]].to_numpy(np.int64)
    corner = corner - corner.min(axis=0)
    step = max(edge, int(corner.max()) // LARGEST_MAP + 1)
    columns, rows = corner.max(axis=0) // step + 1
    pixels = np.zeros((rows, columns, 4), np.uint8)
    order = np.argsort(patches["percentile"].to_numpy(float), kind="stable")  # of two in a pixel, the higher is seen
    column, row = (corner[order] // step).T
    pixels[row, column, :3] = colours(patches["percentile"].to_numpy(float)[order])
    pixels[row, column, 3] = 255
    return _png(pixels), (int(rows), int(columns))


def _png(pixels: np.ndarray) -> bytes:
    """A PNG of pixels (rows, columns, 4)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = pixels.shape[:2]
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)  # each line begins with its filter, none
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 6)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _provenance(found: Prediction, model: Model) -> str:
    c = model.config
    facts = {
        "model": f"{c.name}: {c.description}",
        "run": f"{c.run}, {c.finished}",
        "trained on": f"{c.training.patients:,} patients of {c.dataset}, {c.training.events:,} with an event",
        **{_folds(score): _c_index(score) for score in c.scores},
        "reads": f"{c.inputs.encoder}, {c.inputs.dim} numbers a patch of {c.inputs.patch_size_px} pixels at "
        f"{c.inputs.magnification:g}x",
        "slides": ", ".join(Path(file).name for file in found.files),
        "computed": f"on {model.device} in {model.precision}",
        "model file": ", ".join(f"{name} sha256 {value[:16]}" for name, value in c.files.items()),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in found.notes)
    return f"<h2>Where this comes from</h2>\n{notes}<dl>{listed}</dl>"


def _folds(score: Score) -> str:
    return f"C-index, test fold{'s' * (len(score.folds) > 1)} {', '.join(map(str, score.folds))}"


def _c_index(score: Score) -> str:
    of = f"{score.patients:,} patients, {score.events:,} events"
    if score.c_index is None:
        return f"undefined ({of})"
    between = "" if score.low is None else f", 95 % interval {score.low:.3f} to {score.high:.3f}"
    return f"{score.c_index:.3f}{between} ({of})"


def _number(value: Any) -> str:
    return "" if pd.isna(value) else f"{value}"


class _Markup(str):
    """Markup of this module's own; whatever else goes into a table is text."""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], off: Sequence[bool] = ()) -> str:
    """A table. off: rows that are to stand back."""

    def cell(text: str) -> str:
        return text if isinstance(text, _Markup) else escape(text)

    body = "".join(
        f"<tr{' class=off' if off and off[i] else ''}>" + "".join(f"<td>{cell(t)}</td>" for t in row) + "</tr>"
        for i, row in enumerate(rows)
    )
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>\n'
