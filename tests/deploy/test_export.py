"""Export: a model folder predicts to the last bit what the study predicted, and its card tells what it is."""

import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from steph import Refused
from steph.analysis.mixing.attention import attention_map, bag_of, mixture
from steph.cli import app
from steph.deploy import export, load_model, report
from steph.deploy.predict import sources_in_use
from steph.study.runs import Run, Workbench
from steph.training.device import Compute
from tests.helpers.dead import start_steph

METHODS = [
    "vanilla", "finetuned_head", "finetuned_representation", "roupkt", "model_average", "adamerging", "ties_am",
    "surgery_am", "iso_c_am", "steph", "steph_param_w", "steph_dense", "steph_subsampled", "steph_random_sources",
    "steph_lambda0_with_target", "joint", "hypernetwork_only", "transmil", "steph_patch_gcn", "steph_free_cosine",
]  # fmt: skip


def run_of(method, fold=0):
    return Run("SARC", method, fold, 42)


def merged_for(patient, data, model):
    """What a model merges for a patient of a data set."""
    return mixture(model, bag_of(model, data, patient, Compute()), data.name)


def slide_files(data, patient, folder):
    """The patient's slides as files, in the cohort table's order."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{slide}.h5" for slide in data.slides(patient)]
    for slide, path in zip(data.slides(patient), files, strict=True):
        with h5py.File(path, "w") as file:
            file["features"] = data.store.bag([slide])
            file["coords"] = data.store.coords_of([slide]).astype(np.int64)
    return files


@pytest.fixture(scope="module")
def patients(tiny, tmp_path_factory):
    """Slide files of some test patients, among them the one with most slides."""
    data, folder = tiny.dataset("SARC"), tmp_path_factory.mktemp("slides")
    test = data.splits.test(0)
    chosen = [*test[:3], max(test, key=lambda patient: len(data.slides(patient)))]
    assert len(data.slides(chosen[-1])) > 1
    return {patient: slide_files(data, patient, folder) for patient in chosen}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """STEPH, exported."""
    path = tmp_path_factory.mktemp("models") / "steph"
    export.export(tiny, run_of("steph"), path)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_the_same_numbers_as_in_the_study(method, tiny, patients, tmp_path):
    run = run_of(method)
    config = export.export(tiny, run, tmp_path / "m")
    assert config.differs == 0
    recorded = pd.read_csv(tiny.record(run).file("predictions.csv"), float_precision="round_trip")
    recorded = recorded.set_index("patient_id")
    model = load_model(tmp_path / "m")
    for patient, files in patients.items():
        prediction, expected = model.predict(files, patient_id=patient), recorded.loc[patient]
        assert prediction.risk == expected["risk"]
        np.testing.assert_array_equal(prediction.survival, expected.filter(regex=r"^survival_").to_numpy(float))


def test_attention_and_mixture_are_the_studys(tiny, patients, folder):
    data, original, model = tiny.dataset("SARC"), tiny.model(run_of("steph")), load_model(folder)
    for patient, files in patients.items():
        prediction, expected = model.predict(files, patient_id=patient), attention_map(original, data, patient)
        columns = ["slide_id", "patch", "x", "y", "attention", "rank", "percentile"]
        pd.testing.assert_frame_equal(prediction.patches[columns], expected[columns], check_dtype=False)
        pd.testing.assert_frame_equal(prediction.mixture, merged_for(patient, data, original), check_dtype=False)


def test_the_folder_stands_alone(patients, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "nowhere"))
    monkeypatch.setattr("steph.data.manifest.MANIFESTS", tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    patient, files = next(iter(patients.items()))
    assert load_model(copy).predict(files).risk == load_model(folder).predict(files, patient).risk
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_what_the_configuration_says_is_so(tiny, folder):
    config, data = load_model(folder).config, tiny.dataset("SARC")
    train, training = data.labels(data.splits.train(0)), config.training
    assert (training.patients, training.events) == (len(train), int(train["event"].sum()))
    assert len(training.risks) == len(train) and training.risks == sorted(training.risks)
    ends = np.arange(1, len(training.observed) + 1) * 365
    assert ends[-1] <= training.longest_follow_up_days == train["time_days"].max() < ends[-1] + 365
    assert np.all(np.diff([1.0, *training.observed]) <= 0)
    of_fold, of_all = config.scores
    assert of_fold.c_index == pytest.approx(tiny.record(run_of("steph")).info["metrics"]["c_index"])
    assert of_fold.low < of_fold.c_index < of_fold.high
    assert of_all.folds == [0, 1] and of_all.patients == len(data.cohort)
    assert config.sources == ["CESC", "LIHC"] and config.synthetic and config.inputs.encoder == "synthetic"


def test_the_card_says_what_a_reader_must_know(folder):
    card, config = (folder / "README.md").read_text(), load_model(folder).config
    for shown in (
        "Synthetic", "Research only. Not a medical device", "trained on made-up patients", "CESC, LIHC",
        f"{config.training.patients} patients of SARC", f"{config.training.events} with an event", "to the last bit",
        f"| {config.scores[0].text} |", "32 numbers", "simulated death of the disease", "## Limits",
        "steph predict --model steph --features",
    ):  # fmt: skip
        assert shown in card
    assert all(len(line) <= 200 for line in card.splitlines() if not line.startswith("> **Warning.**"))


def test_sources_that_nobody_uses_are_dropped(tiny, patients, tmp_path):
    run = run_of("steph")
    data, original = tiny.dataset("SARC"), tiny.model(run)
    everyone = [*data.splits.train(0), *data.splits.test(0)]
    used = {source for p in everyone for source in sources_in_use(merged_for(p, data, original))["source"]}
    config = export.export(tiny, run, tmp_path / "m", drop_unused=True)
    names = ["CESC", "LIHC"]
    remaining = [name for name in names if name in used] or names[:1]
    assert config.dropped.sources == [name for name in names if name not in remaining]
    assert config.architecture["sources"] == remaining and config.dropped.patients == len(everyone)
    recorded = pd.read_csv(tiny.record(run).file("predictions.csv")).set_index("patient_id")["risk"]
    model = load_model(tmp_path / "m")
    for patient, files in patients.items():
        change = abs(model.predict(files, patient).risk - recorded[patient])
        assert change <= config.dropped.max_change_in_risk + 1e-12 < 1e-5
    assert config.dropped.text in (tmp_path / "m" / "README.md").read_text()


def test_what_dropping_changed_is_measured_and_told(tiny, tmp_path, monkeypatch):
    """A source that is in use, left out all the same: the card tells how far the risks moved."""
    monkeypatch.setattr(export, "sources_in_use", lambda table: sources_in_use(table).query("source != 'LIHC'"))
    config = export.export(tiny, run_of("steph_param_w"), tmp_path / "m", drop_unused=True)
    assert config.dropped.sources == ["LIHC"] and config.dropped.max_change_in_risk > 1e-4
    assert f"at most {config.dropped.max_change_in_risk:.2g}" in config.dropped.text and "LIHC" in config.dropped.text


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (Run("SARC", "steph", 0, 43), {}, "is not finished. Run it: steph study run --study tiny"),
        (Run("SARK", "steph", 0, 42), {}, "Did you mean SARC"),
        (Run("SARC", "stef", 0, 42), {}, "Did you mean steph"),
        (run_of("vanilla"), {"drop_unused": True}, "Vanilla weighs no sources"),
    ],
)
def test_what_cannot_be_exported_is_told(tiny, tmp_path, run, options, message):
    with pytest.raises(Refused, match=message):
        export.export(tiny, run, tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_exports_nothing(tiny, tmp_path):
    with pytest.raises(Refused, match="cuda:9"):
        export.export(Workbench(tiny.study, "cuda:9"), run_of("steph"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_model_that_says_something_else_is_not_written(tiny, tmp_path, monkeypatch):
    real = export.predict
    monkeypatch.setattr(export, "predict", lambda *args: real(*args).assign(risk=lambda table: table["risk"] + 0.01))
    with pytest.raises(Refused, match=r"a risk that is 0\.01 from the one in"):
        export.export(tiny, run_of("vanilla"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_export_and_predict_as_commands(tiny, patients, tmp_path):
    done = call("export", "--study", "tiny", "--dataset", "SARC", "--out", tmp_path / "m", "--drop-unused")
    assert done.exit_code == 0 and "STEPH for SARC" in done.output and "Sources that" in done.output
    again = call("export", "--study", "tiny", "--dataset", "SARC", "--out", tmp_path / "m")
    assert again.exit_code == 1 and "is there already" in again.output
    files = max(patients.values(), key=len)
    done = call("predict", "--model", tmp_path / "m", "--features", *files, "--patient", "P1", "--out", tmp_path / "r")
    assert done.exit_code == 0 and f"P1: {len(files)} slide(s)" in done.output and "Research only" in done.output
    assert json.loads((tmp_path / "r" / "prediction.json").read_text())["patient_id"] == "P1"
    rows = [f"{patient},{path}" for patient, paths in patients.items() for path in paths]
    (tmp_path / "t.csv").write_text("\n".join(["patient_id,path", *rows]))
    done = call("predict", "--model", tmp_path / "m", "--table", tmp_path / "t.csv", "--out", tmp_path / "risks.csv")
    assert done.exit_code == 0 and list(pd.read_csv(tmp_path / "risks.csv")["patient_id"]) == list(patients)
    for wrong, message in (
        (["--features", *files, "--out", tmp_path / "r"], "is there already"),
        ([], "give either --features"),
        (["--table", tmp_path / "t.csv"], "--table needs --out"),
        (["--features", tmp_path / "none.h5"], "none.h5: no such file"),
    ):
        done = call("predict", "--model", tmp_path / "m", *wrong)
        assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output


def test_a_dead_model_says_so_on_its_card_in_its_predictions_and_a_living_one_does_not(
    tiny, patients, tmp_path, monkeypatch
):
    alive = export.export(start_steph(monkeypatch, tiny, start=1), run_of("steph"), tmp_path / "alive")
    assert not any("Dead:" in warning for warning in alive.warnings)
    assert "Dead:" not in (tmp_path / "alive" / "README.md").read_text()
    bench, path = start_steph(monkeypatch, tiny, start=-1), tmp_path / "dead"
    (warning, *_), n = export.export(bench, run_of("steph"), path).warnings, len(tiny.dataset("SARC").splits.test(0))
    assert warning.startswith(f"Dead: every selected w is 0 for {n} of {n} patients in fold 0 of SARC (STEPH).")
    assert f"> **Warning.** {warning}" in (path / "README.md").read_text()
    files = next(iter(patients.values()))
    prediction = load_model(path).predict(files)
    assert warning in report.html_report(prediction) and warning in report.as_data(prediction)["notes"]
    summary = report.summary(prediction)
    assert f"in use: no source: the encoder is M₀, untrained\n{report.SYNTHETIC}\n{warning}" in summary
    (tmp_path / "table.csv").write_text("patient_id,path\n" + "".join(f"P,{file}\n" for file in files))
    arguments = ["predict", "--model", path, "--table", tmp_path / "table.csv", "--out", tmp_path / "out.csv"]
    assert warning in CliRunner().invoke(app, list(map(str, arguments))).stdout
