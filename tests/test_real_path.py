"""From slide feature files in real layouts to stores, and what stands in the way (tests/test_docs.py goes further)."""

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

from steph.data.cohort import COLUMNS, cohort_from
from tests.helpers.command import steph
from tests.helpers.fabricate import fabricate

LAYOUTS = {"SARC": "mahmoodlab", "LIHC": "mahmoodlab", "CESC": "trident"}
DIM = 12


def outcomes(project, n, seed):
    """Patients of one project as TCGA-CDR has them, and their slides."""
    generator = np.random.default_rng(seed)
    patients = [f"TCGA-{project[:2]}-{i:04}" for i in range(n)]
    days = generator.integers(0, 4000, n)
    event = (generator.random(n) < 0.4).astype(int)
    cdr = pd.DataFrame({"bcr_patient_barcode": patients, "type": project, "DSS": event, "DSS.time": days})
    slides = [f"{p}-01Z-00-DX{k + 1}.{seed:08}-{i:04}-AAAA" for i, p in enumerate(patients) for k in range(1 + i % 2)]
    return cdr, slides


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study that extends tcga.yaml, with outcomes, a slide list and slide files; nothing of ours made yet."""
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("STEPH_DATA", raising=False)
    data = tmp_path / "data"
    made = {name: outcomes(name, 40, seed) for seed, name in enumerate(LAYOUTS)}
    pd.concat([cdr for cdr, _ in made.values()]).to_csv(tmp_path / "cdr.csv", index=False)
    (tmp_path / "slides.txt").write_text("\n".join(s for _, slides in made.values() for s in slides))
    for name, (cdr, slides) in made.items():
        label = cdr.set_index("bcr_patient_barcode")
        rows = [[s[:12], s, name, label.loc[s[:12], "DSS.time"], label.loc[s[:12], "DSS"]] for s in slides]
        cohort = cohort_from(pd.DataFrame(rows, columns=COLUMNS), name, "made")
        folder = data / "features" / ("trident" if LAYOUTS[name] == "trident" else "")
        fabricate(cohort, folder, layout=LAYOUTS[name], dim=DIM, mean_patches=10, seed=1)
    manifest = {
        "extends": "tcga",
        "name": "rehearsal",
        "data_root": str(data),
        "folds": 2,
        "features": {"dim": DIM},
        "network": {"dim_emb": 8, "dim_attn": 6},
        "recipe": {"epochs": 2},
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

    broken = next((tmp_path / "data" / "features").rglob("*DX1*0003-AAAA*.h5"))
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
