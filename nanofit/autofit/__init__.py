"""Choose the micro-batch that fits the device, the memory levers and compiling, before training starts.

batch_size x gradient_accumulation_steps is split again: a micro-batch is a part of a batch, or joins several. The
product stays what it was, and so do the batches, the schedule and the model. Sizes are tried in child processes, which
end before training starts: a crash, a leak or a failed compilation there costs nothing.

plan.py holds the values that travel, search.py decides from measurements, fit.py lets trials be made and tells of them,
trials.py and child.py are the two ends of a trial, simulate.py is a trial without a device, advice.py tells more.
"""

import os
from dataclasses import replace

from nanofit.autofit.fit import fit  # the package's own
from nanofit.autofit.plan import KEPT, as_configured, levers_of, note_smaller, noted_smaller  # noqa: F401
from nanofit.units import FITTED, micro_batch_sizes


def as_saved(saved, plan, config, given, ranks=1):
    """plan, split as when a checkpoint was saved: memory may have run out since that run began.

    saved: the checkpoint. config: the run's keys; given: those that were named, which stand. ranks: how many train now.
    Where they are too many to join as many batches as before, it is the next smaller size.
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
    """plan, or what note_smaller left in out_dir where that is smaller. All ranks of a sharded run must call it."""
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


def choose(world, device, config, given, model_args, classes, iter_num, saved):
    """The Plan of a run that begins or goes on at iteration iter_num: fitted, or as saved, or as configured.

    All ranks must call it. classes: GPT and GPTConfig. saved: the checkpoint that it goes on from, or None.
    """
    plan, left = as_configured(config), config["max_iters"] + 1 - iter_num
    if config["dry_run"] or (config["auto_fit"] and (left > 0 or config["eval_only"])):
        plan = fit(world, device, config, given, model_args, classes, left)
    elif saved:
        plan = as_saved(saved, plan, config, given, world.size)
    return plan if config["dry_run"] else no_larger(plan, config["out_dir"], world)
