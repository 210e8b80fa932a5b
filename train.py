"""Train a GPT. On one device:

    python train.py config/train_shakespeare_char.py --compile=False

On 4 GPUs of one machine (torchrun --help tells how to join several machines):

    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
"""

import math
import os
import signal
import sys
import time
from functools import partial

import torch

from configurator import at_least, configure, one_of
from model import GPT, PRETRAINED, GPTConfig
from nanofit import autofit, runtime
from nanofit import checkpoint as checkpoints
from nanofit.batches import Batches
from nanofit.codec import load_meta
from nanofit.errors import UsageError, usage_errors
from nanofit.optimizers import OPTIMIZER_STATES, allocate_state, make_optimizer, require
from nanofit.recovery import Recovery, StopRequested, StopSignals, Watch
from nanofit.step import accumulate, dry_step, evaluate, mean_losses, try_compile, update

runtime.prefer_expandable_segments()  # before CUDA starts

# ---- the keys of a run: a config file or --key=value overrides them ----------------------------------------
# files and evaluation
out_dir = "out"
eval_interval = 2000  # iterations between evaluations; a checkpoint is written after one
log_interval = 1  # iterations between lines
eval_iters = 200  # batches of each split in an evaluation
eval_only = False  # evaluate once and stop
always_save_checkpoint = True  # False: only when the validation loss is the best so far
init_from = "scratch"  # or 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder
# Weights & Biases
wandb_log = False
wandb_project = "owt"
wandb_run_name = "gpt2"
# data
dataset = "openwebtext"  # a folder in data/
gradient_accumulation_steps = 5 * 8  # micro-steps of an iteration, over all GPUs together
batch_size = 12  # sequences in a micro-step
block_size = 1024  # tokens in a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining; finetuning may want 0.1 or more
bias = False  # in LayerNorm and Linear
# AdamW
learning_rate = 6e-4  # the highest
max_iters = 600000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient, 0 for any
# learning rate schedule
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000  # about max_iters, after Chinchilla
min_lr = 6e-5  # about learning_rate / 10, after Chinchilla
# machine
backend = "nccl"  # or 'gloo': how the ranks of a multi-GPU run talk
device = runtime.best_device()  # 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = runtime.best_dtype(device)  # 'float32', 'bfloat16', 'float16'
compile = True
compile_mode = "default"  # torch.compile's mode: 'reduce-overhead', 'max-autotune', ...
activation_checkpointing = False  # compute activations again in the backward pass: less memory, slower
optimizer_state = "float32"  # '8bit' (torchao; changes the numbers a little), 'offload' (to the machine's memory)
# fitting the GPU
auto_fit = False  # split batch_size x gradient_accumulation_steps again, so that it fits; the product stays
memory_limit_gb = 0.0  # GiB that training may take, 0 for all that is free
compile_min_sms = 68  # under auto_fit, a GPU with fewer SMs compiles only if that pays
dry_run = False  # print auto_fit's plan and stop; for a device that isn't here, give memory_limit_gb
config, given = configure(globals())

# ---- check what was asked for, before anything is written --------------------------------------------------
at_least(1, config, "batch_size", "block_size", "gradient_accumulation_steps")
at_least(1, config, "eval_interval", "eval_iters", "log_interval")
at_least(0, config, "max_iters", "warmup_iters", "grad_clip", "weight_decay", "learning_rate", "min_lr")
at_least(0, config, "memory_limit_gb", "compile_min_sms", "beta1", "beta2")
if not max(beta1, beta2) < 1:
    raise UsageError(f"beta1 and beta2 must be below 1, not {beta1} and {beta2}")
one_of(("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"), config, "compile_mode")
planned = dry_run and memory_limit_gb > 0 and not runtime.is_here(device)  # for a device that is elsewhere
if "dtype" not in given:
    dtype = config["dtype"] = "bfloat16" if planned else runtime.best_dtype(device)
one_of(tuple(runtime.DTYPES), config, "dtype")
one_of(OPTIMIZER_STATES, config, "optimizer_state")
require(optimizer_state)
if init_from not in ("scratch", "resume", *PRETRAINED) and not os.path.isdir(init_from):
    raise UsageError(
        f"init_from must be 'scratch', 'resume', one of {', '.join(PRETRAINED)}, or a folder that holds a Hugging "
        f"Face GPT-2, not {init_from!r}"
    )

world = runtime.world_of_torchrun()
if gradient_accumulation_steps % world.size:
    below = gradient_accumulation_steps // world.size * world.size
    nearest = [str(n) for n in (below, below + world.size) if n]
    raise UsageError(
        f"gradient_accumulation_steps={gradient_accumulation_steps} can't be shared equally by {world.size} ranks: "
        f"set it to {' or '.join(nearest)}"
    )
if planned and world.size > 1:
    raise UsageError("a plan for a device that isn't here is simulated in one process: start without torchrun")
if dry_run and not planned and not runtime.is_here(device):
    raise UsageError(f"there is no {device} here: to plan for one, say how much memory it has: --memory_limit_gb=12")
