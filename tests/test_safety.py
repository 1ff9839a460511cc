"""No module and no notebook calls anything that could run what it reads."""

import ast

import nbformat
import pytest

from steph import PROJECT

UNSAFE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "dill.load", "joblib.load", "marshal.loads",
    "shelve.open", "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "subprocess.getoutput", "eval", "exec", "__import__", "input",
    "tempfile.mktemp", "shutil.unpack_archive",
}  # fmt: skip


def unsafe_calls(source):
    """What a piece of code calls that could run what it reads."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in {"pickle", "marshal", "shelve", "joblib", "dill"}:
            calls.append(f"from {node.module}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in UNSAFE:
            calls.append(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            calls.append(name)
        if name.endswith(".load") and options.get("allow_pickle", "False") != "False":
            calls.append(name)
        if name.startswith("subprocess.") and options.get("shell", "False") != "False":
            calls.append(name)
        if name.endswith((".extractall", ".extract")) and "zip" not in name and "filter" not in options:
            calls.append(name)
    return calls


@pytest.mark.parametrize("path", sorted((PROJECT / "steph").rglob("*.py")), ids=lambda p: str(p.relative_to(PROJECT)))
def test_no_module_calls_what_runs_what_it_reads(path):
    assert unsafe_calls(path.read_text(encoding="utf-8")) == []


def test_no_notebook_calls_what_runs_what_it_reads():
    for path in (PROJECT / "notebooks").rglob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or unsafe_calls(cell.source) == [], path.name


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)", "from pickle import loads", "torch.load(p)", "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)", "yaml.load(t, Loader=yaml.Loader)", "eval('1')", "exec('1')",
        "os.system('ls')", "subprocess.run('ls', shell=True)", "pd.read_pickle(p)", "tar.extractall(d)",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(line):
    assert unsafe_calls(line)
    assert not unsafe_calls("torch.load(p, weights_only=True); model.eval(); np.load(p, allow_pickle=False)")
