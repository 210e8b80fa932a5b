"""How gradients add up over an iteration, and become one on several ranks.

step.accumulate says when an iteration begins, when its last backward pass does, and when it has ended.
"""

import torch
import torch.distributed as dist

BUCKET_BYTES = 25 * 2**20  # that travel together, at least: small messages cost more time than bytes


def of(model, world, levers):
    """What a model's gradients need on this rank. All ranks must call it, once the model is on its device."""
    if world.sharded:
        return ShardedGradients(model, levers.gather_once)
    return Gradients(model) if world.size == 1 else AveragedGradients(model, world.size)


class Gradients:
    """Those of one process."""

    def __init__(self, model):
        self.model = model

    def begin(self, micro_steps):
        """An iteration of so many backward passes begins.

        Gradients that the first pass leaves are added to as they are, but for those of torch.compile's CUDA graphs,
        where it uses them: the second pass would overwrite them, so these get memory of their own.
        """
        if micro_steps > 1 and getattr(self.model, "runs_in_cuda_graphs", False):
            for p in self.model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)

    def last(self):
        """The last backward pass comes next."""

    def end(self):
        """The iteration is over, and if it isn't complete, its gradients will be dropped."""


class ShardedGradients(Gradients):
    """Those of a rank that holds a share of the model: FSDP2 averages each micro-step's, and adds up the shares.

    gather_once: the weights that the first pass has gathered stay until the last.
    """

    def __init__(self, model, gather_once):
        super().__init__(model)
        self.gather_once = gather_once

    def begin(self, micro_steps):  # no whole gradients: they would take the memory that sharding saves
        self.model.set_reshard_after_backward(not self.gather_once)

    def last(self):
        self.model.set_reshard_after_backward(True)


class AveragedGradients(Gradients):
    """Those of a rank that holds the whole model: means over all ranks, once an iteration.

    They lie in flat buckets, which leave one after the other while the last backward pass goes on: overlap=False sends
    them after it. end() sends whatever hasn't left, so that a rank that ran out of memory holds up nobody, and takes
    no memory for that. All ranks then agree to drop the iteration (recovery.Recovery).
    """

    def __init__(self, model, ranks, overlap=True):
        super().__init__(model)
        self.ranks, self.overlap = ranks, overlap
        self._averages = dist.get_backend() == "nccl"  # gloo adds
        self._buckets = [_Bucket(params) for params in _grouped(model)]
        self._pending, self._leave = [], False
        for bucket in self._buckets:
            for p in bucket.views:
                p.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._arrived(p, bucket))

    def begin(self, micro_steps):
        self._pending, self._leave = [], False
        for bucket in self._buckets:
            bucket.begin(own=micro_steps > 1)

    def last(self):
        self._leave = self.overlap

    def _arrived(self, p, bucket):
        """The gradient of p is complete, if this is the last pass."""
        if not self._leave:
            return
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


def _grouped(model):
    """The parameters in the order in which a backward pass reaches them, in lists of BUCKET_BYTES or a little more."""
    groups = {}  # of one dtype and device each
    for p in reversed(list(model.parameters())):
        if p.requires_grad:
            lists = groups.setdefault((p.dtype, p.device), [[]])
            if sum(q.numel() * q.element_size() for q in lists[-1]) >= BUCKET_BYTES:
                lists.append([])
            lists[-1].append(p)
    return [params for lists in groups.values() for params in lists]


class _Bucket:
    """Gradients that travel together."""

    def __init__(self, params):
        self.flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
        parts = self.flat.split([p.numel() for p in params])
        self.views = {p: part.view_as(p) for p, part in zip(params, parts, strict=True)}
        self.missing = set()  # parameters whose gradients are not in flat yet

    def begin(self, own):
        """own: gradients add up in flat itself."""
        self.missing = set(self.views)
        if own:
            self.flat.zero_()
            for p, view in self.views.items():
                p.grad = view

    def take(self, p):
        view = self.views[p]
        if p.grad is None:  # on a rank that failed, or a parameter without use
            view.zero_()
        elif p.grad is not view:
            view.copy_(p.grad)
            p.grad = view
        self.missing.discard(p)
