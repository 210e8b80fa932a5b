"""What a training step would take of a device's memory, found without the device.

The step runs on fake tensors, in which only sizes are real (torch's FakeTensorMode), while MemTracker counts what
they would hold: no memory, seconds, and within a few percent of what the device's allocator reports.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from model import GPT, GPTConfig
from nanofit import runtime
from nanofit.batches import RandomBatch
from nanofit.step import train_step

CPU = torch.device("cpu")  # fake CUDA tensors abort a torch without CUDA; sizes are the same
PARTS = ("weights", "gradients", "optimizer state", "activations", "loss and backward")


class Compact8bit(torch.optim.Optimizer):
    """The state of an 8-bit AdamW and nothing else: two bytes an element and two scales a block."""

    BLOCK, SMALL = 256, 4096  # elements; tensors below SMALL stay as they are

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.numel() >= self.SMALL and p.numel() % self.BLOCK == 0:
                sizes = (p.numel(), torch.uint8), (p.numel() // self.BLOCK, torch.float32)
            else:
                sizes = ((p.numel(), torch.float32),)
            self.state[p] = {
                f"{moment}{i}": torch.empty(size, dtype=dtype)
                for moment in ("first", "second")
                for i, (size, dtype) in enumerate(sizes)
            }


def _optimizer(kind, model):
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    if kind == "8bit":
        optimizer = Compact8bit(optimizer.param_groups)
    elif kind == "offload":  # the device holds no state at all, as with plain SGD
        optimizer = torch.optim.SGD(optimizer.param_groups, lr=0.1)
    optimizer.defaults["fused"] = True  # a step doesn't look at gradients first, which fake ones don't have
    return optimizer


class _Run:
    """A model whose forward pass is another function."""

    def __init__(self, model, forward):
        self.model, self.forward, self.parameters = model, forward, model.parameters

    def __call__(self, x, y, return_logits):
        self.logits, loss = self.forward(self.model, x, y)
        return self.logits, loss


def _snapshot(tracker, when):
    """{'Parameter': bytes, ..., 'Total': bytes}, 'current' or at the 'peak'."""
    return {str(getattr(kind, "value", kind)): n for kind, n in tracker.get_tracker_snapshot(when)[CPU].items()}


def step_memory(job, forward=None):
    """Bytes at the peak of a training step, by PARTS: a dict.

    job: as in probe.py. forward: (model, x, y) -> (logits, loss), in place of the model's own without logits.
    What is called loss and backward is all that the peak holds beside the others: the loss's chunk of logits and
    the gradients that it makes, or a block's temporary tensors, whichever is more.
    """
    with FakeTensorMode():
        model = GPT(GPTConfig(**job["model_args"]))
        model.activation_checkpointing = job["activation_checkpointing"]
        for block in model.transformer.h:
            block.attn.dropout = 0.0  # with it a CPU, unlike a GPU, would store whole attention matrices
        optimizer = _optimizer(job["optimizer_state"], model)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        size = job["batch_size"], job["model_args"]["block_size"], job["model_args"]["vocab_size"]
        batches = RandomBatch(*size, CPU, on_current=tracker.reset_mod_stats)  # it tracks one pass over the modules
        before_loss = {}
        model.transformer.ln_f.register_forward_hook(lambda *_: before_loss.update(_snapshot(tracker, "current")))
        with tracker:
            # A step finds AdamW's state, and beyond the first micro-step the gradients so far.
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            if job["micro_steps"] == 1:
                optimizer.zero_grad(set_to_none=True)
            train_step(
                model if forward is None else _Run(model, forward),
                optimizer,
                runtime.grad_scaler(CPU, "float32"),
                batches,
                autocast=runtime.autocast(CPU, job["dtype"]),
                micro_steps=1,
                grad_clip=job["grad_clip"],
            )
        peak = _snapshot(tracker, "peak")
    held = [peak[kind] for kind in ("Parameter", "Gradient", "Optstate")]
    rest = peak["Total"] - sum(held)
    activations = before_loss["Total"] - sum(before_loss[kind] for kind in ("Parameter", "Gradient", "Optstate"))
    activations = min(activations, rest)
    return dict(zip(PARTS, (*held, activations, rest - activations), strict=True))
