"""Whole stores on a device: copied once, the oldest makes room, what does not fit is streamed."""

import pytest
import torch

from steph.data import resident as module
from steph.data.resident import release, resident

DEVICE = torch.device("cpu")  # any device will do: what is counted is pretended


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """100 bytes of memory, less what is held."""
    monkeypatch.setattr(module, "_held", {})
    monkeypatch.setattr(module, "_refused", set())
    monkeypatch.setattr(module, "SHARE", 1.0)
    monkeypatch.setattr(module, "free_memory", lambda _: 100 - sum(t.nbytes for t in module._held.values()))


def bytes_of(n):
    return torch.zeros(n, dtype=torch.uint8)


def test_the_oldest_makes_room():
    for name in ("a", "b", "c"):
        assert resident(name, bytes_of(40), DEVICE) is not None
    assert [name for name, _ in module._held] == ["b", "c"]


def test_what_does_not_fit_is_streamed_and_said_once(capsys):
    for _ in range(2):
        assert resident("large", bytes_of(101), DEVICE) is None
    assert capsys.readouterr().err.count("batches are streamed to cpu instead") == 1


def test_what_is_let_go_for_want_of_memory_is_not_taken_again():
    held = resident("a", bytes_of(40), DEVICE)
    assert held is not None and resident("a", bytes_of(40), DEVICE) is held, "a store is copied once"
    assert release(DEVICE, refuse=True) and not release(DEVICE)
    assert resident("a", bytes_of(40), DEVICE) is None


def test_a_device_without_memory_left_is_no_crash(monkeypatch):
    class Full:
        nbytes = 1

        def to(self, device):
            raise torch.OutOfMemoryError("full")

    assert resident("a", Full(), DEVICE) is None
