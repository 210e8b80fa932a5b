"""What a training step would take of a device's memory, found without the device.

The step runs on fake tensors, in which only sizes are real (torch's FakeTensorMode), while MemTracker counts what
they would hold: no memory, seconds, and within a few percent of what the device's allocator reports.
"""

import contextlib
import io
import warnings
from dataclasses import replace
from itertools import islice

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanofit import machine, models
from nanofit.autofit.plan import UNSIMULATED, Trial
from nanofit.batches import RandomBatch
from nanofit.errors import first_line
from nanofit.optimizers import OPTIMIZER_STATES, configured
from nanofit.step import accumulate, clip
from nanofit.units import FRAGMENTED, GIB, GPT2_SIZES

CPU = torch.device("cpu")  # fake CUDA tensors abort a torch without CUDA; sizes are the same
# What torch gives cuBLAS to work in: once for the thread that runs forward passes and once for that of backward passes.
CUBLAS_BYTES = 2 * (8 * 2**20 + 2**17)
SMALLEST_BLOCK = 64  # tokens; a shorter block_size is no proposal
KINDS = ("Parameter", "Gradient", "Optstate")  # of what MemTracker counts
STATE_SHARES = {"float32": 1.0, "8bit": 65 / 256, "offload": 0.0}  # of AdamW's state in float32, as compact_bytes
PARTS = ("weights", "gradients", "optimizer state", "activations", "loss and backward")


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


