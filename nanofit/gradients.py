"""How gradients add up over an iteration, and are averaged over ranks.

A weight that no rank uses in an iteration has no gradient, so that the optimizer leaves it alone. If only some ranks
use a weight, the others count as zeros in the mean: as torch's DistributedDataParallel with find_unused_parameters.

step.accumulate calls begin() before the first backward pass, last() before the last one, and end() after it.
"""

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from nanofit.errors import UsageError
from nanofit.models import blocks_of

BUCKET_BYTES = 25 * 2**20  # gradients that are sent together, at least: many small messages are slow


def of(model, world, levers):
    """The Gradients of a model on this rank. All ranks must call it, after sharding.place."""
    if world.sharded:
        return ShardedGradients(model, world, levers.gather_once)
    return Gradients(model) if world.size == 1 else AveragedGradients(model, world)


class Gradients:
    """The gradients of one process."""

    def __init__(self, model):
        self.model = model
        self._zeros = []  # (parameter, its gradient before the first pass, that tensor's version)

    def begin(self, micro_steps):
        """An iteration of micro_steps backward passes begins.

        In torch.compile's CUDA graphs the second pass would overwrite the gradients of the first. There, they get
        memory of their own before the first pass.
        """
        self._zeros = []
        if micro_steps > 1 and getattr(self.model, "runs_in_cuda_graphs", False):
            for p in self.model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
                    self._zeros.append((p, p.grad, p.grad._version))

    def last(self):
        """The last backward pass comes next."""

    def end(self):
        """The iteration is over. If a pass failed, its gradients will be dropped."""
        for p, zeros, version in self._zeros:
            if p.grad is zeros and zeros._version == version:
                p.grad = None
        self._zeros = []


class Buffers:
    """Buffers that training changes, such as running means: all ranks take rank 0's after each iteration.

    A change is seen by torch's version counter. Some kernels don't increase it for all of their buffers, for example
    batch norm's. So if one buffer has changed, all are shared.
    """

    def __init__(self, model, world):
        self.model, self.world = model, world
        self._seen = self._state()

    def _state(self):
        return [(id(buffer), buffer._version) for buffer in self.model.buffers()]

    def share(self):
        """All ranks must call it."""
        if not self._seen or not self.world.all_reduce_max(int(self._state() != self._seen)):
            return
        self.world.broadcast(self.model.buffers())
        self._seen = self._state()


class AveragedGradients(Gradients):
    """The gradients of a rank that holds the whole model: averaged over all ranks, once an iteration.

    They lie in flat buckets. During the last backward pass each bucket is sent as soon as it is complete. end() sends
    the rest, without new memory: so a rank that ran out of memory doesn't block the others. All ranks then agree to
    drop the iteration (recovery.Recovery).
    """

    def __init__(self, model, world):
        super().__init__(model)
        self.ranks = world.size
        self._averages = dist.get_backend() == "nccl"  # gloo can only add
        self._buckets = [_Bucket(params) for params in _grouped(model)]
        self._buffers = Buffers(model, world)
        self._pending, self._leave = [], False
        for bucket in self._buckets:
            for p in bucket.views:
                p.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._arrived(p, bucket))

    def begin(self, micro_steps):
        self._pending, self._leave = [], False
        for bucket in self._buckets:
            bucket.begin(own=micro_steps > 1)

    def last(self):
        self._leave = True

    def _arrived(self, p, bucket):
        """The gradient of p is complete, if this is the last pass."""
        bucket.used.add(p)
        if not self._leave:
            return
        if bucket in self._buckets[: len(self._pending)]:
            raise UsageError(
                "model.py's backward pass gives a weight its gradient in several parts, which several ranks can't "
                "average in time: call torch.utils.checkpoint with use_reentrant=False"
            )
        bucket.take(p)
        # In the same order on all ranks.
        while len(self._pending) < len(self._buckets) and not self._buckets[len(self._pending)].missing:
            self._send()

    def _send(self):
        how = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        self._pending.append(dist.all_reduce(self._buckets[len(self._pending)].flat, how, async_op=True))

    def end(self):
        self._leave = False
        for bucket in self._buckets:
            for p in list(bucket.missing):
                bucket.take(p)
        while len(self._pending) < len(self._buckets):
            self._send()
        for sent, bucket in zip(self._pending, self._buckets, strict=True):
            sent.wait()
            if not self._averages:
                bucket.flat.div_(self.ranks)
            bucket.leave_unused()
        self._buffers.share()


def _grouped(model):
    """The parameters in the order of a backward pass, in lists of BUCKET_BYTES or a little more."""
    groups = {}  # by dtype and device
    for p in reversed(list(model.parameters())):
        if p.requires_grad:
            lists = groups.setdefault((p.dtype, p.device), [[]])
            if sum(q.numel() * q.element_size() for q in lists[-1]) >= BUCKET_BYTES:
                lists.append([])
            lists[-1].append(p)
    return [params for lists in groups.values() for params in lists]


