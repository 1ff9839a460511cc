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
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from steph.deploy import figures
from steph.deploy.predict import Prediction, sources_in_use
from steph.files.atomic import atomic_folder
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


def write_report(prediction: Prediction, out: Path) -> None:
    """Write all files to the new folder `out`, whole or not at all. Raises `Refused` where `out` is taken."""
    with atomic_folder(out) as folder:
        text = json.dumps(as_data(prediction), indent=1, ensure_ascii=False)
        (folder / "prediction.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.html").write_text(html_report(prediction), encoding="utf-8")
        if prediction.attention is None:
            return
        prediction.patches.to_csv(folder / "attention.csv", index=False)
        for slide, patches in prediction.patches.groupby("slide_id", observed=True):
            if patches["x"].notna().all():
                squares = geojson(patches, prediction.edges[str(slide)], len(prediction.patches))
                text = json.dumps(squares, ensure_ascii=False)
                (folder / f"{slide}.geojson").write_text(text, encoding="utf-8")


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
        lines.append(f"in use: {', '.join(used) or 'no source'}")
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
    return [*([SYNTHETIC] if prediction.model.config.synthetic else []), RESEARCH]


def geojson(patches: DataFrame, edge: int, n: int) -> dict[str, Any]:
    """A slide's patches as GeoJSON that QuPath opens: a detection per patch, a square of `edge` level-0 pixels, with
    its class, colour and measurements. n: patches of the whole bag, for attention over an even share."""
    colours = figures.colours(np.array([middle for _, middle, _ in CLASSES]))[:, :3].tolist()
    classes = [(start, {"name": name, "color": c}) for (start, _, name), c in zip(CLASSES, colours, strict=True)]
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
        year=figures.YEAR,
        risk_strip=figures.risk_strip(p),
        survival_curve=figures.survival_curve(p),
        in_use=None if p.mixture is None else sources_in_use(p.mixture)["source"].tolist(),
        maps=[] if p.attention is None else _maps(p),
        ramp=[f"rgb{tuple(colour)}" for colour in figures.colours(np.linspace(0, 1, 9))[:, :3].tolist()],
        top_patches=p.patches.sort_values("rank").head(5),
        slides=[Path(file).name for file in p.files],
    )


def _maps(prediction: Prediction) -> list[dict[str, Any]]:
    """The slides' maps for the page; without a picture where a slide has no coordinates."""
    maps: list[dict[str, Any]] = []
    for slide, patches in prediction.patches.groupby("slide_id", observed=True):
        if patches["x"].isna().any():
            maps.append({"slide": slide, "png": None})
            continue
        edge = prediction.edges[str(slide)]
        image, (rows, columns) = figures.attention_png(patches, edge)
        shape = {"rows": rows, "columns": columns, "patches": len(patches), "edge": edge}
        maps.append({"slide": slide, "png": base64.b64encode(image).decode(), **shape})
    return maps
