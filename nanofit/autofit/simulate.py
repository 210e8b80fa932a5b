"""What a training step would take of a device's memory, found without the device.

The step runs on fake tensors, in which only sizes are real (torch's FakeTensorMode), while MemTracker counts what
they would hold: no memory, seconds, and within a few percent of what the device's allocator reports.
"""

import math
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanofit import machine, models
from nanofit.batches import RandomBatch
from nanofit.optimizers import OPTIMIZER_STATES
from nanofit.step import accumulate, clip
from nanofit.units import FRAGMENTED, GIB, GPT2_SIZES, memory_limit

CPU = torch.device("cpu")  # fake CUDA tensors abort a torch without CUDA; sizes are the same
# What torch gives cuBLAS to work in: once for the thread that runs forward passes and once for that of backward passes.
CUBLAS_BYTES, HOPPERS_CUBLAS_BYTES = 2 * (8 * 2**20 + 2**17), 2 * 32 * 2**20
SMALLEST_BLOCK = 64  # tokens; a shorter block_size is no proposal
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


class DropoutAsOnGpus(TorchFunctionMode):
    """Dropout in a GPU's memory: a mask of bytes, where a CPU stores floats, and for attention nothing but a seed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.dropout:
            given = {**dict(zip(("input", "p", "training"), args, strict=False)), **(kwargs or {})}
            if given.get("p", 0.5) > 0 and given.get("training", True):
                return torch.native_dropout(given["input"], given.get("p", 0.5), True)[0]
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **(kwargs or {}), "dropout_p": 0.0}
        return func(*args, **(kwargs or {}))


class TiedGradientsInPlace(TorchDispatchMode):
    """Adds the second gradient of a tied weight to the first in place, as autograd does where tensors are not fake."""

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
    """MemTracker's figures of single modules, which it would go through at each operation. Nobody asks for them."""

    def values(self):
        return ()


def _optimizer(kind, model):
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    if kind == "8bit":
        optimizer = Compact8bit(optimizer.param_groups)
    elif kind == "offload":  # the device holds no state at all, as with plain SGD
        optimizer = torch.optim.SGD(optimizer.param_groups, lr=0.1)
    # Fused, a step doesn't look at the gradients' values first, which fake ones don't have.
    optimizer.defaults["fused"] = True
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def _workspaces(device_name):
    """Bytes of libraries' workspaces on a device, which may be elsewhere."""
    if not device_name.startswith("cuda"):
        return 0
    is_hopper = machine.is_here(device_name) and machine.capability(machine.find_device(device_name)) == (9, 0)
    return HOPPERS_CUBLAS_BYTES if is_hopper else CUBLAS_BYTES


def _snapshot(tracker, when):
    """{'Parameter': bytes, ..., 'Total': bytes}, 'current' or at the 'peak'."""
    return {str(getattr(kind, "value", kind)): n for kind, n in tracker.get_tracker_snapshot(when)[CPU].items()}


def _gathered(model, product_bytes, once):
    """Bytes of (weights, gradients) that sharding.py makes whole at a time; once: levers.gather_once.

    That are those outside of the blocks, in float32; and of all blocks the weights, or of two, as one is fetched while
    the other computes, and of one the gradients, as they come and in float32, as they are reduced.
    """
    blocks = [sum(p.numel() for p in block.parameters()) for block in models.blocks_of(model)]
    largest, outside = max(blocks, default=0), sum(p.numel() for p in model.parameters()) - sum(blocks)
    weights = sum(blocks) if once else 2 * largest
    return 4 * outside + product_bytes * weights, 4 * outside + (product_bytes + 4) * largest


