"""The answer beside the run: out_dir/auto_fit.json, readable for people."""

import json
import os
from dataclasses import asdict

from nanofit.autofit.plan import Plan, from_dict
from nanofit.files import replacing

NAME = "auto_fit.json"
LARGEST = 2**24  # bytes that an answer may have


def recall(out_dir, key):
    """(the Plan kept in out_dir for a run of the same key, or None, and why not)."""
    path = os.path.join(out_dir, NAME)
    if not os.path.exists(path):
        return None, ""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > LARGEST:
            raise ValueError("a folder or a pipe, or somebody else's")
        with open(path, encoding="utf-8") as f:
            kept = json.load(f)
        if differs := [name for name in key if kept["key"].get(name) != json.loads(json.dumps(key[name]))]:
            return None, f"{path} is for another {differs[0]} and is ignored"
        plan = from_dict(Plan, kept["plan"])
        of = key["batch_size"], key["gradient_accumulation_steps"]
        if plan is None or (plan.batch_size, plan.gradient_accumulation_steps) != of:
            raise ValueError("not an answer")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, f"{path} can't be read and is ignored"
    return plan, ""


def remember(out_dir, key, plan):
    """Keep a plan in out_dir, whole or not at all; '' or why that failed."""
    path = os.path.join(out_dir, NAME)
    kept = asdict(plan)
    trials = kept.pop("trials")
    try:
        os.makedirs(out_dir, exist_ok=True)
        with replacing(path) as f:
            json.dump({"key": key, "plan": kept, "trials": trials}, f, indent=2)
            f.write("\n")
    except OSError as e:
        return f"{path} can't be written ({e.strerror}): the next start will look again"
    return ""
