"""Recompute: what blocks computed again as a whole take and cost, against their cheap parts alone.

    python benchmarks/recompute.py --batch_size=4

The cheap parts are everything but matrix products and attention, whose results are kept. Times are of training
steps on this device, in turns in one process; memory is simulated. Prints a table, and one line of JSON last.
"""

import statistics
import time
from functools import partial

import torch
from common import finish
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from configurator import configure
from model import GPT, GPTConfig
from nanofit import machine, models, settings
from nanofit.autofit.plan import Job
from nanofit.autofit.simulate import step_memory
from nanofit.batches import RandomBatch
from nanofit.step import train_step
from nanofit.units import GPT2_SIZES, MemoryLevers

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
preset = "gpt2"
batch_size = 4
block_size = 1024
vocab_size = 50304
rounds = 5
device = machine.best_device()
dtype = machine.best_dtype(device)
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "batch_size", "block_size", "vocab_size", "rounds")
settings.one_of(tuple(GPT2_SIZES), config, "preset")
dtype = config["dtype"] = settings.dtype(config, given)
device = machine.find_device(device)
machine.set_device(device)
shape = dict(block_size=block_size, vocab_size=vocab_size, dropout=0.0, bias=False, **GPT2_SIZES[preset])

COSTLY = ("mm", "addmm", "bmm", "_scaled_dot_product")


def keep_costly(context, operation, *args, **kwargs):
    """Keep what a matrix product or attention gave, and compute the rest again."""
    name = operation.__name__.split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name.startswith(COSTLY) else CheckpointPolicy.PREFER_RECOMPUTE


WAYS = {  # name: torch.utils.checkpoint.checkpoint, as it is called by models.apply_levers
    "nothing": lambda forward, *args, **options: forward(*args),
    "cheap parts": partial(checkpoint, context_fn=partial(create_selective_checkpoint_contexts, keep_costly)),
    "whole blocks": checkpoint,
}


def use(way):
    """Let blocks compute this again from now on."""
    models.checkpoint = WAYS[way]


job = Job({}, shape, device.type, dtype, grad_clip=1.0, micro_batch_size=batch_size)
levers = MemoryLevers(recompute=True).within(0)
memory = {}
for way in WAYS:
    use(way)
    parts = step_memory(GPT, GPTConfig, job, levers)
    memory[way] = {"peak_bytes": sum(parts.values()), "activation_bytes": parts["activations"]}

torch.manual_seed(0)
gpt = models.build(GPT, GPTConfig, shape).to(device)
models.apply_levers(gpt, levers)
optimizer = gpt.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
scaler, autocast = machine.grad_scaler(device, dtype), machine.autocast(device, dtype)
batch = RandomBatch(batch_size, block_size, vocab_size, device)
seconds = {way: [] for way in WAYS}
for turn in range(rounds + 1):
    for way in WAYS:
        use(way)
        machine.synchronize(device)
        start = time.perf_counter()
        train_step(gpt, optimizer, scaler, batch, autocast, grad_clip=1.0)
        machine.synchronize(device)
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
