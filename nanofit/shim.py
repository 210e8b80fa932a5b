# ruff: noqa
# fmt: off
import os, json, contextlib
from dataclasses import replace, asdict
import torch
from nanofit import optimizers, autofit, settings, models, step, machine
from nanofit.sharding import share_like
from nanofit.units import FITTED, micro_batch_sizes
from functools import partial


def load(optimizer, state):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state["state"].items():
        shape = params[index].shape
        for name, value in moments.items():
            if name == "step":
                moments[name] = value.clone()
                continue
            moments[name] = share_like(value[: shape[0]], params[index]).clone()
    for saved, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved.update({k: ours[k] for k in ("fused", "foreach", "capturable") if k in ours})
    optimizer.load_state_dict(state)


def set_lr(o, lr):
    for g in o.param_groups:
        g["lr"] = lr


def as_saved(saved, plan, config, given, ranks=1):
    split = saved.get("split", {})
    if split.get("of") != [plan.batch_size, plan.gradient_accumulation_steps]:
        return plan
    chosen = {n: v for n, v in split.get("levers", {}).items() if n in FITTED and n not in given}
    sizes = micro_batch_sizes(plan.batch_size, plan.gradient_accumulation_steps // ranks)
    size = max(s for s in sizes if s <= split["into"][0])
    if size != plan.batch_size and not config["auto_fit"]:
        print(
            f"batch_size {plan.batch_size} -> {size}, as when the checkpoint was saved; to have it fitted anew, give --auto_fit=True"
        )
    return replace(plan, micro_batch_size=size, levers=replace(plan.levers, **chosen))


def setdefault(m, n, f):
    if not hasattr(m, n):
        setattr(m, n, f)


setdefault(optimizers, "load", load)
setdefault(optimizers, "set_learning_rate", set_lr)
setdefault(autofit, "as_saved", as_saved)
setdefault(autofit, "no_larger", lambda p, *a: p)
old = step.try_compile
step.try_compile = lambda m, d, b, a, mode: old(
    m, partial(step.dry_step, batch=b, autocast=a), d, mode=mode, dynamic=False
)
