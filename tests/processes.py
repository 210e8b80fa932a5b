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


def shell(command, **more):
    """(exit code, standard output and error) of a command line; $RUN is a short run."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    env = environment(RUN=" ".join(TRAIN), ROOT=str(ROOT), PATH=path, **more)
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


def script_of(name, first):
    """The file of a wrapper: a script of the project, which does this line first."""
    path = ROOT / name
    Path("wrapper.py").write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = {str(path)!r}\n{first}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return "wrapper.py"


def probes():
    """The processes of probes that run on this machine for this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"nanofit.autofit.child" in (process / "cmdline").read_bytes() and (process / "cwd").samefile("."):
                found.append(process.name)
    return found


def interrupted(script, keys, moments):
    """Ctrl-C so many seconds after the start of a script: what it printed each time, which is no traceback."""
    command = [sys.executable, script_of(script, "import nanofit; nanofit.start(); print('begins', flush=True)"), *keys]
    printed = []
    for seconds in moments:
        with started(*command, until="begins") as child:
            time.sleep(seconds)
            if child.poll() is not None:
                break  # it was through
            child.send_signal(signal.SIGINT)
            code = child.wait(60)
        text = Path("log").read_text()
        # Where all is done: 0, or by the signal itself once Python has put its handlers away.
        assert code in (130, 0, -signal.SIGINT), f"after {seconds} s: code {code}, {text}"
        assert "Traceback" not in text, text
        printed.append(text)
    return printed


@pytest.mark.parametrize("auto_fit", [False, True])
def test_ctrl_c_at_any_moment_is_a_line(auto_fit):
    """From the first import on; before that, Python itself starts."""
    moments = range(8) if auto_fit else [i / 3 for i in range(15)]
    said = interrupted("train.py", [*LONG[2:], f"--auto_fit={auto_fit}"], moments)
    assert len(said) == len(moments)
    early = [text.splitlines()[-1] == "interrupted" for text in said]
    assert any(early)
    assert all(words or "SIGINT before iteration" in text for words, text in zip(early, said, strict=True))
    end = time.monotonic() + 30
    while probes():
        assert time.monotonic() < end, "a probe was left behind"
        time.sleep(0.1)


# ---- ranks -------------------------------------------------------------------------------------------------


TELL_PID = "open('pid' + os.environ['RANK'], 'w').write(str(os.getpid()))"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others_in_words(number, victim):
    ranks = ranks_of(2, first=TELL_PID, **{**KEYS["train.py"], "gradient_accumulation_steps": 2})
    with started(*TORCHRUN, *ranks, *LONG[-3:], until="saving checkpoint to") as launcher:
        os.kill(int(Path(f"pid{victim}").read_text()), number)
        launcher.wait(timeout=120)
    printed = Path("log").read_text()
    if number == signal.SIGKILL:
        assert f"rank {1 - victim} has lost another" in printed
        assert saved() % 50 == 0
    code, printed = shell("$RUN --init_from=resume --max_iters=0")
    assert code == 0, printed