def _optimizer(kind, model, name):
    optimizer = configured(model, name, 0.1, 6e-4, (0.9, 0.95), "cpu")
    if kind != "float32" and name == "adamw":  # the device holds no state, as with plain SGD, or that of compact_bytes
        optimizer = torch.optim.SGD(optimizer.param_groups, lr=0.1)
    # Fused, a step doesn't look at the gradients' values first, which fake ones don't have.
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def compact_bytes(params):
    """Bytes of an 8-bit AdamW's state: of each moment a byte an element, and a scale in float32 for each 256.

    Tensors of less than 4,096 elements, or of no whole number of blocks, stay in float32.
    """
    sizes = [p.numel() for p in params]
    return sum(2 * (n + 4 * n // 256 if n >= 4096 and n % 256 == 0 else 4 * n) for n in sizes)


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
        optimizer = _optimizer(levers.optimizer_state, model, job.optimizer)
        tracker = MemTracker()
        tracker.memory_tracking = Unlisted()
        parts = getattr(optimizer, "parts", [optimizer])
        own = [part for part in parts if isinstance(part, torch.optim.Optimizer)]  # else activations
        tracker.track_external(model, *own)
        size = job.micro_batch_size, job.model_args["block_size"], job.model_args["vocab_size"]
        batches = RandomBatch(*size, CPU, on_current=tracker.reset_mod_stats)  # it tracks one pass over the modules
        before_loss = {}
        for block in models.blocks_of(model)[-1:]:
            block.register_forward_hook(lambda *_: before_loss.update(_snapshot(tracker, "current")))
        with tracker, DropoutAsOnGpus(), TiedGradientsInPlace(model):
            # A step finds AdamW's state, and beyond the first micro-step the gradients so far.
            for p in (p for p in model.parameters() if p.requires_grad):
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
    held = [peak[kind] for kind in KINDS]
    rest = peak["Total"] - sum(held) + CUBLAS_BYTES * job.device.startswith("cuda")
    if levers.optimizer_state == "8bit":
        held[2] += compact_bytes(model.parameters())
    if levers.shard:
        gathered = _gathered(model, 4 if job.dtype == "float32" else 2, levers.gather_once)
        held = [size // job.ranks + more for size, more in zip(held, (*gathered, 0), strict=True)]
    activations = rest
    if before_loss:
        before = before_loss["Total"] - sum(before_loss[kind] for kind in KINDS)
        activations = min(before, rest)
    return dict(zip(PARTS, (*held, activations, rest - activations), strict=True))


@contextlib.contextmanager
def _quietly():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def simulate(job):
    """The Trial of a Job for a device of job.limit_bytes, which need not be here."""
    levers = job.levers.within(job.limit_bytes, job.device.partition(":")[0])
    try:
        with _quietly():
            parts = step_memory(*models.from_source(job.source), job, levers)
    except Exception as e:  # anything at all: fake tensors have no values, and a model may look at them
        why = f"{UNSIMULATED} ({type(e).__name__}: {first_line(e)[:100]})"
        return Trial(job.micro_batch_size, levers, failure=why, limit_bytes=job.limit_bytes)
    return Trial(job.micro_batch_size, levers, peak_bytes=sum(parts.values()), parts=parts, limit_bytes=job.limit_bytes)


def flops_of_a_sequence(job):
    """FLOP of a sequence's forward and backward pass by the model's own estimate_mfu, 0 where it can't tell."""
    with contextlib.suppress(Exception), _quietly():  # of a model that somebody wrote
        model = models.build(*models.from_source(job.source), job.model_args, empty=True)
        return models.share_of_peak(model, sequences=1, seconds=1.0, peak_flops=1.0)
    return 0.0


# ---- advice ------------------------------------------------------------------------------------------------


def where_it_goes(parts):
    """One line: what each part of a simulated peak takes."""
    total = sum(parts.values())
    unit, name = (GIB, "GiB") if total > GIB / 10 else (2**20, "MiB")
    shares = ", ".join(f"{part} {size / unit:.2f}" for part, size in parts.items())
    return f"of {total / unit:.2f} {name} (simulated): {shares}"


def what_would_fit(job, facts, run_trial, may_shrink):
    """Lines that say where a Job's memory goes and name settings that would fit the device of these Facts.

    may_shrink: whether another size of model may be proposed.
    """
    asked, known = job.levers.optimizer_state, {}
    # On a CPU, the machine's memory is the device's: nothing is freed by offloading to it.
    no_help = ("float32", asked, *(["offload"] if facts.device_type == "cpu" else []))
    others = [] if job.levers.shard else [kind for kind in OPTIMIZER_STATES if kind not in no_help]

    def parts_of(sizes, state):
        """Of one simulation for all states, which is what takes time."""
        key = tuple(sizes.items())
        if key not in known:
            levers = replace(job.levers, optimizer_state="float32")
            model_args = {**job.model_args, **sizes}
            known[key] = run_trial(replace(job, simulate=True, model_args=model_args, levers=levers)).parts
        parts = known[key]
        return {**parts, PARTS[2]: int(STATE_SHARES[state] * parts[PARTS[2]])} if parts else {}

    def fits(parts):
        return bool(parts) and FRAGMENTED * sum(parts.values()) + facts.process_bytes <= facts.limit_bytes

    def first(family, states):
        """The first sizes, and with them the first state, that fit: [flags], else []."""
        found = ((sizes, state) for sizes in family for state in states if fits(parts_of(sizes, state)))
        return [_flags(sizes, state, asked) for sizes, state in islice(found, 1)]

    shorter, block_size = [], job.model_args["block_size"] // 2
    while block_size >= SMALLEST_BLOCK:
        shorter.append({"block_size": block_size})
        block_size //= 2
    larger_first = reversed(GPT2_SIZES.values()) if may_shrink else ()
    smaller = [sizes for sizes in larger_first if sizes["n_layer"] < job.model_args["n_layer"]]
    own = parts_of({}, asked)
    lines = [where_it_goes(own)] if own else []
    options = [_flags({}, state, asked) for state in others if fits(parts_of({}, state))]
    # Where the state alone is no way out, it is one beside a shorter block, unless what no block changes is too much.
    held = {state: {part: parts_of({}, state).get(part, 0) for part in PARTS[:3]} for state in (asked, *others)}
    possible = [state for state, parts in held.items() if fits(parts)]
    options += first(shorter, [state for state in possible if state == asked]) or (
        [] if options else first(shorter, [state for state in possible if state != asked])
    )
    options += first(smaller, [asked, *others])
    if not options:
        tried = [_flags({}, state, asked) for state in others]
        tried += [_flags(sizes, asked, asked) for sizes in (*shorter[-1:], *smaller[-1:])]
        what = f"none of these would fit either: {', '.join(tried)}" if tried else "there is no setting left to try"
        return [*lines, f"{what}: a smaller model, or more memory, is needed"]
    which = "each of these would fit" if len(options) > 1 else "this would fit"
    return [*lines, f"{which}, with batch_size 1:", *(f"  {option}" for option in options)]


def _flags(sizes, state, asked):
    changed = {**sizes, **({"optimizer_state": state} if state != asked else {})}
    return " ".join(f"--{key}={value}" for key, value in changed.items())
