"""What the benchmarks share: the project's modules on the path, and how a result is told and kept."""

import contextlib
import datetime
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)

import nanofit

nanofit.start()
import torch

from nanofit import machine
from nanofit.errors import UsageError
from nanofit.files import replacing


def _commit():
    """What is checked out, '' where git or its folder isn't there."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return git.stdout.strip()


def keep(benchmark, config, device, figures, save):
    """The result as a dict; with save (a path), also written there, readable for people.

    What takes long calls it after each figure, so that a run that is cut short keeps what it has measured.
    """
    result = {
        "benchmark": benchmark,
        "device": machine.device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "config": {k: v for k, v in config.items() if k != "save"},
        **figures,
    }
    if save:
        with replacing(save) as f:
            json.dump(result, f, indent=2)
            f.write("\n")
    return result


def finish(benchmark, config, device, figures, save):
    """Keep a result, and print it as one line of JSON."""
    print(json.dumps(keep(benchmark, config, device, figures, save)))


ANSWER = "answer: "


class Player:
    """The processes of one side of a comparison, which wait while the other sides take their turns.

    environments: what each process, a rank, finds in its environment. The first is told to take a turn, and answers.
    """

    def __init__(self, name, command, *environments):
        self.name = name
        first, *others = [{**os.environ, **environment} for environment in environments]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        silent = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, env=first, **pipes)
        self.others = [subprocess.Popen(command, env=environment, **silent) for environment in others]

    def play(self):
        """What take_turns was given by one turn."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; the exit code below says how
            self.process.stdin.write("turn\n")
            self.process.stdin.flush()
        line = next((line for line in self.process.stdout if line.startswith(ANSWER)), "")  # others print, too
        if not line:
            raise UsageError(f"the process of {self.name} ended with exit code {self.process.wait()}")
        return json.loads(line.removeprefix(ANSWER))

    def end(self):
        self.process.stdin.close()
        for process in (self.process, *self.others):
            process.wait()


def take_turns(turn, told=sys.stdin):
    """What a Player's process does: for each line that it is told, turn() is called, and its list is the answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to standard error
    for _ in told:
        print(ANSWER + json.dumps(turn()), file=answers, flush=True)
