"""What the keys of a run may be, and what a run says of them first. Nothing here writes a file."""

import math
import os

from nanofit import cards, machine, models, optimizers
from nanofit.batches import SAMPLINGS
from nanofit.errors import UsageError, shown
from nanofit.units import GPT2_SIZES

# Keys that may differ between the ranks of a run. folder.take makes sure that all go on from the same iteration.
OF_A_RANK = (
    "out_dir", "init_from", "wandb_log", "wandb_project", "wandb_run_name", "tensorboard_log", "backend",
    "wait_minutes", "device", "memory_limit_gb", "compile_min_sms", "save_minutes", "keep",
)  # fmt: skip
# What a resumed run doesn't take from its checkpoint: where it is, and what was asked for once.
NOT_TAKEN = ("out_dir", "init_from", "eval_only", "dry_run", "gpu", "ranks")
COMPILE_MODES = ("auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
BATCHES = ("block_size", "vocab_size")  # sizes of a model that batches have as well


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
        gpu = config.get("gpu")  # a key of train.py's alone
        return cards.best_dtype(cards.named(gpu).capability) if gpu else machine.best_dtype(config["device"])
    one_of(tuple(machine.DTYPES), config, "dtype")
    return config["dtype"]


def of_a_plan(config, given):
    """{key: value} that follow from a plan for the card that gpu names. UsageError where a plan lacks a card."""
    if config["gpu"]:
        cards.named(config["gpu"])
        return {"dry_run": True, "device": "cuda"}
    # A limit alone may be meant as the size of a card, where there is none.
    device = config["device"]
    no_card = device.startswith("cuda") and not machine.is_here(device)
    unclear = "memory_limit_gb" in given and "device" not in given and device == "cpu"
    if config["dry_run"] and (no_card or unclear):
        here = "; memory_limit_gb is a limit for the device that is here: --device=cpu" if unclear else ""
        raise UsageError(
            f"there is no CUDA GPU here: name the card that the plan is for, as in --gpu='RTX 3060' or --gpu=12GB{here}"
        )
    return {}


def shared(config):
    """The keys that all ranks of a run must have been given alike, with their values."""
    return {key: value for key, value in config.items() if key not in OF_A_RANK}


def check(config, world):
    """Raise a UsageError for the first key of train.py that can't be what it is."""
    at_least(1, config, "batch_size", "block_size", "gradient_accumulation_steps", "ranks")
    at_least(1, config, "eval_interval", "eval_iters", "log_interval")
    at_least(0, config, "max_iters", "warmup_iters", "grad_clip", "weight_decay", "learning_rate", "min_lr")
    at_least(0, config, "memory_limit_gb", "compile_min_sms", "beta1", "beta2", "loss_chunk_mb")
    at_least(0, config, "save_minutes", "keep", "patience")
    if not 0 < config["wait_minutes"] <= 60 * 24 * 365:
        raise UsageError(f"wait_minutes must be above 0 and at most a year, not {config['wait_minutes']}")
    for key in ("beta1", "beta2"):
        if not config[key] < 1:
            raise UsageError(f"{key} must be below 1, not {config[key]}")
    one_of(COMPILE_MODES, config, "compile_mode")
    one_of(tuple(SAMPLINGS), config, "sampling")
    one_of(optimizers.OPTIMIZERS, config, "optimizer")
    one_of(optimizers.OPTIMIZER_STATES, config, "optimizer_state")
    optimizers.require(config["optimizer"], config["optimizer_state"])
    init_from = config["init_from"]
    if init_from not in ("scratch", "resume", "auto", *GPT2_SIZES) and not os.path.exists(init_from):
        raise UsageError(
            f"init_from must be 'scratch', 'resume', 'auto', one of {', '.join(GPT2_SIZES)}, a checkpoint such as "
            f"out/ckpt.pt, or a folder that holds one or a Hugging Face GPT-2, not {init_from!r}"
        )
    if not config["gpu"]:
        machine.find_device(config["device"])
    elif world.size > 1:
        raise UsageError("a plan for a card that isn't here is simulated in one process: start without torchrun")
    ranks = config["ranks"] if config["gpu"] else world.size
    if (steps := config["gradient_accumulation_steps"]) % ranks:
        nearest = [str(n) for n in (steps // ranks * ranks, steps // ranks * ranks + ranks) if n]
        raise UsageError(
            f"gradient_accumulation_steps={steps} can't be shared equally by {ranks} ranks: "
            f"set it to {' or '.join(nearest)}"
        )
    if config["shard"]:
        check_shard(config, ranks)


def check_shard(config, ranks):
    """Raise a UsageError for what a model that is shared out among the ranks can't be combined with."""
    if ranks == 1:
        raise UsageError("shard=True shares a model out among several ranks: start with torchrun, or leave it out")
    if config["optimizer_state"] != "float32":
        raise UsageError(
            f"optimizer_state={config['optimizer_state']!r} keeps the state of whole weights, and with shard=True no "
            "rank has any: use 'float32', whose state is shared out as well"
        )


def without_effect(config, given, config_class, ranks):
    """A line for each reason why keys that were named do nothing. ranks: how many train.

    config_class: the model's GPTConfig, whose fields need not be nanoGPT's.
    """
    fields, told = models.fields(config_class), []
    init_from, kind = config["init_from"], config["device"].partition(":")[0]
    may_shard = config["shard"] or config["auto_fit"] or config["dry_run"] or init_from == "resume"
    several, gpu = config["ranks"] > 1 and not config["gpu"], config["gpu"]
    sms = cards.named(gpu).sm_count if gpu else machine.sm_count(machine.find_device(config["device"]))
    tunes = config["compile"] and "max-autotune" in config["compile_mode"]

    def tell(idle, why, *keys):
        if idle and (named := [key for key in keys if key in given]):
            told.append(f"{', '.join(named)}: no effect, {why}")

    tell(
        True,
        "GPTConfig in model.py has no such field",
        *(k for k in models.SIZES if k not in BATCHES and not models.takes(config_class, k)),
    )
    its_own = (k for k in fields if k not in ("block_size", "dropout"))
    tell(init_from not in ("scratch", "resume"), f"the model of init_from={init_from!r} has its own", *its_own)
    tell(not config["compile"], "compile=False", "compile_mode")
    tell(not config["auto_fit"], "auto_fit=False", "compile_min_sms")
    tell(not may_shard, "shard=False", "gather_once")
    tell(not config["decay_lr"], "decay_lr=False", "warmup_iters", "lr_decay_iters", "min_lr")
    # nanoGPT's config files name wandb_log=False and the two together: there, it is known.
    tell(not config["wandb_log"] and "wandb_log" not in given, "wandb_log=False", "wandb_project", "wandb_run_name")
    tell(ranks == 1, "one process trains", "backend", "wait_minutes")
    tell(several, "it is for plans of GPUs that aren't here; to train on several, start with torchrun", "ranks")
    unheld = kind in ("cpu", "mps") and not (config["auto_fit"] or config["dry_run"])
    tell(unheld, f"without auto_fit nothing holds a run on {kind} to it", "memory_limit_gb")
    few = f"Inductor tunes matrix products on {cards.MAX_AUTOTUNE_SMS} SMs or more, and this GPU has {sms}"
    tell(tunes and 0 < sms < cards.MAX_AUTOTUNE_SMS, few, "compile_mode")
    return told


def opening_lines(config, given, device, dtype, model_args, tokens_per_iter, iter_num=0, meta=None):
    """What a run tells first: where it computes, on what, and whether there is anything to do.

    iter_num: the iteration that it goes on from. meta: that of the data set, where it has one.
    """
    where = f"device {device}{'' if 'device' in given else ' (the best one here)'}"
    where = f"a plan for {cards.named(config['gpu'])}" if config["gpu"] else where
    how = f"dtype {dtype}{'' if 'dtype' in given else ' (the best for it)'}"
    nothing_left = f"nothing is left to train: max_iters={config['max_iters']} was the last iteration"
    if config["init_from"] != "scratch":
        whose = "the checkpoint's" if config["init_from"] == "resume" else "the model's"
    else:
        whose = f"of data/{config['dataset']}/meta.pkl" if meta else "GPT-2's 50257, rounded up"
    return [
        f"{where}, {how}, vocab_size {model_args['vocab_size']} ({whose})",
        f"tokens per iteration will be: {tokens_per_iter:,}",
        *([] if anything_left(config, iter_num) else [nothing_left]),
    ]


def anything_left(config, iter_num):
    """Whether a run that begins or goes on at iteration iter_num has anything to do."""
    return config["eval_only"] or iter_num <= config["max_iters"]


def go_on_with(saved, config, given, ranks=1):
    """{key: value} of the keys that a resumed run on so many ranks takes from its checkpoint: those that weren't named.

    The device and its precision are taken where this machine has that device. saved: None for a run that begins. What
    follows from a plan comes on top.
    """
    if not saved:
        return of_a_plan(config, given)
    was = saved["config"].get("optimizer", "adamw")
    if "optimizer" in given and config["optimizer"] != was:
        raise UsageError(
            f"optimizer={config['optimizer']!r} can't go on with the state of {was!r}: leave it out, or begin a run "
            f"with these weights: --init_from={config['out_dir']} --out_dir=another"
        )
    alone = ("shard", "gather_once") if ranks == 1 else ()
    taken = {
        key: value
        for key, value in saved["config"].items()
        if key in config and key not in (*given, *NOT_TAKEN, *alone) and type(value) is type(config[key])
    }
    device = taken.get("device", config["device"])
    if config["gpu"] or not machine.is_here(device) or device != saved["config"].get("device"):
        taken = {key: value for key, value in taken.items() if key not in ("device", "dtype")}
    return taken | of_a_plan(config | taken, given)


def beginning(init_from, saved, config, given):
    """Lines on the checkpoint whose model a run begins with; of one that resumes, with the keys that differ."""
    if init_from != "resume":
        return [f"a new run with the weights of {init_from}, of iteration {saved.get('iter_num', 'unknown')}"]
    return [f"resuming from {config['out_dir']} at iteration {saved['iter_num']}", *differences(saved, config, given)]


def differences(saved, config, given):
    """Lines on the keys whose values differ from the checkpoint's: those that are taken, and those that stay as saved.

    What wasn't named and differs all the same is what go_on_with couldn't take. saved: a checkpoint.
    """
    kept = {name: size for name, size in saved["model_args"].items() if name not in ("dropout", "block_size")}
    kept |= _options_of(saved.get("optimizer"))
    before = {**saved["config"], **saved["model_args"], **kept}
    taken, stays = [], []
    for key, value in config.items():
        was = before.get(key, value)
        if key in NOT_TAKEN or type(was) not in (*models.KEY_TYPES, type(None)) or was == value:
            continue
        if key in given and key in kept:
            stays.append(f"{key} {shown(was, str)}, not {value}")
        elif key in given or key not in (*kept, "block_size"):
            taken.append(f"{key} {shown(was, str)} -> {value}{'' if key in given else ' (not given)'}")
    lines = [f"differs from the checkpoint, and is taken: {', '.join(taken)}"] if taken else []
    return lines + ([f"differs, but stays as it is in the checkpoint: {', '.join(stays)}"] if stays else [])


def _options_of(optimizer):
    """{key: value} of what load_state_dict brings back with a checkpoint's optimizer, where its groups have it.

    optimizer: any optimizer's state_dict. Not every one has param_groups, or weight_decay and betas in them.
    """
    groups = optimizer.get("param_groups", ()) if isinstance(optimizer, dict) else ()
    decays = [float(group["weight_decay"]) for group in groups if "weight_decay" in group]
    betas = next((map(float, group["betas"]) for group in groups if "betas" in group), ())
    decay = {"weight_decay": max(decays)} if decays else {}  # it is 0 in the group of biases and norms
    return decay | dict(zip(("beta1", "beta2"), betas, strict=False))


def cropped_to(config, given, trained_with):
    """The block_size to train with: that of the model, trained_with, unless another is named; UsageError if longer."""
    if config["init_from"] != "scratch" and "block_size" not in given:
        return trained_with
    if config["block_size"] > trained_with:
        raise UsageError(
            f"block_size={config['block_size']} is more than the {trained_with} positions that the model of "
            f"init_from={config['init_from']!r} was trained with: set --block_size={trained_with} or less"
        )
    return config["block_size"]
