"""What the keys of a run may be. Everything here is looked at before anything is written."""

import math
import os
from dataclasses import asdict

from nanofit import machine, models, optimizers
from nanofit.autofit import compiling
from nanofit.errors import UsageError, shown
from nanofit.units import CONTEXT_BYTES, GIB, GPT2_SIZES, gib

BLOCK_BYTES = 20_000  # that a block takes of a machine's memory, whatever its size: Python's own objects
BEYOND_REASON = 2**50  # bytes that no device has, in this machine or another
BATCH_BYTES = 18  # that a token of a batch takes there: as it is stored, and twice as int64
# Keys that the ranks of a run may be given differently; folder.take sees to it that all go on from the same iteration.
OF_A_RANK = (
    "out_dir", "init_from", "wandb_log", "wandb_project", "wandb_run_name", "tensorboard_log", "backend",
    "wait_minutes", "device", "memory_limit_gb", "compile_min_sms",
)  # fmt: skip
# What may differ from a checkpoint without a word, where it wasn't named: where things lie, what is shown and to whom,
# what is asked for once, and loss_chunk_mb, which is by the memory there is.
OF_NO_CONSEQUENCE = (
    "log_interval", "wandb_log", "wandb_project", "wandb_run_name", "tensorboard_log",
    "eval_only", "dry_run", "ranks", "loss_chunk_mb",
)  # fmt: skip
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def at_least(minimum, config, *keys):
    """Raise a UsageError for the first of these keys whose value is below minimum, or infinite."""
    for key in keys:
        if not config[key] >= minimum:  # a nan is not at least anything
            raise UsageError(f"{key} must be at least {minimum}, not {config[key]}")
        if config[key] == math.inf:
            raise UsageError(f"{key} must be a finite number, not {config[key]}")


def one_of(choices, config, key):
    """Raise a UsageError if config[key] is not among choices."""
    if config[key] not in choices:
        raise UsageError(f"{key} must be one of {', '.join(map(repr, choices))}, not {config[key]!r}")


def dtype(config, given):
    """The precision to compute in: as asked for, else the best of the device."""
    if "dtype" not in given:
        return "bfloat16" if is_elsewhere(config) else machine.best_dtype(config["device"])
    one_of(tuple(machine.DTYPES), config, "dtype")
    return config["dtype"]


def is_elsewhere(config):
    """Whether a plan is asked for, for a device that isn't in this machine."""
    return config.get("dry_run", False) and config["memory_limit_gb"] > 0 and not machine.is_here(config["device"])


def shared(config):
    """The keys that all ranks of a run must have been given alike, with their values."""
    return {key: value for key, value in config.items() if key not in OF_A_RANK}


def check(config, world):
    """Raise a UsageError for the first key of train.py that can't be what it is."""
    at_least(1, config, "batch_size", "block_size", "gradient_accumulation_steps")
    at_least(1, config, "eval_interval", "eval_iters", "log_interval")
    at_least(1, config, "ranks")
    at_least(0, config, "max_iters", "warmup_iters", "grad_clip", "weight_decay", "learning_rate", "min_lr")
    at_least(0, config, "memory_limit_gb", "compile_min_sms", "beta1", "beta2", "loss_chunk_mb")
    if not 0 < config["wait_minutes"] <= 60 * 24 * 365:
        raise UsageError(f"wait_minutes must be above 0 and at most a year, not {config['wait_minutes']}")
    if config["memory_limit_gb"] * 2**30 > BEYOND_REASON:
        raise UsageError(f"memory_limit_gb={config['memory_limit_gb']} is more than any device has: it counts GiB")
    for key in ("beta1", "beta2"):
        if not config[key] < 1:
            raise UsageError(f"{key} must be below 1, not {config[key]}")
    one_of(COMPILE_MODES, config, "compile_mode")
    one_of(optimizers.OPTIMIZER_STATES, config, "optimizer_state")
    optimizers.require(config["optimizer_state"])
    init_from = config["init_from"]
    if init_from not in ("scratch", "resume", "auto", *GPT2_SIZES) and not os.path.isdir(init_from):
        raise UsageError(
            f"init_from must be 'scratch', 'resume', 'auto', one of {', '.join(GPT2_SIZES)}, or a folder that "
            f"holds a Hugging Face GPT-2, not {init_from!r}"
        )
    if config["ranks"] > 1 and not is_elsewhere(config):
        check_ranks(config, world)
    ranks, steps = max(world.size, config["ranks"]), config["gradient_accumulation_steps"]
    if steps % ranks:
        below = steps // ranks * ranks
        nearest = [str(n) for n in (below, below + ranks) if n]
        raise UsageError(
            f"gradient_accumulation_steps={steps} can't be shared equally by {ranks} ranks: "
            f"set it to {' or '.join(nearest)}"
        )
    if config["shard"]:
        check_shard(config, ranks)
    elif config["gather_once"] and not (config["auto_fit"] or config["dry_run"] or init_from in ("resume", "auto")):
        raise UsageError("gather_once is for a model that ranks share out: it needs shard=True, or leave it out")
    if is_elsewhere(config):
        if world.size > 1:
            raise UsageError("a plan for a device that isn't here is simulated in one process: start without torchrun")
        if config["device"].startswith("cuda") and config["memory_limit_gb"] * GIB <= CONTEXT_BYTES:
            raise UsageError(
                f"memory_limit_gb={config['memory_limit_gb']} is the whole memory of a planned {config['device']}, of "
                f"which CUDA itself takes {gib(CONTEXT_BYTES)}: give more"
            )
    elif config["dry_run"] and not machine.is_here(config["device"]):
        raise UsageError(
            f"there is no {config['device']} here: to plan for one, say how much memory it has: --memory_limit_gb=12"
        )
    else:
        check_compile_mode(config)


