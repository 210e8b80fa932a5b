"""The parent's side of a trial: a child process measures one size, and whatever becomes of it is a Trial."""

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

from nanofit.autofit.plan import Facts, Trial, from_json, to_json
from nanofit.errors import OUR_MISTAKE

TRIAL_SECONDS = 600  # a trial that takes longer hangs
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# -P: no module of the current folder can get in its way
COMMAND = [sys.executable, "-P", "-m", "nanofit.autofit.probe"]


def run_trial(job, on_facts=lambda facts: None, seconds=TRIAL_SECONDS):
    """The Trial of a Job. on_facts is given the Facts as soon as the child has told them.

    Only whole lines of JSON with the expected fields count, so that a child that is killed, hangs or prints
    garbage can't be taken for an answer.
    """
    # The child is no rank of this run's. It imports the project from where this process has it.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    facts = trial = None
    child = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=environment, start_new_session=True,
    )  # fmt: skip
    said = collections.deque(maxlen=20)  # the last that it prints, read as it comes, or it would wait for a reader
    listener = threading.Thread(target=lambda: said.extend(filter(str.strip, child.stderr)), daemon=True)
    listener.start()
    late = threading.Event()
    watch = threading.Timer(seconds, lambda: (late.set(), _kill(child)))
    watch.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it died at once; the exit code below says how
            child.stdin.write(to_json(job) + "\n")
            child.stdin.flush()
        for line in child.stdout:
            answer = from_json(line, Facts, Trial) if line.endswith("\n") else None
            if isinstance(answer, Facts):
                on_facts(answer)
                facts = answer
            trial = answer if isinstance(answer, Trial) else trial
        code = child.wait()
        listener.join(timeout=1)  # a compiler worker may outlive the child, and hold its standard error
    finally:
        watch.cancel()
        _kill(child)
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
    if trial and code == 0:
        return replace(trial, limit_bytes=facts.limit_bytes if facts else job.limit_bytes)
    if late.is_set():
        failure = f"took longer than {seconds:.0f} s"
    elif code < 0:
        cause = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        failure = f"was killed by signal {-code}{cause}"
    else:
        said = [line for line in said if OUR_MISTAKE not in line]  # the line before it says more
        last = said[-1].strip().removeprefix("error: ") if said else "no message"
        failure = f"ended with exit code {code} and no answer ({last})" if facts or code else f"gave no answer ({last})"
    return Trial(job.micro_batch_size, job.levers, job.compile, failure=f"the probe {failure}")


def _kill(child):
    """End a child and what it has started."""
    if child.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()
