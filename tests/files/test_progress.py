"""steph.files.progress: a log file gets a few lines, and the items come through."""

from steph.files import progress


def test_a_log_gets_the_first_and_last_line_and_few_between(capsys, monkeypatch):
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(progress.track(range(20), "pack")) == list(range(20))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pack: 0/20" and lines[-1].startswith("pack: 20/20, done")
    assert lines[1:-1] == [
        "pack: 4/20, 12 s, 48 s to go", "pack: 8/20, 24 s, 36 s to go", "pack: 12/20, 36 s, 24 s to go",
        "pack: 16/20, 48 s, 12 s to go",
    ]  # fmt: skip


def test_an_unknown_length_and_an_empty_one(capsys):
    assert list(progress.track(iter("ab"), "read")) == ["a", "b"]
    assert list(progress.track([], "none")) == []
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "read: 0" and lines[1].startswith("read: 2, done") and lines[3].startswith("none: 0/0, done")


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track([1, 2], "bar")) == [1, 2]
    assert "bar: 100%" in capsys.readouterr().err
