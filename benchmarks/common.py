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


def finish(benchmark, config, device, figures, save):
    """Print a result as one line of JSON; with save (a path), also write it there, readable for people."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result = {
        "benchmark": benchmark,
        "device": runtime.device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
        "config": {k: v for k, v in config.items() if k != "save"},
        **figures,
    }
    if save:
        with open(save, "w", encoding="utf-8") as f:
            json.dump(result, f, indent=2)
            f.write("\n")
    print(json.dumps(result))
