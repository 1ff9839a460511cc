"""From slide feature files in real layouts to stores, and what stands in the way (tests/test_docs.py goes further)."""

import h5py
import pandas as pd
import pytest
import yaml

from tests.helpers.command import steph
from tests.helpers.fabricate import clinical_table, slides_of

LAYOUTS = {"SARC": "mahmoodlab", "LIHC": "mahmoodlab", "CESC": "trident"}
DIM = 12


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study that extends tcga.yaml, with outcomes, a slide list and slide files; nothing of ours made yet."""
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("STEPH_DATA", raising=False)
    data = tmp_path / "data"
    tables = []
    for name, layout in LAYOUTS.items():
        folder = data / "features" / ("trident" if layout == "trident" else "")
        tables.append(slides_of(name, folder, layout, f"TCGA-{name[:2]}-{{:04}}", "-01Z-00-DX{}.AAAA"))
    clinical_table(tables).to_csv(tmp_path / "cdr.csv", index=False)
    (tmp_path / "slides.txt").write_text("\n".join(pd.concat(tables)["slide_id"]))
    manifest = {
        "extends": "tcga",
        "name": "rehearsal",
        "data_root": str(data),
        "features": {"dim": DIM},
        "steph": {"dim_hidden": 8, "top_k": 2},
        "datasets": {name: {"projects": [name]} for name in LAYOUTS},
    }
    manifest["datasets"]["CESC"]["folders"] = ["features/trident/*/features_uni_v2"]
    path = tmp_path / "rehearsal.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return path


def test_labels_check_and_pack_each_say_what_comes_first_and_a_store_of_other_files_is_refused(study, tmp_path):
    done = steph("run", "01_baselines", "--study", study)
    assert done.exit_code == 1 and "steph data labels" in done.output  # told what is missing, and the command

    done = steph("data", "labels", "--study", study, "--cdr", tmp_path / "cdr.csv", "--slides", tmp_path / "slides.txt")
    assert done.exit_code == 0, done.output
    done = steph("run", "01_baselines", "--study", study, "-p", "dataset=SARC")
    assert done.exit_code == 1 and "steph data pack" in done.output

    broken = next((tmp_path / "data" / "features").rglob("*SA-0003*DX1*.h5"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    done = steph("data", "check", "--study", study)
    assert done.exit_code == 1 and broken.stem in done.output
    done = steph("data", "pack", "--study", study)
    assert done.exit_code == 1 and not list((tmp_path / "data" / "stores").glob("SARC.h5"))
    broken.write_bytes(whole)

    done = steph("data", "pack", "--study", study)
    assert done.exit_code == 0, done.output

    changed = next((tmp_path / "data" / "features").rglob("*SA-0001*DX1*.h5"))
    with h5py.File(changed, "a") as file:  # extracted again
        file["features"][...] = file["features"][...] + 1
    done = steph("study", "run", "--study", study, "--dataset", "SARC", "--method", "vanilla")
    assert done.exit_code == 1 and "steph data pack" in done.output and "Traceback" not in done.output
