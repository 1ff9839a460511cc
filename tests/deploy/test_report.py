"""The report of one patient: files that other tools open, and a page that needs nothing and trusts nothing."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.deploy import load_model, report
from tests.helpers.devtools import Browser, find_browser
from tests.helpers.made_model import made_folder, patches, write_slide

NASTY = "<script>alert('x')</script>\"&'"


@pytest.fixture
def prediction(tmp_path):
    model = load_model(made_folder(tmp_path / "model"))
    slides = [write_slide(tmp_path / f"P1-DX{i}.h5", patches(40, seed=i)) for i in (1, 2)]
    return model.predict([*slides, write_slide(tmp_path / "P1-DX3.h5", patches(5), coords=None)], patient_id="P1")


class Page(HTMLParser):
    """What a browser would make of a page: its tags, and the text of it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.addresses, self.labels = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.labels += [value for name, value in attrs if name in ("alt", "aria-label")]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]

    def handle_data(self, data):
        self.text += data


def test_all_files_and_what_is_in_them(prediction, tmp_path):
    report.write_report(prediction, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "prediction.json", "attention.csv", "P1-DX1.geojson", "P1-DX2.geojson"}
    content = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert content == json.loads(json.dumps(report.as_data(prediction))) and content["risk"] == prediction.risk
    assert content["survival"][0] == {"end": 365.0, "probability": prediction.survival.iloc[0]}
    assert report.RESEARCH in content["notes"] and content["unit"] == "days" and len(content["mixture"]) == 5
    table = pd.read_csv(tmp_path / "out" / "attention.csv", float_precision="round_trip")
    np.testing.assert_array_equal(table["attention"], prediction.attention)
    assert table["x"].isna().sum() == 5 and table["attention"].sum() == pytest.approx(1)
    with pytest.raises(Refused, match="is there already"):
        report.write_report(prediction, tmp_path / "out")


def test_the_map_is_a_square_for_each_patch(prediction):
    patches = prediction.patches[prediction.patches["slide_id"] == "P1-DX2"]
    collection = json.loads(json.dumps(report.geojson(patches, 512, len(prediction.patches))))
    assert collection["type"] == "FeatureCollection" and len(collection["features"]) == 40
    for feature, row in zip(collection["features"], patches.itertuples(), strict=True):
        (ring,), properties = feature["geometry"]["coordinates"], feature["properties"]
        assert ring[0] == ring[-1] == [row.x, row.y] and ring[2] == [row.x + 512, row.y + 512] and len(ring) == 5
        assert properties["objectType"] == "detection" and properties["measurements"]["Attention"] == row.attention
        assert properties["measurements"]["Attention, times an even share"] == pytest.approx(row.attention * 85)
        assert all(0 <= c <= 255 and isinstance(c, int) for c in properties["classification"]["color"])
    classes = [feature["properties"]["classification"] for feature in collection["features"]]
    names, top = [kind["name"] for kind in classes], patches["percentile"].to_numpy() >= 0.9
    assert [name == "Attention: top 10 %" for name in names] == top.tolist() and 4 <= top.sum() <= 5
    assert names.count("Attention: lower half") == 20
    assert max(classes, key=lambda kind: sum(kind["color"]))["name"] == "Attention: top 10 %"


def test_a_pixel_of_the_map_lies_where_its_patch_does():
    from matplotlib.image import imread

    table = pd.DataFrame({"x": [1000, 1512, 1000], "y": [2000, 2000, 3024], "percentile": [0.0, 1.0, 0.5]})
    data, shape = report.attention_png(table, 512)
    pixels = imread(io.BytesIO(data))
    assert shape == (3, 2) and pixels.shape == (3, 2, 4)
    assert (pixels[..., 3] > 0).tolist() == [[True, True], [False, False], [True, False]]
    assert np.allclose(pixels[0, 1, :3] * 255, (253, 231, 36)) and np.allclose(pixels[0, 0, :3] * 255, (68, 1, 84))
    far_apart = pd.DataFrame({"x": [0, 10**9], "y": [0, 10**9], "percentile": [0.1, 0.9]})  # no endless picture
    assert all(1000 <= edge <= 1501 for edge in report.attention_png(far_apart, 1)[1])


