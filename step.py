"""What a model is run through: one optimizer step, one evaluation, one attempt to compile.

train.py and bench.py run these functions and nothing of their own.
"""

import warnings
from contextlib import nullcontext

import torch

import runtime


def train_step(model, optimizer, scaler, batches, *, autocast, micro_steps, grad_clip):
    """Accumulate gradients over micro_steps micro-batches, clip them, update the weights.

    batches: has .current (x, y) and .advance(), as batches.Batches. grad_clip: largest gradient norm, 0 for none.
    Returns the mean loss over the micro-batches, a scalar tensor on the device: reading it waits for the GPU.
    """
    total = 0.0
    for micro_step in range(micro_steps):
        x, y = batches.current
        # Under DDP, ranks exchange gradients once a step, in the last backward pass.
        exchange = micro_step == micro_steps - 1 or not hasattr(model, "no_sync")
        with nullcontext() if exchange else model.no_sync():
            with autocast:
                loss = model(x, y, return_logits=False)[1] / micro_steps
            batches.advance()  # the GPU is still busy with the forward pass
            scaler.scale(loss).backward()
        total += loss.detach()
    if grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def evaluate(model, batches, eval_iters, autocast):
    """Mean loss over eval_iters batches of each split: {'train': nats, 'val': nats}."""
    model.eval()
    means = {}
    for split in ("train", "val"):
        total = pieces = 0
        for x, y in batches.evaluation(split, eval_iters):
            with autocast:
                total += model(x, y, return_logits=False)[1]
            pieces += 1
        means[split] = (total / pieces).item()
    model.train()
    return means


def dry_step(model, batch, autocast):
    """Everything that training asks of a model, without an update: two micro-steps and an evaluation.

    Two, because some of torch.compile's modes fail only where gradients accumulate.
    """
    for _ in range(2):
        with autocast:
            loss = model(*batch, return_logits=False)[1]
        loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad(), autocast:
        model(*batch, return_logits=False)
    model.train()


def try_compile(model, trial, device, **options):
    """torch.compile(model, **options), kept only if trial(compiled) runs: (model, failure).

    Compilers fail at the first call, not before: without a C++ compiler or Triton, on old GPUs, on an
    operation that they don't know. Then the model comes back as it was, and failure is a sentence; else
    failure is ''. Random generators are left where they were.
    """
    state = runtime.rng_state(device)
    training = model.training
    failure = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses parts that torch deprecates
            compiled = torch.compile(model, **options)
            trial(compiled)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # anything at all; a mistake of the model's own shows again without the compiler
        failure = f"{type(e).__name__}: {(str(e).strip().splitlines() or ['no message'])[0]}"
    runtime.set_rng_state(state, device)
    if not failure:
        return compiled, ""
    torch.compiler.reset()
    model.zero_grad(set_to_none=True)
    return model.train(training), failure
