"""One optimizer step and one evaluation, as train.py, bench.py and auto-fit's trials run them."""

import math

import torch

from nanofit.errors import first_line
from nanofit.gradients import Gradients
from nanofit.models import loss_of
from nanofit.optimizers import leaves_out_by_tensor, parameters_of
from nanofit.progress import bar
from nanofit.ranks import ALONE


def accumulate(model, scaler, batches, autocast, gradients=None):
    """Add up the gradients of an iteration's micro-batches, on all ranks.

    batches: has .current (x, y), .advance() and .micro_steps, as batches.Batches. gradients: what gradients.of gave;
    one process alone needs none. Returns this rank's mean loss, a scalar tensor on the device.
    """
    micro_steps = batches.micro_steps
    gradients = gradients or Gradients(model)
    gradients.begin(micro_steps)
    total = None
    try:
        for step in range(micro_steps):
            x, y = batches.current
            with autocast:
                loss = loss_of(model, x, y)
            share = loss / micro_steps if micro_steps > 1 else loss
            batches.advance()  # the GPU is still busy with the forward pass
            if step == micro_steps - 1:
                gradients.last()  # from here on, several ranks may exchange what is complete
            scaler.scale(share).backward()
            figure = _figure(loss) / micro_steps
            total = figure if total is None else total + figure
    finally:
        gradients.end()
    return total


def _figure(loss):
    """A loss or a norm as a scalar in float32 or better."""
    return loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).reshape(())


def clip(model, optimizer, scaler, grad_clip):
    """Unscale the gradients, and scale them down to a norm of at most grad_clip (0: any).

    Returns the norm before clipping, a scalar tensor on the device.
    """
    params = [p for p in model.parameters() if p.grad is not None]
    scaler.unscale_(optimizer)
    if grad_clip:
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    moved = parameters_of(optimizer)
    for p in params:
        if p not in moved:  # zero_grad doesn't reach it: its gradients would add up over iterations
            p.grad = None
    return _figure(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a DTensor if sharded


def update(optimizer, scaler, norm):
    """Update the weights, and drop the gradients. If norm isn't finite, the weights stay as they are."""
    if scaler.is_enabled():
        scaler.step(optimizer)
    elif leaves_out_by_tensor(optimizer):  # so the CPU needn't wait for the norm
        optimizer.found_inf = torch.isfinite(norm).logical_not().float()
        optimizer.step()
        del optimizer.found_inf
    elif torch.isfinite(norm):
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def train_step(model, optimizer, scaler, batches, autocast, grad_clip, gradients=None):
    """One iteration of training. Returns the mean loss as accumulate."""
    loss = accumulate(model, scaler, batches, autocast, gradients)
    update(optimizer, scaler, clip(model, optimizer, scaler, grad_clip))
    return loss


@torch.no_grad()
def evaluate(model, batches, eval_iters, autocast, world=ALONE, check=lambda: None):
    """Losses of this rank's share of eval_iters batches of each split: {'train': nats (n,), 'val': nats (n,)}.

    mean_losses averages them over all ranks. check() is called before each batch, and may raise to end the evaluation.
    """
    losses = {}
    model.eval()
    try:
        for split in ("train", "val"):
            found = []
            share = len(range(world.rank, eval_iters, world.size))
            dealt = batches.evaluation(split, eval_iters, world.rank, world.size, world.sharded)
            for pieces in bar(dealt, f"{split} loss", share):
                if not world.sharded:  # a sharded rank that ended alone would leave the others waiting
                    check()
                with autocast:
                    found.append(sum(_figure(loss_of(model, x, y)) for x, y in pieces) / len(pieces))
            found = found[:share]  # a sharded rank may have got a batch twice, to keep pace with the others
            losses[split] = torch.stack(found).cpu().double() if found else torch.zeros(0, dtype=torch.double)
    finally:
        model.train()
    return losses


def mean_losses(losses, world=ALONE):
    """Means of what evaluate gave on each rank: {'train': nats, 'val': nats}, the same for any number of ranks."""
    means = {}
    for split in losses:
        every = torch.cat(world.all_gather(losses[split])).tolist()
        means[split] = math.fsum(every) / len(every)  # exact, so that their order doesn't matter
    return means


@torch.no_grad()
def more_figures(model, functions, world=ALONE):
    """The figures of all functions of the model for an evaluation, in one dict {name: number}.

    One that raises is left out with a line. On several ranks it ends the run: others may wait for it.
    """
    found = {}
    model.eval()
    try:
        for figures_of in functions:
            try:
                found |= {str(name): figure for name, figure in figures_of(model).items()}
            except Exception as e:  # of a function that somebody wrote; memory may have run out in it
                if world.size > 1:
                    raise
                name = getattr(figures_of, "__name__", type(figures_of).__name__)
                print(f"{name} failed ({type(e).__name__}: {first_line(e)}): training goes on")
    finally:
        model.train()
    return found
