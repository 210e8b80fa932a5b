"""How much of a device's memory a training step would take, found without the device.

The step runs on fake tensors, which have only sizes (torch's FakeTensorMode), while MemTracker counts what they would
hold. It takes seconds and no memory, and is within a few percent of what the device's allocator reports.
"""

import contextlib
import functools
import io
import warnings
from collections import OrderedDict

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from nanofit import machine, models
from nanofit.autofit.plan import UNSIMULATED, Trial
from nanofit.batches import RandomBatch
from nanofit.errors import first_line
from nanofit.optimizers import configured
from nanofit.step import accumulate, clip

CPU = torch.device("cpu")  # fake CUDA tensors abort a torch without CUDA; sizes are the same
# torch gives cuBLAS a workspace for each of two threads: that of forward passes and that of backward passes.
CUBLAS_BYTES = 2 * (8 * 2**20 + 2**17)
KINDS = ("Parameter", "Gradient", "Optstate")  # MemTracker's names
# AdamW's state on the device, as a share of the float32 state. 8 bits: a byte for each element, and a float32 scale for
# each 256 elements.
STATE_SHARES = {"float32": 1.0, "8bit": 65 / 256, "offload": 0.0}
STATE = "optimizer state"
READS = (torch.Tensor.item, torch.Tensor.__float__)
HOOKS_OF_GRADIENTS = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)
PARTS = ("weights", "gradients", STATE, "activations", "loss and backward")


class AsOnGpus(TorchFunctionMode):
    """Dropout with a GPU's memory: a mask of bytes, where a CPU stores floats; for attention, only a seed.

    A number that a model or an optimizer reads, as for a statistic, is 1. Reading a count or a condition still raises.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOOKS_OF_GRADIENTS and not args[0].requires_grad:
            return RemovableHandle(OrderedDict())  # MemTracker asks for those of frozen weights, too: there are none
        if func in READS and args[0].is_floating_point():
            return 1.0
        if func is F.dropout:
            given = {**dict(zip(("input", "p", "training"), args, strict=False)), **(kwargs or {})}
            if given.get("p", 0.5) > 0 and given.get("training", True):
                return torch.native_dropout(given["input"], given.get("p", 0.5), True)[0]
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **(kwargs or {}), "dropout_p": 0.0}
        return func(*args, **(kwargs or {}))


def _in_mode(forward):
    """A block's forward in a mode of its own: backward() turns the mode around it off, and may run the block again."""

    @functools.wraps(forward)
    def call(*args, **options):
        with AsOnGpus():
            return forward(*args, **options)

    return call


