"""The parent's side of trials: run Jobs in child processes. However a child ends, the answer is a Trial."""

import collections
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

from nanofit.autofit.plan import Facts, Trial, from_json, to_json

TRIAL_SECONDS = 1800  # a trial that takes longer hangs; on few cores, compiling alone may take many minutes
FAREWELL_SECONDS = 10  # for a child that has compiled to end its compiler's workers
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Variables that the child must not see: it would look for the other ranks, and report to torchrun.
OF_RANKS = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|TORCH_DIST.*|TORCHELASTIC_.*")
# -P: no module of the current folder can shadow one of ours
COMMAND = [sys.executable, "-P", "-m", "nanofit.autofit.child"]


class Trials:
    """Runs Jobs in child processes. A child is used again only if the next Job differs in size alone.

    Only whole lines of JSON with the expected fields count, so that a child that is killed, hangs or prints garbage
    gives no answer. close() ends the last child, which may hold memory of the device until then. begins: the first
    child starts now, as its imports take seconds.
    """

    def __init__(self, begins=False):
        self._process = self._job = None  # the child, and what it answered last
        if begins:
            self._start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __call__(self, job, on_facts=lambda facts: None, seconds=TRIAL_SECONDS):
        """The Trial of a Job. on_facts gets the Facts about its device as soon as they are known."""
        if job.simulate:
            from nanofit.autofit.simulate import simulate  # which imports torch

            return simulate(job)
        if not self._may_go_on_with(job):
            self.close()
            self._start()
        self._job = job
        try:
            trial = self._answer(job, on_facts, seconds)
        except BaseException:
            self.close()
            raise
        if not trial.fits or job.compile:  # the child may hold memory now
            self.close()
        return trial

    def _may_go_on_with(self, job):
        """Whether the child can measure this Job: it differs from the last in size alone.

        On a CPU the peak counts from the start of the process, so the size must also be larger.
        """
        if not self._process or self._process.poll() is not None:
            return False
        if self._job is None:
            return True
        same = {name: getattr(self._job, name) for name in ("micro_batch_size", "micro_steps", "limit_bytes")}
        grows = job.micro_batch_size > self._job.micro_batch_size or job.device != "cpu"
        return grows and replace(job, **same) == self._job

    def _start(self):
        environment = {name: value for name, value in os.environ.items() if not OF_RANKS.fullmatch(name)}
        # It imports the project from where this process has it.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", env=environment, start_new_session=True,
        )  # fmt: skip
        self._said = collections.deque(maxlen=20)  # its last lines, read at once so that the pipe never fills
        lines = filter(str.strip, self._process.stderr)
        self._listener = threading.Thread(target=self._said.extend, args=(lines,), daemon=True)
        self._listener.start()

    def _answer(self, job, on_facts, seconds):
        facts = trial = None
        late = threading.Event()
        watch = threading.Timer(seconds, lambda: (late.set(), self._kill()))
        watch.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; the exit code below says how
                self._process.stdin.write(to_json(job) + "\n")
                self._process.stdin.flush()
            import torch._dynamo  # noqa: F401  # the first optimizer needs it; here its import costs no time

            for line in self._process.stdout:
                answer = from_json(line, Facts, Trial) if line.endswith("\n") else None
                if isinstance(answer, Facts):
                    facts = answer
                    on_facts(facts)
                if isinstance(answer, Trial):
                    trial = answer
                    break
        finally:
            watch.cancel()
        if trial:
            return replace(trial, limit_bytes=facts.limit_bytes if facts else job.limit_bytes)
        failure = f"took longer than {seconds:.0f} s" if late.is_set() else self._how_it_ended(facts)
        return Trial(job.micro_batch_size, job.levers, job.compile, failure=f"the probe {failure}")

    def _how_it_ended(self, facts):
        code = self._process.wait()
        self._listener.join(timeout=1)  # a compiler worker may outlive the child, and hold its standard error
        if code < 0:
            cause = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
            return f"was killed by signal {-code}{cause}"
        said = [line for line in self._said if line.startswith("error: ")] or self._said
        last = said[-1].strip().removeprefix("error: ") if said else "no message"
        return f"ended with exit code {code} and no answer ({last})" if facts or code else f"gave no answer ({last})"

    def close(self):
        """End the child, if there is one."""
        if not self._process:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # which ends it
        if self._job and self._job.compile:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(FAREWELL_SECONDS)
        self._kill()
        self._process = None

    def _kill(self):
        """End the process and what it has started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
            self._process.wait()
