"""Activation checkpointing: what whole blocks computed again take and cost, against their cheap parts alone.

    python benchmarks/recompute.py --batch_size=4

The cheap parts are everything but matrix products and attention, whose results are kept. Times are of training
steps on this device, in turns in one process; memory is simulated. Prints a table, and one line of JSON last.
"""

import statistics
import time
from functools import partial

import simulate
import torch
from common import finish
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import model
from configurator import at_least, configure
from nanofit import runtime
from nanofit.batches import RandomBatch
from nanofit.errors import usage_errors
from nanofit.step import train_step

runtime.prefer_expandable_segments()  # before CUDA starts

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
preset = "gpt2"
batch_size = 4
block_size = 1024
vocab_size = 50304
rounds = 5
device = runtime.best_device()
dtype = runtime.best_dtype(device)
save = ""  # a file for the result
config, given = configure(globals())
at_least(1, config, "batch_size", "block_size", "vocab_size", "rounds")
device = runtime.open_device(device)
runtime.take_device(device)
with usage_errors(KeyError, prefix="preset must be one of GPT-2's sizes, not "):
    sizes = model.PRETRAINED[preset]
shape = dict(block_size=block_size, vocab_size=vocab_size, dropout=0.0, bias=False, **sizes)

COSTLY = ("mm", "addmm", "bmm", "_scaled_dot_product")


def keep_costly(context, operation, *args, **kwargs):
    """Keep what a matrix product or attention gave, and compute the rest again."""
    name = operation.__name__.split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name.startswith(COSTLY) else CheckpointPolicy.PREFER_RECOMPUTE


CHEAP_PARTS = partial(checkpoint, context_fn=partial(create_selective_checkpoint_contexts, keep_costly))
WAYS = {"nothing": (False, checkpoint), "cheap parts": (True, CHEAP_PARTS), "whole blocks": (True, checkpoint)}


def use(way):
    """What the model computes again from now on; whether its activation_checkpointing is on."""
    on, model.checkpoint = WAYS[way]
    return on


job = dict(model_args=shape, dtype=dtype, optimizer_state="float32", grad_clip=1.0, micro_steps=1)
memory = {}
for way in WAYS:
    parts = simulate.step_memory({**job, "batch_size": batch_size, "activation_checkpointing": use(way)})
    memory[way] = {"peak_bytes": sum(parts.values()), "activation_bytes": parts["activations"]}

torch.manual_seed(0)
gpt = model.GPT(model.GPTConfig(**shape)).to(device)
optimizer = gpt.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
scaler, autocast = runtime.grad_scaler(device, dtype), runtime.autocast(device, dtype)
batch = RandomBatch(batch_size, block_size, vocab_size, device)
seconds = {way: [] for way in WAYS}
for turn in range(rounds + 1):
    for way in WAYS:
        gpt.activation_checkpointing = use(way)
        runtime.synchronize(device)
        start = time.perf_counter()
        train_step(gpt, optimizer, scaler, batch, autocast=autocast, micro_steps=1, grad_clip=1.0)
        runtime.synchronize(device)
        if turn:  # the first one warms up
            seconds[way].append(time.perf_counter() - start)

print(f"{'computed again':16}{'time':>8}{'peak':>12}{'activations':>14}")
result = {}
for way in WAYS:
    ratio = statistics.median(b / a for a, b in zip(seconds["nothing"], seconds[way], strict=True))
    result[way] = {"time_ratio": ratio, "seconds": statistics.median(seconds[way]), **memory[way]}
    peak, activations = (memory[way][name] / 2**30 for name in ("peak_bytes", "activation_bytes"))
    print(f"{way:16}{ratio:>8.3f}{peak:>8.2f} GiB{activations:>10.2f} GiB")
finish("recompute", config, device, {"ways": result}, save)