if not planned:
    device = runtime.open_device(world.join(backend, device))
    if (
        compile
        and device.type == "cuda"
        and (refusal := autofit.refuse_mode(compile_mode, runtime.sm_count(device), compile_min_sms))
    ):
        raise UsageError(refusal)

wandb = None
if wandb_log and world.is_main:
    with usage_errors(ImportError, prefix="wandb_log=True: pip install wandb, or --wandb_log=False. "):
        import wandb

saved = checkpoints.load(out_dir, to_go_on=True) if init_from == "resume" else None
if saved and "block_size" not in given:
    block_size = saved["model_args"]["block_size"]
data_dir = os.path.join("data", dataset)
if not dry_run:
    batches = Batches(data_dir, batch_size=batch_size, block_size=block_size, device=device)
meta = load_meta(data_dir)

if not world.is_main:
    # One voice: the ranks would print the same lines.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size  # of all ranks together
print(f"tokens per iteration will be: {tokens_per_iter:,}")

# ---- model, optimizer, and where they come from ------------------------------------------------------------
torch.manual_seed(1337 + world.rank)
model_args = dict(
    n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, vocab_size=None, dropout=dropout
)
iter_num, best_val_loss = 0, 1e9
with usage_errors(ValueError, OSError, ImportError):
    if init_from == "scratch":
        model_args["vocab_size"] = meta["vocab_size"] if meta else 50304  # GPT-2's 50257, padded for speed
        model = GPT(GPTConfig(**model_args))
    elif init_from == "resume":
        model_args |= {key: saved["model_args"][key] for key in checkpoints.MODEL_KEYS}
        model = GPT(GPTConfig(**model_args))
        with usage_errors(RuntimeError, prefix=f"the checkpoint in {out_dir} is not of this model: "):
            model.load_state_dict(saved["model"])
        iter_num, best_val_loss = saved["iter_num"], float(saved["best_val_loss"])
        print(f"resuming from {out_dir} at iteration {iter_num}")
    else:
        model = GPT.from_pretrained(init_from, dict(dropout=dropout))
        model_args |= {key: getattr(model.config, key) for key in checkpoints.MODEL_KEYS}
    if block_size > model.config.block_size:
        raise UsageError(
            f"block_size={block_size} is more than the {model.config.block_size} positions that the model of "
            f"init_from={init_from!r} was trained with: set --block_size={model.config.block_size} or less"
        )
if block_size < model.config.block_size:
    model.crop_block_size(block_size)
    model_args["block_size"] = block_size

# ---- fit the device ----------------------------------------------------------------------------------------
if world.is_main and not dry_run:
    with usage_errors(OSError, prefix=f"out_dir={out_dir!r} can't be made: "):
        os.makedirs(out_dir, exist_ok=True)
micro_batch_size, accumulation = batch_size, gradient_accumulation_steps
if saved and saved.get("split", {}).get("of") == [batch_size, gradient_accumulation_steps]:
    micro_batch_size, accumulation = saved["split"]["into"]  # memory may have run out since the start
    if "activation_checkpointing" not in given:
        activation_checkpointing = saved["split"]["activation_checkpointing"]
    if micro_batch_size != batch_size and not auto_fit:
        print(f"batch_size {batch_size} is cut into {micro_batch_size}, as when the checkpoint was saved")
limit_bytes = int(memory_limit_gb * 2**30) or None
if auto_fit or dry_run:
    plan = autofit.fit(world, out_dir, model_args, device, planned, config, given, max_iters + 1 - iter_num)
    print(f"auto-fit: {plan}")
    if dry_run:
        world.leave()
        sys.exit(0)
    micro_batch_size, accumulation = plan.micro_batch_size, plan.accumulation
    compile, limit_bytes = plan.compile, plan.limit_bytes
    activation_checkpointing = plan.activation_checkpointing
micro_steps = accumulation // world.size  # of this rank

runtime.take_device(device, limit_bytes)
model.to(device)
world.spread(model.parameters())  # each rank has drawn its own
model.activation_checkpointing = activation_checkpointing
optimizer = make_optimizer(model, optimizer_state, weight_decay, learning_rate, (beta1, beta2), device)
scaler = runtime.grad_scaler(device, dtype)
autocast = runtime.autocast(device, dtype)
rng = None  # this rank's generators, as saved
if saved:
    checkpoints.load_optimizer(optimizer, saved["optimizer"])
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
    if len(saved.get("rng", ())) == world.size:
        rng = saved["rng"][world.rank]
        runtime.set_rng_state(rng["generators"], device)
    saved = None  # its tensors are a whole second model
runtime.empty_cache(device)

raw_model = model  # what is saved: without torch.compile's wrapper
batches.start(model_args["vocab_size"], rng and rng["data"], micro_batch_size)

# ---- what a run survives -----------------------------------------------------------------------------------