def check_ranks(config, world):
    """Raise a UsageError where ranks, which is for the plan of a device that isn't here, can't be that.

    A plan that lacks its device's memory passes: check tells that of one rank as well.
    """
    ranks, device = config["ranks"], config["device"]
    start = f"to train on several, start with torchrun --nproc_per_node={ranks}"
    if world.size > 1:
        raise UsageError(f"ranks={ranks} is for a plan in one process, and torchrun started {world.size}: leave it out")
    if machine.is_here(device):
        raise UsageError(f"ranks={ranks} is for the plan of a device that isn't here, and {device} is: {start}")
    if not config["dry_run"]:
        memory = "" if config["memory_limit_gb"] else " and the memory of each: --memory_limit_gb=12"
        raise UsageError(f"ranks={ranks} is for a plan, which takes --dry_run=True{memory}; {start}")


def check_shard(config, ranks):
    """Raise a UsageError for what a model that is shared out among the ranks can't be combined with."""
    if ranks == 1:
        raise UsageError("shard=True shares a model out among several ranks: start with torchrun, or leave it out")
    if config["optimizer_state"] != "float32":
        raise UsageError(
            f"optimizer_state={config['optimizer_state']!r} keeps the state of whole weights, and with shard=True no "
            "rank has any: use 'float32', whose state is shared out as well"
        )


def check_compile_mode(config):
    """Raise a UsageError where the GPU is too small for compile_mode."""
    device = machine.find_device(config["device"])
    if config["compile"] and device.type == "cuda":
        mode, min_sms = config["compile_mode"], config["compile_min_sms"]
        if refusal := compiling.refuse_mode(mode, machine.sm_count(device), min_sms):
            raise UsageError(refusal)


def weight_bytes(model_args):
    """What the weights of a GPT of these sizes take in float32."""
    layers, width = model_args["n_layer"], model_args["n_embd"]
    return 4 * (layers * 12 * width**2 + (model_args["vocab_size"] + model_args["block_size"]) * width)


def check_sizes(config, config_class, model_args, elsewhere):
    """Raise a UsageError where the model refuses its sizes, or it or a batch can't be in this machine's memory."""
    counts = [name for name in models.SIZES if name not in ("bias", "dropout")]
    at_least(1, model_args, *counts)
    for name in counts:
        if model_args[name] >= 2**63:
            raise UsageError(f"{name} must be a number of 64 bits, not {shown(model_args[name])}")
    layers, width, there = model_args["n_layer"], model_args["n_embd"], machine.host_memory_bytes()
    weights = weight_bytes(model_args)
    positions = model_args["block_size"]
    a_model = (
        f"a model of n_layer={layers}, n_embd={width}, vocab_size={model_args['vocab_size']}, block_size={positions}"
    )
    a_batch = f"a batch of batch_size={config['batch_size']}, block_size={positions}"
    for what, needed, limit in (
        (a_model, layers * BLOCK_BYTES + weights, BEYOND_REASON if elsewhere else there),
        (a_model, layers * BLOCK_BYTES, there),
        (a_batch, config["batch_size"] * (positions + 1) * BATCH_BYTES, there),
    ):
        if needed > limit:
            raise UsageError(
                f"{what} takes {needed / 2**30:,.1f} GiB, and this machine has {there / 2**30:.1f}: make it smaller"
            )
    models.config_of(config_class, model_args)


