"""What only a process of its own can show: signals, closed streams, locales, locks that die with their holder."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, flags
from test_cases import KEYS

TRAIN = [sys.executable, str(ROOT / "train.py"), *flags(**KEYS["train.py"])]
LONG = [*TRAIN, "--max_iters=1000000", "--eval_interval=50", "--log_interval=10"]


def shell(command, **more):
    """(exit code, standard output and error) of a command line; $RUN is a short run."""
    env = environment(RUN=" ".join(TRAIN), **more)
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, timeout=240)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


@contextlib.contextmanager
def started(command=LONG, until="saving checkpoint to", **more):
    """A process that has printed this much; it is killed at the end if it hasn't ended."""
    with open("log", "w") as log:
        child = subprocess.Popen(command, env=environment(PYTHONUNBUFFERED="1", **more), stdout=log, stderr=log)
    try:
        end = time.monotonic() + 240
        while until not in Path("log").read_text():
            assert child.poll() is None, Path("log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def iterations():
    return [int(i) for i in re.findall(r"^iter (\d+)", Path("log").read_text(), re.MULTILINE)]


def saved():
    return torch.load("out/ckpt.pt", weights_only=True)["iter_num"]


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("$RUN > /dev/full", 1, "standard output could not be written (No space left on device); all else was done"),
        ("$RUN >&-", 0, ""),
        ("$RUN 2>&-", 0, "saving checkpoint"),
        ("$RUN <&- >&- 2>&-", 0, ""),
        ("$RUN | head -n 1; exit ${PIPESTATUS[0]}", 1, "its reader has gone"),
        ("PYTHONUNBUFFERED=1 $RUN | head -n 1; exit ${PIPESTATUS[0]}", 1, "its reader has gone"),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $RUN --wandb_project=$'\\u2603'", 0, "saving checkpoint"),
        ("env -i PATH=$PATH $RUN", 0, "saving checkpoint"),
        ("umask 0; $RUN; stat -c %a out/ckpt.pt", 0, "666"),
        ("ulimit -f 20; $RUN", 1, "not saved: out/ckpt.pt can't be written (File too large)"),
        ("mkdir gone; cd gone; rmdir ../gone; $RUN", 1, "error:"),
    ],
)
def test_streams_and_limits(command, code, said):
    ended, printed = shell(command)
    assert "Traceback" not in printed, printed
    assert (ended, said in printed) == (code, True), printed
    if code == 0:
        assert saved() == 2


def test_a_second_run_says_who_holds_the_folder_and_a_killed_one_holds_nothing():
    with started() as first:
        code, printed = shell("$RUN")
        assert code == 1
        assert f"in use by process {first.pid} on " in printed
        first.kill()
        first.wait()
    code, printed = shell("$RUN --init_from=resume --max_iters=0")
    assert code == 0, printed


def test_a_run_that_was_stopped_goes_on():
    with started() as child:
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        before = iterations()
        time.sleep(1)
        assert iterations() == before
        child.send_signal(signal.SIGCONT)
        while iterations()[-1] == before[-1]:
            time.sleep(0.05)
        child.terminate()
        assert child.wait(60) == 128 + signal.SIGTERM
    assert "checkpoint saved to out" in Path("log").read_text()


@pytest.mark.parametrize("moment", ["torch is loaded", "tokens per iteration", "number of parameters", "iter 0:"])
def test_an_early_ctrl_c_is_a_line(moment):
    """From the import of torch on; before that, Python itself starts."""

    def reached(child):
        if moment != "torch is loaded":
            return moment in Path("log").read_text()
        return "libtorch" in Path(f"/proc/{child.pid}/maps").read_text()

    with started(until="") as child:
        while not reached(child):
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 128 + signal.SIGINT, Path("log").read_text()
    assert "Traceback" not in Path("log").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others_in_words(number, victim):
    script = Path("ranks.py")
    script.write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "open('pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    keys = [*flags(**{**KEYS["train.py"], "gradient_accumulation_steps": 2, "backend": "gloo"}), *LONG[-3:]]
    with started([*together, *keys]) as launcher:
        os.kill(int(Path(f"pid{victim}").read_text()), number)
        launcher.wait(timeout=120)
    printed = Path("log").read_text()
    assert "mistake of the program's" not in printed, printed
    assert saved() % 50 == 0 or number == signal.SIGTERM
    code, printed = shell("$RUN --init_from=resume --max_iters=0")
    assert code == 0, printed
