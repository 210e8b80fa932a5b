"""Checks of a run's keys, keys taken from a checkpoint, and the first lines that a run prints. No file is written."""

import math
import os

from nanofit import cards, machine, models, optimizers
from nanofit.batches import SAMPLINGS
from nanofit.errors import UsageError, shown
from nanofit.units import GPT2_SIZES

# Keys that may differ between the ranks of a run. folder.take checks that all resume from the same iteration.
OF_A_RANK = (
    "out_dir", "init_from", "wandb_log", "wandb_project", "wandb_run_name", "tensorboard_log", "backend",
    "wait_minutes", "device", "memory_limit_gb", "compile_min_sms", "save_minutes", "keep",
)  # fmt: skip
# Keys that a resumed run doesn't take from its checkpoint.
NOT_TAKEN = ("out_dir", "init_from", "eval_only", "dry_run", "gpu", "ranks")
COMPILE_MODES = ("auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def at_least(minimum, config, *keys):
    """Raise a UsageError for the first of these keys whose value is below minimum, or infinite."""
    for key in keys:
        if not config[key] >= minimum:  # true for nan
            raise UsageError(f"{key} must be at least {minimum}, not {config[key]}")
        if config[key] == math.inf:
            raise UsageError(f"{key} must be a finite number, not {config[key]}")


def one_of(choices, config, key):
    """Raise a UsageError if config[key] is not among choices."""
    if config[key] not in choices:
        raise UsageError(f"{key} must be one of {', '.join(map(repr, choices))}, not {config[key]!r}")


def dtype(config, given):
    """The precision to compute in: the key's value if it was given, else the best of the device."""
    if "dtype" not in given:
        gpu = config.get("gpu")  # a key of train.py's alone
        return cards.best_dtype(cards.named(gpu).capability) if gpu else machine.best_dtype(config["device"])
    one_of(tuple(machine.DTYPES), config, "dtype")
    return config["dtype"]


def of_a_plan(config, given):
    """{key: value} that a plan for the card in the key gpu implies. UsageError if a plan has no card."""
    if config["gpu"]:
        cards.named(config["gpu"])
        return {"dry_run": True, "device": "cuda"}
    device = config["device"]
    meant = device == "cpu" and "device" not in given and "memory_limit_gb" in given  # a card, most likely
    if config["dry_run"] and (meant or (device.startswith("cuda") and not machine.is_here(device))):
        raise UsageError(
            "there is no CUDA GPU here: name the card that the plan is for, as in --gpu='RTX 3060' or --gpu=12GB; "
            "--device=cpu plans for this machine"
        )
    return {}


def shared(config):
    """{key: value} of the keys that must be the same on all ranks."""
    return {key: value for key, value in config.items() if key not in OF_A_RANK}


def check(config, world):
    """Raise a UsageError for the first key of train.py whose value is not allowed."""
    at_least(1, config, "batch_size", "block_size", "gradient_accumulation_steps", "ranks")
    at_least(1, config, "eval_interval", "eval_iters", "log_interval")
    at_least(0, config, "max_iters", "warmup_iters", "grad_clip", "weight_decay", "learning_rate", "min_lr")
    at_least(0, config, "memory_limit_gb", "compile_min_sms", "beta1", "beta2", "loss_chunk_mb")
    at_least(0, config, "save_minutes", "keep", "patience", "wait_minutes")
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
        raise UsageError(
            f"gradient_accumulation_steps={steps} can't be shared equally by {ranks} ranks: set it to a multiple of "
            f"{ranks}"
        )
    if config["shard"]:
        check_shard(config, ranks)


def check_shard(config, ranks):
    """Raise a UsageError for keys that can't be combined with shard=True."""
    if ranks == 1:
        raise UsageError("shard=True shares a model out among several ranks: start with torchrun, or leave it out")
    if config["optimizer_state"] != "float32":
        raise UsageError(
            f"optimizer_state={config['optimizer_state']!r} keeps the state of whole weights, and with shard=True no "
            "rank has any: use 'float32', whose state is shared out as well"
        )


def without_effect(config, given, config_class, ranks):
    """A line for each reason why keys that were given have no effect. ranks: how many train."""
    fields, told = models.fields(config_class), []
    init_from, kind = config["init_from"], config["device"].partition(":")[0]
    may_shard = config["shard"] or config["auto_fit"] or config["dry_run"] or init_from == "resume"
    several = config["ranks"] > 1 and not config["gpu"]

    def tell(idle, why, *keys):
        if idle and (named := [key for key in keys if key in given]):
            told.append(f"{', '.join(named)}: no effect, {why}")

    tell(
        True,
        "GPTConfig in model.py has no such field",
        *(k for k in models.SIZES if k != "block_size" and not models.takes(config_class, k)),
    )
    its_own = (k for k in fields if k not in ("block_size", "dropout"))
    tell(init_from not in ("scratch", "resume"), f"the model of init_from={init_from!r} has its own", *its_own)
    tell(not config["compile"], "compile=False", "compile_mode")
    tell(not config["auto_fit"], "auto_fit=False", "compile_min_sms")
    tell(not may_shard, "shard=False", "gather_once")
    tell(not config["decay_lr"], "decay_lr=False", "warmup_iters", "lr_decay_iters", "min_lr")
    # nanoGPT's config files set wandb_log=False and these two together: nothing to tell.
    tell(not config["wandb_log"] and "wandb_log" not in given, "wandb_log=False", "wandb_project", "wandb_run_name")
    tell(ranks == 1, "one process trains", "backend", "wait_minutes")
    tell(several, "it is for plans of GPUs that aren't here; to train on several, start with torchrun", "ranks")
    unheld = kind in ("cpu", "mps") and not (config["auto_fit"] or config["dry_run"])
    tell(unheld, f"without auto_fit nothing holds a run on {kind} to it", "memory_limit_gb")
    return told


def opening_lines(config, given, device, dtype, model_args, tokens_per_iter, iter_num, meta):
    """The first lines of a run: device, precision, tokens per iteration, and whether there is anything to do.

    iter_num: the first iteration. meta: the data set's meta.pkl, or None.
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
    """{key: value} of the keys that a resumed run takes from its checkpoint: those that weren't given.

    The device and its precision are taken if this machine has that device. saved: None for a new run. The keys that a
    plan implies are added.
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
    """Lines about the checkpoint that a run begins with; when it resumes, also about the keys that differ."""
    if init_from != "resume":
        return [f"a new run with the weights of {init_from}, of iteration {saved.get('iter_num', 'unknown')}"]
    return [f"resuming from {config['out_dir']} at iteration {saved['iter_num']}", *differences(saved, config, given)]


def differences(saved, config, given):
    """Lines about the keys that differ from the checkpoint's: those that are taken, and those that stay as saved.

    A key that wasn't given and still differs is one that go_on_with couldn't take.
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
    """{key: value} of the options that load_state_dict restores. optimizer: any optimizer's state_dict.

    It may have no param_groups, and these no weight_decay or betas.
    """
    groups = optimizer.get("param_groups", ()) if isinstance(optimizer, dict) else ()
    decays = [float(group["weight_decay"]) for group in groups if "weight_decay" in group]
    betas = next((map(float, group["betas"]) for group in groups if "betas" in group), ())
    decay = {"weight_decay": max(decays)} if decays else {}  # it is 0 for biases and norms
    return decay | dict(zip(("beta1", "beta2"), betas, strict=False))


def cropped_to(config, given, trained_with):
    """The block_size to train with: the model's own (trained_with), or a shorter one that was given."""
    if config["init_from"] != "scratch" and "block_size" not in given:
        return trained_with
    if config["block_size"] > trained_with:
        raise UsageError(
            f"block_size={config['block_size']} is more than the {trained_with} positions that the model of "
            f"init_from={config['init_from']!r} was trained with: set --block_size={trained_with} or less"
        )
    return config["block_size"]
