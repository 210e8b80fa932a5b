"""The answer beside the run: out_dir/auto_fit.json, readable for people."""

import json
import os
from dataclasses import asdict

from nanofit.autofit.plan import Plan, from_dict
from nanofit.errors import shown
from nanofit.files import replacing
from nanofit.units import gib

NAME = "auto_fit.json"
LARGEST = 2**24  # bytes that an answer may have
MOST_TOLD = 4  # differences between two runs


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
        if differs := _differences(kept["key"], json.loads(json.dumps(key))):
            more = f", and {len(differs) - MOST_TOLD} more" if len(differs) > MOST_TOLD else ""
            return None, f"{path} was found with {', '.join(differs[:MOST_TOLD])}{more}: looking again"
        plan = from_dict(Plan, kept["plan"])
        of = key["batch_size"], key["gradient_accumulation_steps"]
        if plan is None or (plan.batch_size, plan.gradient_accumulation_steps) != of:
            raise ValueError("not an answer")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, f"{path} can't be read and is ignored"
    return plan, ""


def _differences(before, now):
    """What differs between the keys of two answers, in words: 'ranks 2 (now 1)'; of a model, each of its sizes."""
    told = []
    for name, value in now.items():
        words = {"levers_that_are_set": "levers set by hand"}.get(name, name)
        was = before.get(name)
        if name not in before:
            told.append(f"no {words}")  # by an earlier version
        elif isinstance(was, dict) and isinstance(value, dict):
            told += _differences({**dict.fromkeys(value), **was}, {**dict.fromkeys(was), **value})
        elif was != value:
            told.append(f"{words} {_short(name, was)} (now {_short(name, value)})")
    return told


def _short(name, value):
    """A value of an answer's key for a sentence."""
    if name == "memory" and isinstance(value, (int, float)):
        return gib(value)
    if isinstance(value, list):
        value = " and ".join(map(str, value))
    return "none" if value in (None, "") else shown(value, str)


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