def opening_lines(config, given, device, dtype, model_args, tokens_per_iter, iter_num=0, meta=None):
    """What a run tells first: where it computes, on what, and whether there is anything to do.

    iter_num: where it goes on. meta: that of the data set, where it has one.
    """
    where = f"device {device}{'' if 'device' in given else ' (the best one here)'}"
    how = f"dtype {dtype}{'' if 'dtype' in given else ' (the best for it)'}"
    nothing_left = f"nothing is left to train: max_iters={config['max_iters']} was the last iteration"
    limit = config["memory_limit_gb"] and not config["auto_fit"] and str(device) in ("cpu", "mps")
    if config["init_from"] != "scratch":
        whose = "the checkpoint's" if config["init_from"] == "resume" else "the model's"
    else:
        whose = f"of data/{config['dataset']}/meta.pkl" if meta else "GPT-2's 50257, rounded up"
    return [
        f"{where}, {how}, vocab_size {model_args['vocab_size']} ({whose})",
        *([f"memory_limit_gb: without auto_fit nothing holds a run to it on {device}"] if limit else []),
        f"tokens per iteration will be: {tokens_per_iter:,}",
        *([] if anything_left(config, iter_num) else [nothing_left]),
    ]


def anything_left(config, iter_num):
    """Whether a run that begins or goes on at iteration iter_num has anything to do."""
    return config["eval_only"] or iter_num <= config["max_iters"]


def differences(saved, config, given, levers, ranks):
    """Lines on the keys that differ from the checkpoint's, and what becomes of each.

    Of those that weren't named, and so fell back to their defaults, the ones that matter to what is learnt or to how
    the run goes: not those OF_NO_CONSEQUENCE. saved: a checkpoint. levers: the MemoryLevers in use, which resuming
    takes from the checkpoint, or auto-fit chooses. ranks: how many train.
    """
    sizes, saved_levers = saved["model_args"], saved.get("split", {}).get("levers", {})
    kept = {**{name: size for name, size in sizes.items() if name not in ("dropout", "block_size")}, **_adamw_of(saved)}
    before = {**saved["config"], **_in_use(saved_levers, len(saved.get("rng", ()))), **sizes, **kept}
    taken, ignored = [], []
    for key, value in {**config, **_in_use(asdict(levers), ranks)}.items():
        was = before.get(key, value)
        if type(was) not in (*models.KEY_TYPES, type(None)) or was == value or key in ("out_dir", "init_from"):
            continue
        was = shown(was, str)
        if key not in given:
            if key not in (*kept, "block_size", *OF_NO_CONSEQUENCE):
                taken.append(f"{key} {was} -> {value} (not given)")
        elif key in kept:
            ignored.append(f"{key} {was}, not {value}")
        else:
            taken.append(f"{key} {was} -> {value}")
    lines = [f"differs from the checkpoint, and is taken: {', '.join(taken)}"] if taken else []
    return lines + ([f"differs, but stays as it is in the checkpoint: {', '.join(ignored)}"] if ignored else [])


def _in_use(levers, ranks):
    """{key: value} of those levers, a dict, that a run on so many ranks says of itself by what it does."""
    in_use = {name: value for name, value in levers.items() if name in ("recompute", "shard", "gather_once")}
    for name in ("shard", "gather_once"):
        if name in in_use:
            in_use[name] = in_use[name] and ranks > 1 and levers.get("shard", False)
    return in_use


def _adamw_of(saved):
    """{key: value} of what a resumed run takes from a checkpoint's AdamW; its config tells what was asked for last."""
    found = {}
    for group in saved["optimizer"]["param_groups"]:
        if "weight_decay" in group:  # 0 in the group of what isn't decayed
            found["weight_decay"] = max(float(group["weight_decay"]), found.get("weight_decay", 0.0))
        if "betas" in group:
            found["beta1"], found["beta2"] = map(float, group["betas"])
    return found


def crop_to(block_size, trained_with, init_from):
    """The block_size to train with, of a model that has so many positions; UsageError where it has fewer."""
    if block_size > trained_with:
        raise UsageError(
            f"block_size={block_size} is more than the {trained_with} positions that the model of "
            f"init_from={init_from!r} was trained with: set --block_size={trained_with} or less"
        )
    return block_size