def test_the_page_needs_nothing_and_says_what_it_must(prediction):
    page = Page(text := report.html_report(prediction))
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert "default-src 'none'" in text and text.count("<svg") == 2
    assert len([a for a in page.addresses if a.startswith("data:image/png;base64,")]) == 2
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in page.addresses)
    assert len(page.labels) == 4 and all("patient" in name or "P1-DX" in name for name in page.labels)
    for shown in (
        report.RESEARCH, "P1", f"this patient, {prediction.risk:.3f}", "S3", "P1-DX3: its file has no coordinates",
        "0.610 (0.400 to 0.800)", f"{prediction.percentile:.0f} %", f"{prediction.survival.iloc[2]:.1%}",
    ):  # fmt: skip
        assert shown in page.text
    assert "prefers-color-scheme: dark" in page.text and report.SYNTHETIC not in page.text


def test_figures_take_the_pages_colours_and_show_every_training_patient(prediction):
    for figure in (report.risk_strip(prediction), report.survival_curve(prediction)):
        assert not any(colour in figure for colour in report.COLOURS.values())
        assert "var(--patient)" in figure and "var(--muted)" in figure
    lines = re.findall(r'<path d="M (\S+) \S+ \nL (\S+) \S+ ?\n"', report.risk_strip(prediction))
    assert len(lines) == 5 and all(start == stop for start, stop in lines)
    ordered = [float(start) for start, _ in lines[:4]]
    assert ordered == sorted(ordered)


def test_a_synthetic_model_is_stamped_everywhere(prediction, tmp_path):
    synthetic = replace(prediction, model=load_model(made_folder(tmp_path / "s", synthetic=True)))
    assert report.SYNTHETIC in Page(report.html_report(synthetic)).text
    assert report.SYNTHETIC in report.as_data(synthetic)["notes"] and report.SYNTHETIC in report.summary(synthetic)


def test_names_are_text_never_markup(tmp_path):
    model = load_model(made_folder(tmp_path / "m", title=NASTY, dataset=NASTY, description=NASTY, study=NASTY))
    model.network.source_names = [NASTY, "\0<b>", "S2", "S3"]
    slides = [write_slide(tmp_path / f"{name}.h5", patches()) for name in ("<img src=x onerror=alert(1)>", "..", "~")]
    before = set(tmp_path.iterdir())
    report.write_report(prediction := model.predict(slides, patient_id=NASTY), tmp_path / "out")
    assert "nan" not in report.summary(prediction)  # where a source bears the target's name
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "out"} and len(list((tmp_path / "out").iterdir())) == 6
    page = Page(text := (tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and page.tags.count("img") == 3 and "b" not in page.tags
    assert NASTY in page.text and "<script" not in text


def test_one_patch_and_one_training_patient_are_enough(tmp_path):
    training = {"patients": 1, "events": 0, "longest_follow_up_days": 10, "risks": [-3.0], "observed": []}
    model = load_model(made_folder(tmp_path / "m", training=training))
    report.write_report(model.predict([write_slide(tmp_path / "a.h5", patches(1))]), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.geojson"))) == 1


def test_the_summary_is_short(prediction):
    lines = report.summary(prediction).splitlines()
    assert len(lines) == 6 and lines[0].startswith("P1: 3 slide(s), 85 patches") and lines[-1] == report.RESEARCH
    assert f"risk {prediction.risk:.4f} (higher is worse)" in lines[1] and "365: " in lines[2]


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here")
def test_a_browser_shows_it_without_a_network(prediction, tmp_path):
    report.write_report(prediction, tmp_path / "out")
    browser = Browser(find_browser(), tmp_path / "profile")
    try:
        for width in (400, 1000):
            browser.width(width)
            browser.visit((tmp_path / "out" / "report.html").as_uri())
            asked = [e["request"]["url"].split(":")[0] for e in browser.found("Network.requestWillBeSent")]
            assert not browser.problems() and set(asked) <= {"file", "data"}
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    finally:
        browser.close()
