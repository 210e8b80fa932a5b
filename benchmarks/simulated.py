"""Peaks of a training step as simulated on fake tensors, against what a GPU's allocator counted.

    python benchmarks/simulated.py --batch_sizes=1,4,16

For GPT-2 in bfloat16, float16, with dropout, with recompute and with AdamW's state offloaded. Reserved: what the
allocator held of the GPU, as a share of what tensors took. Prints a table, and one line of JSON last.
"""

from dataclasses import replace

from common import finish, keep

from configurator import configure
from model import GPT, GPTConfig
from nanofit import machine, settings
from nanofit.autofit.plan import Job
from nanofit.autofit.trials import Trials
from nanofit.errors import UsageError, usage_errors
from nanofit.models import GPT2_SIZES, source_of
from nanofit.units import MemoryLevers

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
model = "gpt2"  # a name of GPT-2's sizes
batch_sizes = "1,2,4,8,16"
block_size = 1024
device = "cuda"
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "block_size")
settings.one_of(tuple(GPT2_SIZES), config, "model")
with usage_errors(ValueError, prefix=f"batch_sizes={batch_sizes!r} must be whole numbers with commas between: "):
    batch_sizes = [int(size) for size in str(batch_sizes).split(",")]
device = machine.find_device(device)
if device.type != "cuda":
    raise UsageError("only a GPU's allocator counts what tensors take")

SIZES = dict(block_size=block_size, bias=False, vocab_size=50304, dropout=0.0, **GPT2_SIZES[model])
PLAIN = Job(source_of(GPT, GPTConfig), SIZES, str(device), "bfloat16", grad_clip=1.0, micro_steps=2)
CASES = {
    "bfloat16": PLAIN,
    "float16": replace(PLAIN, dtype="float16"),
    "dropout": replace(PLAIN, model_args={**SIZES, "dropout": 0.1}),
    "recompute": replace(PLAIN, levers=MemoryLevers(recompute=True)),
    "offload": replace(PLAIN, levers=MemoryLevers(optimizer_state="offload")),
}
free, total = machine.free_memory_bytes(device), machine.total_memory_bytes(device)
limit = int(0.9 * free)
rows = []
print(f"{'':12}{'sequences':>10}{'simulated':>14}{'allocated':>14}{'ratio':>8}{'reserved':>10}")
for name, job in CASES.items():
    with Trials() as measured, Trials() as simulated:
        for size in batch_sizes:
            job = replace(job, micro_batch_size=size, limit_bytes=limit)
            real = measured(job)
            if real.failure:
                print(f"{name:12}{size:>10}  {real.failure}")
                break
            peak = simulated(replace(job, simulate=True, memory_limit_gb=total / 2**30)).peak_bytes
            row = dict(
                case=name, batch_size=size, simulated=peak, allocated=real.allocated_bytes, reserved=real.peak_bytes
            )
            rows.append(row)
            ratio, reserved = peak / real.allocated_bytes, real.peak_bytes / real.allocated_bytes
            gib = f"{peak / 2**30:>10.3f} GiB{real.allocated_bytes / 2**30:>10.3f} GiB"
            print(f"{name:12}{size:>10}{gib}{ratio:>8.4f}{reserved:>10.3f}", flush=True)
            keep("simulated", config, device, {"rows": rows}, save)
finish("simulated", config, device, {"rows": rows}, save)
