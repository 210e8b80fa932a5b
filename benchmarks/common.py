"""What the benchmarks share: the project's modules on the path, and how a result is told and kept."""

import datetime
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(ROOT)

import torch

from nanofit import runtime
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
        "device": runtime.device_name(device),
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