class TiedGradientsInPlace(TorchDispatchMode):
    """Adds the second gradient of a tied weight to the first in place, as autograd does with real tensors."""

    def __init__(self, model):
        super().__init__()
        self.shapes = {p.shape for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.add.Tensor and torch._C._current_autograd_node():
            a, b = args
            if isinstance(b, torch.Tensor) and a.shape == b.shape and a.shape in self.shapes:
                return torch.ops.aten.add_.Tensor(a, b)
        return func(*args, **(kwargs or {}))


class Unlisted(dict):
    """Hides MemTracker's figures of single modules, which it would walk through at each operation."""

    def values(self):
        return ()


def _optimizer(model, name):
    optimizer = configured(model, name, 0.1, 6e-4, (0.9, 0.95), "cpu")
    # A fused step doesn't read the gradients' values, which fake tensors don't have.
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def _snapshot(tracker, when):
    """{'Parameter': bytes, ..., 'Total': bytes}, 'current' or at the 'peak'."""
    return {str(getattr(kind, "value", kind)): n for kind, n in tracker.get_tracker_snapshot(when)[CPU].items()}


def _gathered(model, product_bytes, once):
    """Bytes of whole (weights, gradients) that exist at a time in a sharded model. once: levers.gather_once.

    Outside the blocks, all are whole, in float32. Weights of blocks: of two, as one is fetched while another computes,
    or of all with gather_once. Gradients of blocks: of one, as computed, and in float32, as reduced.
    """
    blocks = [sum(p.numel() for p in block.parameters()) for block in models.blocks_of(model)]
    largest, outside = max(blocks, default=0), sum(p.numel() for p in model.parameters()) - sum(blocks)
    weights = sum(blocks) if once else 2 * largest
    return 4 * outside + product_bytes * weights, 4 * outside + (product_bytes + 4) * largest


def step_memory(model_class, config_class, job, levers):
    """Bytes at the peak of a training step, {part: bytes} for PARTS. With levers.shard, those of one of job.ranks.

    "loss and backward" is the rest of the peak: the loss's chunk of logits and their gradients, or a block's temporary
    tensors, whichever is more, and libraries' workspaces. Without transformer.h, "activations" has it all.
    """
    mode = FakeTensorMode()
    model = models.build_fake(model_class, config_class, job.model_args, mode)
    with mode:
        for block in models.blocks_of(model):
            block.forward = _in_mode(block.forward)
        models.apply_levers(model, levers)
        optimizer = _optimizer(model, job.optimizer)
        tracker = MemTracker()
        tracker.memory_tracking = Unlisted()
        parts = getattr(optimizer, "parts", [optimizer])
        own = [part for part in parts if isinstance(part, torch.optim.Optimizer)]  # others count as activations
        tracker.track_external(model, *own)
        size = job.micro_batch_size, job.model_args["block_size"], job.model_args["vocab_size"]
        batches = RandomBatch(*size, CPU, on_current=tracker.reset_mod_stats)  # it tracks one pass over the modules
        before_loss = {}
        for block in models.blocks_of(model)[-1:]:
            block.register_forward_hook(lambda *_: before_loss.update(_snapshot(tracker, "current")))
        with tracker, AsOnGpus(), TiedGradientsInPlace(model):
            # Before the step that counts: AdamW's state, and gradients, which exist from the second micro-step on.
            for p in (p for p in model.parameters() if p.requires_grad):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            if job.micro_steps == 1 and job.ranks == 1:
                optimizer.zero_grad(set_to_none=True)
            scaler, autocast = machine.grad_scaler(CPU, "float32"), machine.autocast(CPU, job.dtype)
            # As train_step, except that update() would read the norm's value.
            accumulate(model, scaler, batches, autocast)
            clip(model, optimizer, scaler, job.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peak = _snapshot(tracker, "peak")
    held = [peak[kind] for kind in KINDS]
    rest = peak["Total"] - sum(held) + CUBLAS_BYTES * job.device.startswith("cuda")
    if job.optimizer == "adamw":
        held[2] = int(held[2] * STATE_SHARES[levers.optimizer_state])
    if levers.shard:
        gathered = _gathered(model, 4 if job.dtype == "float32" else 2, levers.gather_once)
        held = [size // job.ranks + more for size, more in zip(held, (*gathered, 0), strict=True)]
    activations = rest
    if before_loss:
        before = before_loss["Total"] - sum(before_loss[kind] for kind in KINDS)
        activations = min(before, rest)
    return dict(zip(PARTS, (*held, activations, rest - activations), strict=True))


@contextlib.contextmanager
def quietly():
    """Hide what a model prints, and torch's warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def simulate(job):
    """The Trial of a Job, simulated."""
    levers = job.levers.within(job.limit_bytes, job.device.partition(":")[0])
    try:
        with quietly():
            parts = step_memory(*models.from_source(job.source), job, levers)
    except Exception as e:  # a model that reads values may raise anything: fake tensors have none
        why = f"{UNSIMULATED} ({type(e).__name__}: {first_line(e)[:100]})"
        return Trial(job.micro_batch_size, levers, failure=why, limit_bytes=job.limit_bytes)
    return Trial(job.micro_batch_size, levers, peak_bytes=sum(parts.values()), parts=parts, limit_bytes=job.limit_bytes)
