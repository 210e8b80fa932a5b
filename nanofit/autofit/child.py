"""The child's side of trials: measure Jobs in a process that ends before training starts.

trials.py starts it. Each Job is a line of JSON on standard input, which stays open as long as answers are wanted. The
answers are lines on standard output: Facts about the device, if the Job has no limit, then a Trial. All Jobs of one
process have the same model and optimizer.
"""

import contextlib
import os
import queue
import sys
import threading
import time

REPORT = os.fdopen(os.dup(1), "w")  # not inherited by compiler workers, which may outlive this process
os.dup2(2, 1)  # all that is printed goes to standard error

import nanofit

nanofit.start()
import torch
import torch._dynamo  # the first optimizer needs it; here it is imported while the parent gets ready

from nanofit import gradients, host, machine, models, sharding
from nanofit.autofit.plan import FAILS, OUT_OF_MEMORY, Facts, Job, Trial, from_json, to_json
from nanofit.batches import RandomBatch
from nanofit.compiling import compile_to_train
from nanofit.errors import first_line, is_out_of_memory
from nanofit.optimizers import allocate_state, make_optimizer
from nanofit.ranks import ALONE, World
from nanofit.step import evaluate, train_step

TIMED_SECONDS = 1.5  # of timed steps, at least: enough to see a difference of 2%


def report(value):
    REPORT.write(to_json(value) + "\n")
    REPORT.flush()


def measure(job, made):
    """Full optimizer steps and an evaluation, with the code that trains.

    made: a list that keeps what make() gave for the next Jobs; empty before the first.
    """
    device = machine.find_device(job.device)
    machine.set_device(device)
    limit = job.limit_bytes
    if not limit:
        facts = Facts.here(device, job.memory_limit_gb, job.sharers)
        limit = facts.limit_bytes
        report(facts)
    levers = job.levers.within(limit, device.type)
    machine.cap_memory(device, limit)
    if device.type == "cpu":
        host.cap_memory(limit)  # a size that is far too large fails at once, before the machine swaps
    try:
        made[:] = made or make(job, levers, device)
        figures = run(job, *made, device)
    except (RuntimeError, MemoryError) as e:
        figures = {"failure": OUT_OF_MEMORY if is_out_of_memory(e) else f"{type(e).__name__}: {first_line(e)[:100]}"}
    report(Trial(job.micro_batch_size, levers, job.compile, **figures))


def make(job, levers, device):
    """(model, optimizer, gradients). A GPU draws the weights: with zeros it might run faster than in training."""
    world = World.imagined(job.ranks) if levers.shard else ALONE
    made_on = torch.device("cpu") if levers.shard else device  # a whole model may not fit the device
    with made_on, models.WithoutDrawing() if made_on.type == "cpu" else contextlib.nullcontext():
        model = models.build(*models.from_source(job.source), job.model_args, empty=levers.shard)
    models.apply_levers(model, levers)
    sharding.place(model, world, device, job.dtype, levers)
    optimizer = make_optimizer(model, levers.optimizer_state, 0.1, 6e-4, (0.9, 0.95), device, job.optimizer)
    allocate_state(optimizer)  # as train.py
    return model, optimizer, gradients.of(model, world, levers)


def run(job, model, optimizer, own_gradients, device):
    """The figures of a Trial."""
    scaler = machine.grad_scaler(device, job.dtype)
    autocast = machine.autocast(device, job.dtype)
    batches = RandomBatch(job.micro_batch_size, job.model_args["block_size"], job.model_args["vocab_size"], device)
    compile_seconds = 0.0
    if job.compile:
        start = time.perf_counter()
        model, failure = compile_to_train(model, device, batches.current, autocast, job.compile_mode, job.ranks)
        if failure:
            return {"failure": f"{FAILS} ({failure})"}
        compile_seconds = time.perf_counter() - start

    def step():
        train_step(model, optimizer, scaler, batches, autocast, job.grad_clip, own_gradients)

    def seconds(micro_steps):
        batches.micro_steps = micro_steps
        return machine.seconds_of(step, device)[0]

    def best(micro_steps):
        times = [seconds(micro_steps)]
        while sum(times) < TIMED_SECONDS / 2 and len(times) < 10:
            times.append(seconds(micro_steps))
        return min(times)

    # From the second micro-step on, gradients exist while activations grow. On one of several ranks they always do.
    seconds(2 if job.ranks > 1 else min(2, job.micro_steps))
    evaluate(model, batches, 1, autocast)
    machine.empty_cache(device)
    machine.reset_peak_memory(device)
    retries = machine.allocator_retries(device)
    # An iteration is one micro-step with the update, and others without. Timing short and long steps gives both.
    # A quick micro-step needs more of them, or noise would hide the difference.
    first, another = best(1), 0.0
    if job.micro_steps > 1:
        several = min(8, job.micro_steps) if first < 0.25 else 2
        another = max((best(several) - first) / (several - 1), 0.1 * first)
    evaluate(model, batches, 1, autocast)
    tokens = job.micro_steps * job.micro_batch_size * job.model_args["block_size"]
    return {
        "peak_bytes": machine.peak_reserved_bytes(device),
        "allocated_bytes": machine.peak_allocated_bytes(device),
        "tokens_per_second": tokens / (first + (job.micro_steps - 1) * another),
        "retries": machine.allocator_retries(device) - retries,
        "compile_seconds": compile_seconds,
    }


def listen(jobs):
    """Put each Job into a queue. When standard input is closed, end at once, so that the GPU is free again."""
    for line in sys.stdin:
        jobs.put(from_json(line, Job))
    os._exit(1)


if __name__ == "__main__":
    jobs, made = queue.SimpleQueue(), []
    threading.Thread(target=listen, args=(jobs,), daemon=True).start()
    while True:
        job = jobs.get()
        measure(job, made)
        if job.compile:
            break  # ends Python, and with it the compiler's workers
