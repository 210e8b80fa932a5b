"""Time training steps of a GPT: the very step that train.py runs, without evaluation and files.

python bench.py --batch_size=8 --compile=False
"""

import os
import sys
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
import nanofit

nanofit.start()
import torch

from configurator import configure
from model import GPT, GPTConfig
from nanofit import machine, models, settings
from nanofit.batches import Batches, RandomBatch
from nanofit.compiling import compiled
from nanofit.optimizers import configured
from nanofit.step import train_step
from nanofit.tokens import open_data
from nanofit.units import MemoryLevers

# ---- keys: a config file or --key=value overrides them -----------------------------------------------------
batch_size = 12
block_size = 1024
bias = False
real_data = True  # data/openwebtext; False: random tokens, drawn once
seed = 1337
device = machine.best_device()
dtype = machine.best_dtype(device)  # 'float32', 'bfloat16', 'float16'
compile = True
compile_mode = "auto"  # the faster of 'default' and 'reduce-overhead'; or a mode of torch.compile's
profile = False  # write a trace for TensorBoard or Perfetto to bench_log/
# the model, GPT-2's 124M unless told otherwise
n_layer = 12
n_head = 12
n_embd = 768
# a field of GPTConfig that isn't nanoGPT's is a key too
own_fields = models.own_fields(GPTConfig, but=globals())
config, given = configure(globals(), more=own_fields)

settings.at_least(1, config, "batch_size", "block_size")
settings.one_of(settings.COMPILE_MODES, config, "compile_mode")
dtype = config["dtype"] = settings.dtype(config, given)
device = machine.find_device(device)
machine.set_device(device)
torch.manual_seed(seed)
model_args = models.sizes_of("scratch", {**config, "dropout": 0.0}, None, None, own_fields)
models.config_of(GPTConfig, model_args)  # which may refuse them

if real_data:
    data = open_data(os.path.join("data", "openwebtext"), block_size, model_args["vocab_size"])
    batches = Batches(data, batch_size=batch_size, device=device)
else:
    batches = RandomBatch(batch_size, block_size, 50257, device)

model = raw_model = models.build(GPT, GPTConfig, model_args).to(device)
models.apply_levers(model, MemoryLevers().within(machine.total_memory_bytes(device), device.type))
optimizer = configured(model, "adamw", 1e-2, 1e-4, (0.9, 0.95), device.type)
scaler = machine.grad_scaler(device, dtype)
autocast = machine.autocast(device, dtype)
if compile:
    model = compiled(model, device, batches.current, autocast, compile_mode)


def run(steps, after_step=lambda: None):
    """Seconds a step, the device's work included."""
    machine.synchronize(device)
    start = time.perf_counter()
    for k in range(steps):
        loss = train_step(model, optimizer, scaler, batches, autocast, grad_clip=0.0)
        after_step()
        print(f"{k}/{steps} loss: {loss.item():.4f}")
    machine.synchronize(device)
    return (time.perf_counter() - start) / steps


if profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    tracing = torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=5, warmup=5, active=5),
        on_trace_ready=torch.profiler.tensorboard_trace_handler("bench_log"),
        record_shapes=True,
        profile_memory=True,
        with_flops=True,
    )
    with tracing:
        seconds = run(15, tracing.step)
else:
    run(10)  # warm up
    seconds = run(20)

mfu = models.mfu_of(raw_model, batch_size, device, dtype)(seconds)
print(f"{batch_size * block_size / seconds:,.0f} tokens per second")
print(f"time per iteration: {seconds * 1000:.4f}ms, MFU: {mfu * 100:.2f}%")