class _Bucket:
    """Gradients that are sent together, followed by a flag for each: 0 if this rank didn't use the parameter."""

    def __init__(self, params):
        sizes = [p.numel() for p in params]
        self.flat = torch.zeros(sum(sizes) + len(params), dtype=params[0].dtype, device=params[0].device)
        *parts, self.flags = self.flat.split([*sizes, len(params)])
        self.views = {p: part.view_as(p) for p, part in zip(params, parts, strict=True)}
        self.numbers = {p: number for number, p in enumerate(params)}
        self.missing = set()  # parameters whose gradients are not in flat yet
        self.used = set()  # parameters that got a gradient in this iteration on this rank

    def begin(self, own):
        """own: gradients add up in flat itself."""
        self.missing, self.used = set(self.views), set()
        self.flags.fill_(1)
        if own:
            self.flat[: -len(self.views)].zero_()
            for p, view in self.views.items():
                p.grad = view

    def take(self, p):
        view = self.views[p]
        if p not in self.used:  # or this rank failed before
            view.zero_()
            self.flags[self.numbers[p]] = 0
        elif p.grad is not view:
            view.copy_(p.grad)
            p.grad = view
        self.missing.discard(p)

    def leave_unused(self):
        """Give a parameter that some rank used the mean, and one that no rank used no gradient."""
        if len(self.used) == len(self.views):
            return  # reading the flags would wait for the GPU
        for (p, view), used in zip(self.views.items(), self.flags.tolist(), strict=True):
            p.grad = view if used else None


class ShardedGradients(Gradients):
    """The gradients of a rank that holds a share of the model. FSDP2 averages and adds up those of each micro-step.

    After a block's backward pass FSDP2 sends the gradients that the block has, and all ranks must send as many. So
    weights that a pass didn't use get zeros just before. gather_once: weights stay gathered from the first pass to the
    last.
    """

    def __init__(self, model, world, gather_once):
        super().__init__(model)
        self.world, self.gather_once = world, gather_once
        self._buffers = Buffers(model, world)
        numbers = {}  # {share: its number}; while weights are gathered, a module's parameters are others
        self._parts = {part: [] for part in (*blocks_of(model), model)}  # modules that are gathered one at a time
        for part, members in self._parts.items():
            for module in part.modules():
                for name, p in module.named_parameters(recurse=False):
                    if p.requires_grad and p not in numbers:
                        members.append((numbers.setdefault(p, len(numbers)), module, name))
        self._shares = list(numbers)
        self._filled = set()
        self.begin(0)
        # FSDP2 registered its hooks before, so that its hook on a block runs first. As a decorator, disable would
        # import Dynamo in every start, which takes a second.
        for block in blocks_of(model):
            block.register_forward_pre_hook(torch.compiler.disable(self._entered), with_kwargs=True)
        model.register_forward_hook(torch.compiler.disable(self._computed), prepend=True)

    def begin(self, micro_steps):  # no whole gradients: they would take the memory that sharding saves
        self._missing_passes, self._in_backward = micro_steps, False
        self._used = [False] * len(self._shares)
        self.model.set_reshard_after_backward(not self.gather_once)

    def last(self):
        self.model.set_reshard_after_backward(True)

    def _entered(self, block, args, kwargs):
        """Fill a block's gradients as soon as its input has a gradient, as FSDP2 sends them then."""
        if torch.is_grad_enabled() and not self._in_backward:  # a checkpoint calls the block in the backward pass
            self._at_gradients_of((args, kwargs), lambda _: self._fill(block))

    def _computed(self, model, args, outputs):
        """Fill the rest at the end of the backward pass that begins at these outputs."""
        self._at_gradients_of(outputs, self._begin_pass)

    @staticmethod
    def _at_gradients_of(tensors, hook):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(hook)

    def _begin_pass(self, _):
        if not self._in_backward:
            self._in_backward, self._filled = True, set()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)  # before FSDP2's own

    def _end_pass(self):
        for part in self._parts:
            if part not in self._filled:  # weights outside the blocks, and blocks whose input needs no gradient
                self._fill(part)
        self._in_backward = False
        self._missing_passes -= 1

    def _fill(self, part):
        self._filled.add(part)
        for number, module, name in self._parts[part]:
            p = module._parameters[name]
            if hasattr(p, "device_mesh"):
                continue  # a share, so no rank has gathered this weight in this pass
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                self._used[number] = True

    def end(self):
        if self._missing_passes > 0:
            return  # this rank failed and will end; the others wait for its shares, not for the next lines
        for p, used in zip(self._shares, self.world.any_of(self._used), strict=True):
            if not used:
                p.grad = None
        self._buffers.share()