def step_memory(model_class, config_class, job, levers):
    """Bytes at the peak of a training step, by PARTS: a dict. With levers.shard, one of job.ranks' shares.

    What is called loss and backward is all that the peak holds beside the others: the loss's chunk of logits and
    the gradients that it makes, or a block's temporary tensors, whichever is more, and libraries' workspaces. A model
    without nanoGPT's transformer.h has all of that and its activations in one.
    """
    mode = FakeTensorMode()
    model = models.build_fake(model_class, config_class, job.model_args, mode)
    with mode:
        models.apply_levers(model, levers)
        optimizer = _optimizer(levers.optimizer_state, model)
        tracker = MemTracker()
        tracker.memory_tracking = Unlisted()
        tracker.track_external(model, optimizer)
        size = job.micro_batch_size, job.model_args["block_size"], job.model_args["vocab_size"]
        batches = RandomBatch(*size, CPU, on_current=tracker.reset_mod_stats)  # it tracks one pass over the modules
        before_loss = {}
        for block in models.blocks_of(model)[-1:]:
            block.register_forward_hook(lambda *_: before_loss.update(_snapshot(tracker, "current")))
        with tracker, DropoutAsOnGpus(), TiedGradientsInPlace(model):
            # A step finds AdamW's state, and beyond the first micro-step the gradients so far.
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            if job.micro_steps == 1 and job.ranks == 1:
                optimizer.zero_grad(set_to_none=True)
            scaler, autocast = machine.grad_scaler(CPU, "float32"), machine.autocast(CPU, job.dtype)
            # As step.update, which looks at the norm's value first: fake tensors have none.
            accumulate(model, scaler, batches, autocast)
            clip(model, optimizer, scaler, job.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peak = _snapshot(tracker, "peak")
    held = [peak[kind] for kind in ("Parameter", "Gradient", "Optstate")]
    rest = peak["Total"] - sum(held) + _workspaces(job.device)
    if levers.shard:
        gathered = _gathered(model, 4 if job.dtype == "float32" else 2, levers.gather_once)
        held = [size // job.ranks + more for size, more in zip(held, (*gathered, 0), strict=True)]
    if before_loss:
        activations = before_loss["Total"] - sum(before_loss[kind] for kind in ("Parameter", "Gradient", "Optstate"))
        activations = min(activations, rest)
    else:
        activations = rest
    return dict(zip(PARTS, (*held, activations, rest - activations), strict=True))


# ---- advice ------------------------------------------------------------------------------------------------


def where_it_goes(parts):
    """One line: what each part of a simulated peak takes."""
    total = sum(parts.values())
    unit, name = (GIB, "GiB") if total > GIB / 10 else (2**20, "MiB")
    shares = ", ".join(f"{part} {size / unit:.2f}" for part, size in parts.items())
    return f"of {total / unit:.2f} {name} (simulated): {shares}"


def what_would_fit(job, facts, run_trial, may_shrink, measured_bytes=0):
    """Lines that say where a Job's memory goes and name settings that would fit the device of these Facts.

    may_shrink: whether another size of model may be proposed. measured_bytes: what the job took, where that is known.
    """

    def simulated(**changes):
        return run_trial(replace(job, simulate=True, **changes)).parts

    def fits(**changes):
        parts = simulated(**changes)
        return bool(parts) and FRAGMENTED * sum(parts.values()) + beside <= facts.limit_bytes

    def fits_shape(**changes):
        return fits(model_args={**job.model_args, **changes})

    parts = simulated()
    # Where the process counts, so does what it took to run the job, beyond its tensors.
    beside = facts.process_bytes and max(facts.process_bytes, measured_bytes - sum(parts.values()))
    lines = [where_it_goes(parts)] if parts else []
    # On a CPU, the machine's memory is the device's: nothing is freed by offloading to it.
    no_help = ("float32", job.levers.optimizer_state, *(["offload"] if facts.device_type == "cpu" else []))
    states = [] if job.levers.shard else [kind for kind in OPTIMIZER_STATES if kind not in no_help]
    tried = [f"optimizer_state={kind}" for kind in states]
    options = [f"--optimizer_state={kind}" for kind in states if fits(levers=replace(job.levers, optimizer_state=kind))]
    block_size = job.model_args["block_size"] // 2
    while block_size >= SMALLEST_BLOCK and not fits_shape(block_size=block_size):
        block_size //= 2
    tried += [f"a block_size down to {SMALLEST_BLOCK}"] if job.model_args["block_size"] > SMALLEST_BLOCK else []
    options += [f"--block_size={block_size}"] if block_size >= SMALLEST_BLOCK else []
    larger_first = reversed(GPT2_SIZES.values()) if may_shrink else ()
    smaller = [sizes for sizes in larger_first if sizes["n_layer"] < job.model_args["n_layer"]]
    tried += [f"n_layer={sizes['n_layer']}" for sizes in smaller]
    if fitting := next((sizes for sizes in smaller if fits_shape(**sizes)), None):
        options.append(" ".join(f"--{key}={value}" for key, value in fitting.items()))
    asked = math.ceil(100 * FRAGMENTED * measured_bytes / GIB) / 100
    if (
        job.memory_limit_gb
        and not job.simulate
        and facts.limit_bytes < asked * GIB <= memory_limit(facts.free_bytes, 0)
    ):
        options.append(f"--memory_limit_gb={asked}")
    if not options:
        what = f"none of these would fit either: {', '.join(tried)}" if tried else "there is no setting left to try"
        return [*lines, f"{what}: a smaller model, or more memory, is needed"]
    which = "each of these would fit" if len(options) > 1 else "this would fit"
    return [*lines, f"{which}, with batch_size 1:", *(f"  {option}" for option in options)]
