"""What a model is run through: one optimizer step, one evaluation, one attempt to compile.

train.py, the probe and bench.py run these functions and nothing of their own.
"""

import math
import warnings

import torch

from nanofit import runtime
from nanofit.runtime import ALONE


def accumulate(model, scaler, batches, *, autocast, micro_steps):
    """Add up the gradients of micro_steps micro-batches.

    batches: has .current (x, y) and .advance(), as batches.Batches. Returns the mean loss, a scalar tensor on the
    device: reading it waits for the GPU.
    """
    if micro_steps > 1:
        _own_gradients(model)
    total = 0.0
    for _ in range(micro_steps):
        x, y = batches.current
        with autocast:
            loss = model(x, y, return_logits=False)[1] / micro_steps
        batches.advance()  # the GPU is still busy with the forward pass
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def _own_gradients(model):
    """Let gradients add up in memory of their own.

    Those that the first backward pass would leave belong to torch.compile's CUDA graphs, if it uses them, and the
    second pass would overwrite them.
    """
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)


def update(model, optimizer, scaler, *, grad_clip, world=ALONE):
    """Share the gradients among ranks, clip them and update the weights, unless the gradients are not finite.

    grad_clip: largest gradient norm, 0 for any. Returns the norm before clipping, a scalar tensor on the device.
    """
    params = [p for p in model.parameters() if p.grad is not None]
    world.average([p.grad for p in params])
    scaler.unscale_(optimizer)
    if grad_clip:
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    try:
        _move(optimizer, scaler, norm)
        moved = True
    except torch.OutOfMemoryError:
        # Fused AdamW counts a group's steps before it moves the group: where all counts are alike, nothing moved.
        steps = {float(state["step"]) for state in optimizer.state.values()}
        if not optimizer.defaults.get("fused") or len(steps) != 1:
            raise
        moved = False
    if not moved:
        runtime.empty_cache(norm.device)
        _move(optimizer, scaler, norm)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _move(optimizer, scaler, norm):
    """The optimizer's step, left out where norm is not finite; with float16, scaler sees to that."""
    if scaler.is_enabled():
        scaler.step(optimizer)
    elif optimizer.defaults.get("fused"):
        # Told by a tensor, as GradScaler does it, fused AdamW leaves the step out without waiting for the GPU.
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        del optimizer.found_inf
    elif torch.isfinite(norm):
        optimizer.step()


def train_step(model, optimizer, scaler, batches, *, autocast, micro_steps, grad_clip):
    """accumulate and update: what an iteration of training computes. Returns the mean loss as accumulate."""
    loss = accumulate(model, scaler, batches, autocast=autocast, micro_steps=micro_steps)
    update(model, optimizer, scaler, grad_clip=grad_clip)
    return loss


@torch.no_grad()
def evaluate(model, batches, eval_iters, autocast, world=ALONE, check=lambda: None):
    """Losses of eval_iters batches of each split, of those that are this rank's: {'train': nats (n,), 'val': ...}.

    The batches are those that rank 0 would draw alone; mean_losses makes one figure of all ranks' shares. check() is
    called before each batch, and may raise to end the evaluation.
    """
    own = batches.stream()
    batches.set_stream(world.gather(own)[0])
    losses = {}
    model.eval()
    try:
        for split in ("train", "val"):
            found = []
            for pieces in batches.evaluation(split, eval_iters, world.rank, world.size):
                check()
                with autocast:
                    found.append(sum(model(x, y, return_logits=False)[1] for x, y in pieces) / len(pieces))
            losses[split] = torch.stack(found).cpu().double() if found else torch.zeros(0, dtype=torch.double)
    finally:
        model.train()
    if not world.is_main:
        batches.set_stream(own)  # as in nanoGPT, an evaluation moves the stream of rank 0 alone
    return losses


def mean_losses(losses, world=ALONE):
    """Means of what evaluate gave on each rank, {'train': nats, 'val': nats}, the same whatever their number."""
    means = {}
    for split in losses:
        shares = world.gather(losses[split])
        every = torch.cat(shares).tolist()
        means[split] = math.fsum(every) / len(every)  # exact, in whatever order the ranks have them
    return means


def dry_step(model, batch, autocast):
    """Everything that training asks of a model, without an update: two micro-steps and an evaluation.

    Two, because some of torch.compile's modes fail only where gradients accumulate.
    """
    _own_gradients(model)
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
        torch.compiler.reset()
        model.train(training)
        raise
    except Exception as e:  # anything at all; a mistake of the model's own shows again without the compiler
        failure = f"{type(e).__name__}: {(str(e).strip().splitlines() or ['no message'])[0]}"
    runtime.set_rng_state(state, device)
    if not failure:
        return compiled, ""
    torch.compiler.reset()
    model.zero_grad(set_to_none=True)
    return model.train(training), failure
