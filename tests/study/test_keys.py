"""Keys: a run's key follows all that decides its result, and nothing else; asking for it makes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steph import Refused
from steph.methods import METHODS, Method
from steph.methods import merging as family
from steph.mil import MIL, NETWORKS
from steph.mil.abmil import ABMIL
from steph.study import Run, Workbench, keys, plan
from steph.study.keys import code_fingerprint, is_numeric, method_code

SARC = Run("SARC", "steph", 1, 42)
PLAIN = ("vanilla", "transmil", "finetuned_head", "roupkt", "model_average", "joint")
OWN_NUMBERS = ("steph", "steph_beta0.1", "steph_k1", "steph_free_cosine", "ties_hyper", "steph_subsampled")


@pytest.fixture(autouse=True)
def _forget():
    """What a test changes of the code is seen, and forgotten afterwards."""
    caches = (keys._method_code, keys._source, keys.code_fingerprint, keys._module_code)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def changed(study, part, **values):
    return study.model_copy(update={part: getattr(study, part).model_copy(update=values)})


# ------------------------------------------------------------------------------------------------ what is in a key


def test_a_key_follows_what_decides_the_result(tiny):
    key, study = tiny.key(SARC), tiny.study
    others = {
        "recipe": changed(study, "recipe", lr=1e-3),
        "settings": changed(study, "steph", beta=0.1),
        "seed of M_0": study.model_copy(update={"seed": 7}),
        "network": changed(study, "network", dropout=0.1),
    }
    for what, other in others.items():
        assert Workbench(other).key(SARC) != key, what
    assert Workbench(study.model_copy(update={"title": "another"})).key(SARC) == key
    assert len({tiny.key(replace(SARC, **{k: v})) for k, v in [("seed", 1), ("fold", 0), ("precision", "fp64")]}) == 3


@pytest.mark.parametrize(
    ("setting", "value", "follow"),
    [
        ("beta", 0.1, {"steph", "steph_k1", "steph_subsampled"}),
        ("top_k", 1, {"steph", "steph_beta0.1", "steph_free_cosine", "steph_subsampled"}),
        ("gamma_small", 0.01, {"steph", "steph_beta0.1", "steph_k1", "ties_hyper", "steph_subsampled"}),
        ("dim_hidden", 8, {"hypernetwork_only", *OWN_NUMBERS} - {"steph_free_cosine"}),
        ("sample_patches", 3, {"steph_subsampled"}),
    ],
)
def test_a_setting_of_steph_changes_the_keys_of_those_that_use_it_alone(tiny, setting, value, follow):
    """A plain model, and so every source model of a study, is not thrown away by a setting of STEPH."""
    other = Workbench(changed(tiny.study, "steph", **{setting: value}))
    names = ("steph_gamma0.01", "steph_free_scores", "hypernetwork_only", *PLAIN, *OWN_NUMBERS)
    moved = {name for name in names if other.key(replace(SARC, method=name)) != tiny.key(replace(SARC, method=name))}
    assert moved - {"steph_gamma0.01", "steph_free_scores"} == follow
    assert "steph_gamma0.01" not in moved or setting != "gamma_small", "an option replaces the setting"


def test_asking_for_a_key_makes_and_writes_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    fresh = Workbench("tiny")
    assert [fresh.key(run) for run in plan(fresh)] == [tiny.key(run) for run in plan(tiny)]
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ code


def test_a_method_follows_the_code_of_its_builder_and_of_what_it_calls(monkeypatch):
    names = ("vanilla", "steph", "steph_subsampled", "adamerging", "surgery_am", "roupkt")
    before = {name: method_code(METHODS[name]) for name in names}

    def steph(x, **options):
        return None

    steph.__module__ = family.__name__
    monkeypatch.setattr(family, "steph", steph)
    keys._method_code.cache_clear()
    after = {name: method_code(METHODS[name]) for name in names}
    # The entries of `steph` and its variants hold the function itself, or name it in another file.
    assert {name for name in names if before[name] != after[name]} == {"adamerging", "surgery_am"}


def test_a_method_follows_the_modules_behind_its_builder(monkeypatch):
    asked = []
    monkeypatch.setattr(keys, "code_fingerprint", lambda *modules: asked.append(set(modules)) or "")
    expected = {
        "roupkt": {"steph.mil.roupkt", "steph.mil.abmil"},
        "surgery_am": {"steph.merging.surgery", "steph.merging.pairs", "steph.merging.steph"},
        "transmil": {"steph.mil.transmil"},
        "hypernetwork_only": {"steph.mil.mean_mil"},
        "steph_gamma_search": {"steph.training.selection", "steph.merging.steph"},
        "model_average": {"steph.merging.average"},
    }
    for name, modules in expected.items():
        method_code(METHODS[name])
        assert modules | {"steph.training.engine", "steph.survival", "steph.mil.state"} <= asked[-1], name
        others = {"steph.mil.transmil", "steph.mil.roupkt"} - modules
        assert not asked[-1] & others, f"{name} follows what it does not use"


def test_the_engines_code_is_followed_with_all_that_it_imports(monkeypatch):
    """The cutting of updates into parts, memory and devices too: all of it can change how sums are rounded."""
    read, code = [], keys._module_code
    monkeypatch.setattr(keys, "_module_code", lambda module: read.append(module) or code(module))
    code_fingerprint("steph.training.engine")
    expected = {"steph.training.memory", "steph.training.device", "steph.data.bags", "steph.mil.gated_attention"}
    assert expected <= set(read) and all(is_numeric(module) for module in read)


def test_comments_and_docstrings_change_no_code(tmp_path, monkeypatch):
    prints = []
    for text in ('"""One."""\nX = 1  # a\n', '"""Other."""\nX = 1\n', "X = 2\n"):
        (tmp_path / "made.py").write_text(text)
        monkeypatch.setattr(
            keys.importlib, "import_module", lambda _: type("M", (), {"__file__": tmp_path / "made.py"})
        )
        keys._module_code.cache_clear()
        prints.append(keys._module_code("made"))
    assert prints[0] == prints[1] != prints[2]


class Mine(ABMIL):
    """A network of somebody's own."""

    SCALE = 2.0

    def encode(self, bags):
        return self.SCALE * super().encode(bags)


