"""Long work shows that it goes on: on a terminal, and not in a file."""

import io
import re
import sys
import time

import pytest
from conftest import train

from nanofit import progress


def on_a_terminal(monkeypatch):
    """A standard error that is a terminal from here on; what is written there, as a list."""
    heard = []
    stream = io.StringIO()
    stream.isatty, stream.write = lambda: True, lambda text: heard.append(text)
    monkeypatch.setattr(sys, "stderr", stream)  # not by a fixture: pytest puts its own there for the test
    return heard


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_shows_its_evaluations_on_a_terminal_alone(monkeypatch, terminal):
    shown = on_a_terminal(monkeypatch)
    sys.stderr.isatty = lambda: terminal
    assert "\r" not in train(max_iters=0).text
    assert all((f"{split} loss: 0 of 4" in "".join(shown)) == terminal for split in ("train", "val"))


def test_waiting_counts_seconds_and_leaves_nothing(monkeypatch):
    shown = on_a_terminal(monkeypatch)
    with progress.waiting("compiling"):
        time.sleep(1.2)
    text = "".join(shown)
    assert re.search(r"compiling: \d s", text)
    assert text.endswith("\033[K"), "the line is wiped"
    assert "\n" not in text


def test_a_terminal_that_is_closed_ends_nothing(monkeypatch):
    on_a_terminal(monkeypatch)

    def gone(text):
        raise OSError(5, "Input/output error")

    sys.stderr.write = gone
    assert list(progress.bar(iter("abc"), "train loss", 3)) == ["a", "b", "c"]
    with progress.waiting("compiling"):
        pass
