"""What only a process of its own can show: signals, closed streams, locales, locks that die with their holder."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TORCHRUN, environment, flags, ranks_of, started
from test_cases import KEYS

TRAIN = [sys.executable, str(ROOT / "train.py"), *flags(**KEYS["train.py"])]
LONG = [*TRAIN, "--max_iters=1000000", "--eval_interval=50", "--log_interval=10"]


def shell(command):
    """(exit code, standard output and error) of a command line; $RUN is a short run."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    env = environment(RUN=" ".join(TRAIN), ROOT=str(ROOT), PATH=path)
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, timeout=240)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def saved():
    return torch.load("out/ckpt.pt", weights_only=True)["iter_num"]


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("$RUN > /dev/full", 1, "standard output could not be written (No space left on device); all else was done"),
        ("$RUN <&- >&- 2>&-", 0, ""),
        ("$RUN | head -n 1; exit ${PIPESTATUS[0]}", 1, "its reader has gone"),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $RUN --wandb_project=$'\\u2603'", 0, "saving checkpoint"),
        ("env -i PATH=$PATH $RUN", 0, "saving checkpoint"),
        ("umask 0; $RUN; stat -c %a out/ckpt.pt", 0, "666"),
        ("ulimit -f 20; $RUN", 1, "not saved: out/ckpt.pt can't be written (File too large)"),
        ("$RUN; (ulimit -f 20; python $ROOT/export.py --weights_only_to=w.pt)", 1, "w.pt can't be written (File too"),
    ],
)
def test_streams_and_limits(command, code, said):
    ended, printed = shell(command)
    assert "Traceback" not in printed, printed
    assert (ended, said in printed) == (code, True), printed
    if code == 0:
        assert saved() == 2


def probes():
    """The processes of probes that run on this machine for this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"nanofit.autofit.child" in (process / "cmdline").read_bytes() and (process / "cwd").samefile("."):
                found.append(process.name)
    return found


BEGINS = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import nanofit
nanofit.start()
print("begins", flush=True)
runpy.run_path({TRAIN[1]!r}, run_name="__main__")
"""


@pytest.mark.parametrize("auto_fit", [False, True])
def test_ctrl_c_at_any_moment_is_a_line(auto_fit):
    """From the first import on; before that, Python itself starts."""
    Path("begins.py").write_text(BEGINS)
    early = []
    for seconds in range(8) if auto_fit else [i / 3 for i in range(15)]:
        with started(sys.executable, "begins.py", *LONG[2:], f"--auto_fit={auto_fit}", until="begins") as child:
            time.sleep(seconds)
            child.send_signal(signal.SIGINT)
            code = child.wait(60)
        text = Path("log").read_text()
        # By the signal itself once Python has put its handlers away.
        assert code in (130, -signal.SIGINT), f"after {seconds} s: code {code}, {text}"
        assert "Traceback" not in text, text
        early.append(text.splitlines()[-1] == "interrupted")
        assert early[-1] or "SIGINT before iteration" in text
    assert any(early)
    end = time.monotonic() + 30
    while probes():
        assert time.monotonic() < end, "a probe was left behind"
        time.sleep(0.1)


TELL_PID = "open('pid' + os.environ['RANK'], 'w').write(str(os.getpid()))"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others_in_words(number, victim):
    ranks = ranks_of(2, first=TELL_PID, **{**KEYS["train.py"], "gradient_accumulation_steps": 2})
    with started(*TORCHRUN, *ranks, *LONG[-3:], until="iter 60:") as launcher:  # after a checkpoint
        os.kill(int(Path(f"pid{victim}").read_text()), number)
        launcher.wait(timeout=120)
    printed = Path("log").read_text()
    if number == signal.SIGKILL:
        assert f"rank {1 - victim} has lost another" in printed
        assert saved() % 50 == 0
    code, printed = shell("$RUN --init_from=resume --max_iters=0")
    assert code == 0, printed
