"""Choose the micro-batch that fits the device, the memory levers, and compiling, before training starts.

batch_size x gradient_accumulation_steps is split again; the product stays what it was, and so do the batches,
the schedule and the model. A micro-batch always divides batch_size, because batches are drawn whole and then
cut. Sizes are tried in child processes (probe.py), one a trial, which end before training starts: a crash, a
leak or a failed compilation there costs nothing.

plan.py holds the values that travel, search.py and compiling.py decide, trial.py and probe.py are the two sides of a
trial, simulate.py is a trial without a device, advice.py knows what would fit, cache.py keeps the answer.
"""

import time
from dataclasses import fields, replace

from nanofit.autofit.plan import Plan
from nanofit.units import GIB, MemoryLevers


def levers_of(config):
    """The MemoryLevers among a run's keys."""
    return MemoryLevers(**{lever.name: config[lever.name] for lever in fields(MemoryLevers)})


def as_configured(config):
    """The Plan of a run that nothing is chosen for."""
    return Plan(
        batch_size=config["batch_size"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        micro_batch_size=config["batch_size"],
        levers=levers_of(config),
        compile=config["compile"],
        limit_bytes=int(config["memory_limit_gb"] * GIB),
    )


def fit(world, device, config, given, model_args, model_class, iterations_left):
    """The Plan for a run, the same split on every rank. All ranks must call it.

    device: a torch.device, or the name of one that isn't here: then steps are simulated. config: the run's keys;
    given: those that were named. Raises UsageError on every rank where nothing fits or a rank can't tell.
    """
    # Here, because a trial's child process imports this package for its values alone.
    from nanofit.autofit import trial
    from nanofit.units import duration

    began = time.monotonic()
    with trial.Trials() as run_trial:
        plan = _fit(run_trial, world, device, config, given, model_args, model_class, iterations_left)
    print(f"auto-fit: {plan}, found in {duration(time.monotonic() - began)}")
    return plan


def _fit(run_trial, world, device, config, given, model_args, model_class, iterations_left):
    from nanofit import machine, models
    from nanofit.autofit import advice, cache
    from nanofit.autofit.fitter import Fitter
    from nanofit.autofit.plan import Job
    from nanofit.units import FITTED

    elsewhere, dry_run = isinstance(device, str), config["dry_run"]
    ranks = config["ranks"] if elsewhere else world.size
    job = Job(
        model_file=models.file_of(model_class),
        model_args=model_args,
        device=str(device),
        dtype=config["dtype"],
        grad_clip=config["grad_clip"],
        levers=levers_of(config),
        compile_mode=config["compile_mode"],
        memory_limit_gb=config["memory_limit_gb"],
        sharers=1 if elsewhere or device.type != "cpu" else world.local_size,
        simulate=elsewhere,
    )
    fitter = Fitter(
        job=job,
        batch_size=config["batch_size"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        world_size=ranks,
        asked_compile=config["compile"],
        compile_min_sms=config["compile_min_sms"],
        iterations_left=iterations_left,
        may_recompute="recompute" not in given,
        may_shard="shard" not in given and config["optimizer_state"] == "float32",
        may_gather_once="gather_once" not in given,
        may_shrink=config["init_from"] == "scratch",
        advises=world.is_main,
        run_trial=run_trial,
    )
    key = {
        **({} if elsewhere else machine.device_info(device)),
        "model": model_args,
        "ranks": ranks,
        "levers_that_are_set": [name for name in FITTED if name in given],
        **{name: config[name] for name in ASKED},
    }
    # Rank 0 keeps the answer and tells it, so that ranks on other machines look at the same one.
    remembered = None
    if world.is_main and not dry_run:
        remembered, why = cache.recall(config["out_dir"], key)
        if why:
            print(f"auto-fit: {why}")
    remembered = world.all_gather(remembered)[0]

    plans = world.agree(lambda: fitter.plan(remembered))
    own = plans[world.rank]
    plan = smallest(plans, own)
    if world.size > 1:
        chosen = [f"{p.micro_batch_size}{p.levers}" for p in plans]
        if len(set(chosen)) > 1:
            taken = f"{plan.micro_batch_size}{plan.levers}"
            print(f"auto-fit: the ranks chose batch_size {'; '.join(chosen)}: all take {taken}")
        world.agree(lambda: fitter.check(own, plan.micro_batch_size, plan.levers))
    if world.is_main and dry_run:
        ways = {"": plan.levers.shard}
        if ranks > 1:
            ways = {f"each of {ranks} ranks, whole: ": False, f"each of {ranks} ranks, sharded: ": True}
        for who, shard in ways.items():
            levers = replace(plan.levers, shard=shard)
            parts = run_trial(replace(fitter.job_of(plan.micro_batch_size), levers=levers, simulate=True)).parts
            print(f"auto-fit: {who}{advice.where_it_goes(parts) if parts else 'where memory goes is not known'}")
    elif world.is_main and not config["eval_only"] and (why := cache.remember(config["out_dir"], key, plan)):
        print(f"auto-fit: {why}")
    return plan


ASKED = (  # keys of the run that an answer depends on
    "batch_size", "gradient_accumulation_steps", "dtype", "compile", "compile_mode", "compile_min_sms", "max_iters",
    "memory_limit_gb", "grad_clip", *(lever.name for lever in fields(MemoryLevers)),
)  # fmt: skip


def smallest(plans, own):
    """The Plan of all ranks: its size fits each of them; limits and figures are this rank's own."""
    levers = [plan.levers for plan in plans]
    sharded = any(of_rank.shard for of_rank in levers)
    return replace(
        own,
        micro_batch_size=min(plan.micro_batch_size for plan in plans),
        compile=all(plan.compile for plan in plans),
        levers=replace(
            own.levers,
            recompute=any(of_rank.recompute for of_rank in levers),
            shard=sharded,
            gather_once=all(of_rank.gather_once for of_rank in levers if of_rank.shard or not sharded),
        ),
    )
