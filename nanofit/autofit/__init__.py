"""Choose the micro-batch size, the memory levers and whether to compile, before training starts.

batch_size x gradient_accumulation_steps is split again: a micro-batch is a part of a batch, or several batches. The
product, the batches, the schedule and the model stay the same. Sizes are tried in child processes, which end before
training starts: a crash, a leak or a failed compilation there costs nothing.

plan.py holds the values that are passed on. fit.py runs the search and prints what it finds; search.py decides from
measurements. trials.py is the parent's side of a trial and child.py the child's; simulate.py needs no device. advice.py
tells where memory goes, how long a run takes, and what would fit.
"""

import os
from dataclasses import replace

from nanofit.autofit.fit import fit  # the package's own
from nanofit.autofit.plan import KEPT, as_configured, levers_of, note_smaller, noted_smaller  # noqa: F401
from nanofit.autofit.trials import Trials  # noqa: F401
from nanofit.units import FITTED, micro_batch_sizes


def as_saved(saved, plan, config, given, ranks=1):
    """plan with the split of a checkpoint, as memory may have run out since that run began.

    saved: the checkpoint. given: keys that the user gave, which stay. ranks: how many train now. If they are too many
    to join as many batches as before, the next smaller size is taken.
    """
    split = saved.get("split", {})
    if split.get("of") != [plan.batch_size, plan.gradient_accumulation_steps]:
        return plan
    chosen = {name: value for name, value in split.get("levers", {}).items() if name in FITTED and name not in given}
    if plan.levers.optimizer_state != "float32":
        chosen.pop("shard", None)  # settings.py's check_shard says why
    sizes = micro_batch_sizes(plan.batch_size, plan.gradient_accumulation_steps // ranks)
    size = max(size for size in sizes if size <= split["into"][0])
    if size != plan.batch_size:
        again = "to have it fitted anew, give --auto_fit=True"
        print(f"batch_size {plan.batch_size} -> {size}, as when the checkpoint was saved; {again}")
    return replace(plan, micro_batch_size=size, levers=replace(plan.levers, **chosen))


def no_larger(plan, out_dir, world):
    """plan, or the smaller size that note_smaller left in out_dir. All ranks of a sharded run must call it."""
    if not plan.levers.shard:
        return plan
    noted = world.all_gather(noted_smaller(out_dir) if world.is_main else None)[0]
    sizes = micro_batch_sizes(plan.batch_size, plan.gradient_accumulation_steps // world.size)
    smaller = [size for size in sizes if noted == [plan.batch_size, size] and size < plan.micro_batch_size]
    if not smaller:
        return plan
    print(
        f"batch_size {plan.micro_batch_size} -> {smaller[0]}: memory ran out before; on larger GPUs, remove "
        f"{os.path.join(out_dir, KEPT)}"
    )
    return replace(plan, micro_batch_size=smaller[0])


def choose(trials, world, device, config, given, model_args, classes, iter_num, saved):
    """The Plan of a run from iteration iter_num on: fitted, or as saved, or as configured.

    All ranks must call it. trials: a Trials, which is closed. classes: GPT and GPTConfig. saved: the checkpoint to
    resume from, or None.
    """
    plan, left = as_configured(config), config["max_iters"] + 1 - iter_num
    with trials:
        if config["dry_run"] or (config["auto_fit"] and (left > 0 or config["eval_only"])):
            plan = fit(world, device, config, given, model_args, classes, left, trials)
        elif saved:
            plan = as_saved(saved, plan, config, given, world.size)
    return plan if config["dry_run"] else no_larger(plan, config["out_dir"], world)
