"""Try one micro-batch size, in a process of its own: autofit.py starts it and reads its lines of JSON.

A job comes as one line of JSON on standard input, which stays open as long as the answer is wanted:
    model_args, dtype, device, grad_clip, activation_checkpointing, optimizer_state   the run's
    batch_size      sequences of a micro-batch
    micro_steps     of an iteration, on this device
    compile, compile_mode
    memory_limit_gb, or limit_bytes where an earlier trial found it
    simulate        true: on fake tensors, which take no memory and tell no time
    confirm_steps   optional: so many steps more, with evaluations, before memory is read

Lines go out on standard output: facts about the device first, then a result.
"""

import json
import os
import sys
import threading
import time
from functools import partial

REPORT = os.fdopen(os.dup(1), "w")  # a copy that children don't inherit: compiler workers may outlive this process
os.dup2(2, 1)  # whatever prints goes to standard error

import torch

from model import GPT, GPTConfig
from nanofit import autofit, runtime
from nanofit.batches import RandomBatch
from nanofit.errors import show_errors_as_sentences
from nanofit.optimizers import make_optimizer
from nanofit.step import dry_step, evaluate, train_step, try_compile

TIMED_SECONDS = 1.5  # of steps that are timed, at least


def report(kind, **values):
    REPORT.write(json.dumps({"kind": kind, **values}) + "\n")
    REPORT.flush()


def result(job, peak_bytes=0, tokens_per_second=0.0, failure="", **more):
    report(
        "result",
        batch_size=job["batch_size"],
        peak_bytes=int(peak_bytes),
        tokens_per_second=float(tokens_per_second),
        failure=failure,
        **more,
    )


def accumulated(job):
    """Micro-steps to measure: with the second, gradients are there while activations grow; in the first they aren't."""
    return min(2, job["micro_steps"])


def measure(job):
    """Full optimizer steps and an evaluation, on the code path that will train."""
    device = runtime.open_device(job["device"])
    runtime.take_device(device)
    free = runtime.free_memory_bytes(device)
    limit = job.get("limit_bytes") or autofit.memory_limit(free, job["memory_limit_gb"])
    report(
        "facts",
        name=runtime.device_name(device),
        device_type=device.type,
        sm_count=runtime.sm_count(device),
        capability=runtime.capability(device),
        has_triton=runtime.has_triton(),
        total_bytes=runtime.total_memory_bytes(device),
        free_bytes=free,
        limit_bytes=limit,
        neighbours=[] if job.get("limit_bytes") else runtime.neighbours(device),
    )
    runtime.cap_memory(device, limit)
    if device.type == "cpu":
        runtime.cap_host_memory(limit)  # a size that is far too large ends here, and not with the machine swapping
    try:
        figures = run(job, device)
    except (torch.OutOfMemoryError, MemoryError):
        figures = {"failure": autofit.OUT_OF_MEMORY}
    except RuntimeError as e:  # cuBLAS and the CPU's allocator run out of memory in this way
        figures = {"failure": f"{type(e).__name__}: {str(e).strip().splitlines()[0][:100]}"}
    result(job, **figures)


def run(job, device):
    """The result's figures: peak in bytes, speed, allocator retries, seconds of compiling."""
    model = GPT(GPTConfig(**job["model_args"])).to(device)
    model.activation_checkpointing = job["activation_checkpointing"]
    optimizer = make_optimizer(model, job["optimizer_state"], 0.1, 6e-4, (0.9, 0.95), device)
    scaler = runtime.grad_scaler(device, job["dtype"])
    autocast = runtime.autocast(device, job["dtype"])
    batches = RandomBatch(job["batch_size"], job["model_args"]["block_size"], job["model_args"]["vocab_size"], device)
    compile_seconds = 0.0
    if job["compile"]:
        start = time.perf_counter()
        trial = partial(dry_step, batch=batches.current, autocast=autocast)
        model, failure = try_compile(model, trial, device, mode=job["compile_mode"], dynamic=False)
        if failure:
            return {"failure": f"fails to compile ({failure})"}
        compile_seconds = time.perf_counter() - start

    def seconds(micro_steps):
        runtime.synchronize(device)
        start = time.perf_counter()
        train_step(
            model, optimizer, scaler, batches, autocast=autocast, micro_steps=micro_steps, grad_clip=job["grad_clip"]
        )
        runtime.synchronize(device)
        return time.perf_counter() - start

    accumulate = accumulated(job)
    seconds(accumulate)
    evaluate(model, batches, 1, autocast)
    runtime.empty_cache(device)
    runtime.reset_peak_memory(device)
    retries = runtime.allocator_retries(device)
    # An iteration is one micro-step with the update, and the others without: times of short and of long steps
    # tell both. Quick ones need a longer step, or noise would hide the difference.
    several = min(8, job["micro_steps"]) if seconds(1) < 0.25 else accumulate
    short, long, began = [], [], time.perf_counter()
    while not short or (time.perf_counter() - began < TIMED_SECONDS and len(short) < 10):
        short.append(seconds(1))
        if several > 1:
            long.append(seconds(several))
    evaluate(model, batches, 1, autocast)
    for step in range(job.get("confirm_steps", 0)):
        seconds(accumulate)
        if step % 10 == 9:
            evaluate(model, batches, 1, autocast)
    first = min(short)
    another = max((min(long) - first) / (several - 1), 0.1 * first) if long else 0.0
    tokens = job["micro_steps"] * job["batch_size"] * job["model_args"]["block_size"]
    return {
        "peak_bytes": runtime.peak_reserved_bytes(device),
        "tokens_per_second": tokens / (first + (job["micro_steps"] - 1) * another),
        "allocated_bytes": runtime.peak_memory_bytes(device) or 0,  # of the peak, what tensors held
        "retries": runtime.allocator_retries(device) - retries,
        "compile_seconds": compile_seconds,
    }


def simulate(job):
    """The same step on fake tensors: what tensors would hold at the peak, and what for."""
    from nanofit.autofit.simulate import step_memory

    card = int(job["memory_limit_gb"] * autofit.GIB)
    free = card - (autofit.CONTEXT_BYTES if job["device"].startswith("cuda") else 0)
    report(
        "facts",
        name=f"a planned {job['device']} device",
        device_type=torch.device(job["device"]).type,
        sm_count=0,
        capability=(0, 0),
        has_triton=False,
        total_bytes=card,
        free_bytes=free,
        limit_bytes=autofit.memory_limit(free, 0.0),
    )
    parts = step_memory(job)
    result(job, peak_bytes=sum(parts.values()), parts=parts)


if __name__ == "__main__":
    show_errors_as_sentences()
    runtime.prefer_expandable_segments()
    task = json.loads(sys.stdin.readline())
    # Standard input ends when the process that asked does: then nobody waits, and the GPU should be free again.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    simulate(task) if task["simulate"] else measure(task)
    if not task.get("compile"):
        os._exit(0)  # half a second sooner; compiler workers would want to be told