def save(name=checkpoints.NAME):
    """Write a checkpoint for the beginning of iteration iter_num; '' or why it failed. All ranks must call it."""
    rng = world.gather(here)
    said = ""
    if iter_num == 0:
        said = "nothing is trained yet, and nothing saved"
    elif world.is_main:
        try:
            checkpoints.save(
                {
                    "model": raw_model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "model_args": model_args,
                    "iter_num": iter_num,
                    "best_val_loss": best_val_loss,
                    "config": config,
                    "scaler": scaler.state_dict(),
                    "rng": rng,  # of each rank, as before an evaluation: resuming repeats it
                    "split": {
                        "of": [batch_size, gradient_accumulation_steps],
                        "into": [recovery.micro_batch_size, recovery.micro_steps * world.size],
                        "activation_checkpointing": activation_checkpointing,
                    },
                },
                out_dir,
                name,
            )
        except (checkpoints.SaveError, RuntimeError, MemoryError) as e:
            said = f"not saved: {e}"
    return world.gather(said)[0]  # no rank leaves before it is written


def save_where_it_stops():
    """As save, but the best checkpoint stays where only that is kept."""
    return save(checkpoints.NAME if always_save_checkpoint else checkpoints.LAST)


here = {"data": batches.state(), "generators": runtime.rng_state(device)}  # where this rank's iteration began
signals = StopSignals()
recovery = Recovery(world, device, batches, raw_model, micro_steps, give_up=save_where_it_stops)
watch = Watch("the gradient's norm", scaled=scaler.is_enabled())

recovery.run(partial(allocate_state, optimizer))
if compile:
    print("compiling the model... (takes a minute or so)")
    options = dict(mode=compile_mode, dynamic=False)  # sizes are few, and each gets kernels of its own
    model, failure = recovery.run(
        lambda: try_compile(raw_model, partial(dry_step, batch=batches.current, autocast=autocast), device, **options)
    )
    if failure:
        print(f"compile failed, training goes on without it ({failure})")

# ---- the loop ----------------------------------------------------------------------------------------------


def get_lr(it):
    """Learning rate of iteration it: linear warm-up, cosine decay to min_lr, then min_lr."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def micro_batches():
    """Gradients of this rank's share of an iteration; returns its mean loss."""
    return accumulate(model, scaler, batches, autocast=autocast, micro_steps=recovery.micro_steps)


if wandb:
    wandb.init(project=wandb_project, name=wandb_run_name, config=config)
peak_flops, note = runtime.peak_flops(runtime.device_name(device))
if note:
    print(note)
running_mfu = -1.0
unsaved = ""  # why the last checkpoint could not be written
first_iter = last_logged = iter_num - 1
clock = time.perf_counter()

with signals.listening():
    while True:
        here = {"data": batches.state(), "generators": runtime.rng_state(device)}
        if stop := world.most(signals.received):
            how = save_where_it_stops() or f"checkpoint saved to {out_dir}, --init_from=resume goes on"
            print(f"{signal.Signals(stop).name} before iteration {iter_num}: {how}")
            world.leave()
            sys.exit(128 + stop)

        lr = get_lr(iter_num) if decay_lr else learning_rate
        for group in optimizer.param_groups:
            group["lr"] = lr

        if iter_num % eval_interval == 0:
            runtime.synchronize(device)
            paused = time.perf_counter()
            watch.check()
            try:
                shares = recovery.run(partial(evaluate, model, batches, eval_iters, autocast, world, signals.check))
            except StopRequested:
                continue  # to the beginning of the loop, where it is looked at
            losses = mean_losses(shares, world)
            print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            if wandb:
                wandb.log(
                    {
                        "iter": iter_num, "train/loss": losses["train"], "val/loss": losses["val"],
                        "lr": lr, "mfu": running_mfu * 100,
                    }
                )  # fmt: skip
            if losses["val"] < best_val_loss or always_save_checkpoint:
                best_val_loss = losses["val"]
                if iter_num > 0:
                    print(f"saving checkpoint to {out_dir}")
                    if unsaved := save():
                        print(f"{unsaved}; training goes on")
            clock += time.perf_counter() - paused
        if iter_num == 0 and eval_only:
            break

        loss = recovery.run(micro_batches)
        norm = update(model, optimizer, scaler, grad_clip=grad_clip, world=world)
        watch.note(iter_num, norm)

        if iter_num % log_interval == 0:
            mean_loss = world.mean(loss).item()  # waits for the GPU, so that the clock tells the truth
            watch.check()
            now = time.perf_counter()
            seconds = (now - clock) / (iter_num - last_logged)  # of an iteration, since the last line
            clock, last_logged = now, iter_num
            if iter_num - first_iter > 5:  # the first ones warm up
                mfu = raw_model.estimate_mfu(micro_batch_size * micro_steps, seconds, peak_flops)
                running_mfu = mfu if running_mfu == -1.0 else 0.9 * running_mfu + 0.1 * mfu
            line = f"iter {iter_num}: loss {mean_loss:.4f}, time {seconds * 1000:.2f}ms, mfu {running_mfu * 100:.2f}%"
            line += f", {tokens_per_iter / seconds:,.0f} tok/s"
            if peak := runtime.peak_memory_bytes(device):
                line += f", peak {peak / 2**30:.2f} GiB"
            print(line)

        iter_num += 1
        if iter_num > max_iters:
            break

world.leave()
if unsaved:
    raise UsageError(unsaved)