def test_another_network_leaves_the_others_alone(monkeypatch):
    before = {name: method_code(METHODS[name]) for name in ("vanilla", "transmil", "steph")}
    monkeypatch.setitem(NETWORKS, "mine", lambda dim_in, n: Mine(dim_in, n.dim_emb))
    mine = Method("Mine", "mil_network", METHODS["vanilla"].build, "mine", network="mine")
    keys._method_code.cache_clear()
    assert {name: method_code(METHODS[name]) for name in before} == before
    assert method_code(mine) not in before.values()


def test_a_class_and_its_values_that_a_builder_uses_are_followed(monkeypatch):
    def build(x):
        return Mine()

    entry = Method("Mine", "own", build, "mine")
    before = method_code(entry)
    monkeypatch.setattr(Mine, "SCALE", 3.0)
    keys._method_code.cache_clear()
    scaled = method_code(entry)
    monkeypatch.setattr(Mine, "encode", lambda self, bags: MIL.encode(self, bags))
    keys._method_code.cache_clear()
    assert len({before, scaled, method_code(entry)}) == 3


def test_values_of_a_notebook_are_followed_where_they_are_plain_and_refused_elsewhere(monkeypatch):
    def defined(value):
        space = {"__name__": "__main__", "value": value}
        path = Path(__file__).with_name("made.py")
        exec(compile("def build(x):\n    return value\n", str(path), "exec"), space)
        return Method("Made", "own", space["build"], "made")

    monkeypatch.setattr(keys, "_source", lambda function: function.__name__)
    assert method_code(defined(1)) != method_code(defined(2))
    with pytest.raises(Refused, match=r"build uses value, a Tensor of this notebook: hand it over as an option"):
        method_code(defined(torch.ones(2)))
