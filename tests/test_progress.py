"""Long work shows that it goes on: on a terminal, and not in a file."""

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, TOY, environment, flags

from nanofit import progress


def run(*argv, terminal, **variables):
    """(standard output, standard error) of a script of the project; its standard error is a terminal or a pipe."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(theirs, (24, 80))
    with open(ours, "rb", buffering=0) as shown:
        child = subprocess.Popen(
            [sys.executable, *argv], stdout=subprocess.PIPE, stderr=theirs, env=environment(**variables), text=True
        )
        os.close(theirs)
        heard = []

        def listen():
            try:
                while piece := shown.read(4096):
                    heard.append(piece)
            except OSError:  # how a terminal ends
                pass

        listener = threading.Thread(target=listen)
        listener.start()
        printed = child.communicate(timeout=120)[0]
        listener.join()
    assert child.returncode == 0, heard
    return printed, b"".join(heard).decode()


@pytest.mark.proof
def test_evaluations_and_trials_show_themselves_on_a_terminal_alone():
    keys = flags(**{**TOY, "max_iters": 1, "batch_size": 1, "auto_fit": True})
    printed, shown = run(str(ROOT / "train.py"), *keys, terminal=True)
    for words in (r"trying batch_size 1: \d+ s", r"train loss: \d of 4", r"val loss: \d of 4"):
        assert re.search(words, shown), (words, shown)
    quiet, nothing = run(str(ROOT / "train.py"), *keys, "--out_dir=another", terminal=False)
    assert nothing == ""
    for text in (printed, quiet):
        assert "\r" not in text
        assert "trying" not in text
        assert len(re.findall("^auto-fit: batch_size 1 ", text, re.MULTILINE)) == 2


def test_preparing_data_shows_itself_on_a_terminal_alone():
    shutil.copytree(ROOT / "data", "checkout/data", ignore=shutil.ignore_patterns("*.bin", "*.pkl"))
    Path("text.txt").write_text("To be, or not to be. " * 1000)
    script = ("checkout/data/from_text/prepare.py", "text.txt", "--characters", "--out=text")
    _, shown = run(*script, terminal=True)
    assert re.search(r"tokenising: .*tokens", shown)
    _, nothing = run(*script, terminal=False)
    assert nothing == ""


def on_a_terminal(monkeypatch):
    """A standard error that is a terminal from here on; what is written there, as a list."""
    heard = []
    stream = io.StringIO()
    stream.isatty, stream.write = lambda: True, lambda text: heard.append(text)
    monkeypatch.setattr(sys, "stderr", stream)  # not by a fixture: pytest puts its own there for the test
    return heard


def test_waiting_counts_seconds_and_leaves_nothing(monkeypatch):
    shown = on_a_terminal(monkeypatch)
    with progress.waiting("compiling"):
        time.sleep(1.2)
    text = "".join(shown)
    assert "compiling: 1 s" in text
    assert text.endswith("\033[K"), "the line is wiped"
    assert "\n" not in text


def test_of_a_machines_ranks_one_speaks(monkeypatch):
    shown = on_a_terminal(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with progress.waiting("compiling"):
        time.sleep(1.1)
    items = [1, 2]
    assert list(progress.bar(items, "train loss", 2)) == items
    assert shown == []


def test_a_bar_gives_every_item(monkeypatch):
    shown = on_a_terminal(monkeypatch)
    assert list(progress.bar(iter("abc"), "train loss", 3)) == ["a", "b", "c"]
    assert "train loss: 0 of 3" in "".join(shown)


def test_a_terminal_that_is_closed_ends_nothing(monkeypatch):
    on_a_terminal(monkeypatch)

    def gone(text):
        raise OSError(5, "Input/output error")

    sys.stderr.write = gone
    assert list(progress.bar(iter("abc"), "train loss", 3)) == ["a", "b", "c"]
    with progress.waiting("compiling"):
        pass
