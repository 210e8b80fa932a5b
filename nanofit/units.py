"""Values that many modules share: units, GPT-2's sizes, memory levers. Nothing of the project is imported here."""

import math
from dataclasses import dataclass, fields, replace

GIB = 2**30
CONTEXT_BYTES = GIB // 2  # what CUDA itself takes of a card, as assumed in plans
FRAGMENTED = 1.03  # reserved bytes for each byte that tensors hold, as assumed in simulations
GPT2_SIZES = {  # what OpenAI released, by the name on the Hugging Face hub
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
PADDED_VOCAB_SIZE = 50304  # GPT-2's 50257, rounded up to a multiple of 64: faster matrix products


def gib(size):
    """Bytes for people: '2.61 GiB'."""
    return f"{size / GIB:.2f} GiB"


def divisors(n):
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def micro_batch_sizes(batch_size, per_iter):
    """The possible sizes of a micro-batch, ascending: parts of a batch, or several of a rank's per_iter batches."""
    return divisors(batch_size) + [batch_size * several for several in divisors(per_iter)[1:]]


def duration(seconds):
    """Seconds for people: '40 s', '3.3 min', '17.5 h', '4.0 days', '28,992 days'."""
    if abs(seconds) >= 86400:
        return f"{seconds / 86400:{'.1f' if abs(seconds) < 100 * 86400 else ',.0f'}} days"
    if abs(seconds) >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if abs(seconds) >= 60 else f"{seconds:.0f} s"


def amount(n):
    """A whole number for people: '65,536', '1.3 billion'."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if n >= size:
            return f"{n / size:.1f} {name}"
    return f"{n:,}"


@dataclass(frozen=True)
class MemoryLevers:
    """What trades speed for memory. Each field is a key of train.py of the same name."""

    recompute: bool = False  # blocks compute their activations again in the backward pass
    optimizer_state: str = "float32"  # or '8bit', 'offload': see optimizers.py
    loss_chunk_mb: int = 0  # MiB of logits that exist at a time; 0: by the memory there is
    shard: bool = False  # several ranks hold one model together: see sharding.py
    gather_once: bool = False  # with shard: weights are gathered once an iteration, not for each use

    def within(self, limit_bytes, device_type="cuda"):
        """These levers with loss_chunk_mb set for a device of so much memory (0: unknown)."""
        if self.loss_chunk_mb:
            return self
        if device_type == "cpu":
            return replace(self, loss_chunk_mb=64)  # a CPU's caches prefer small chunks
        # In 16 bits this is 2% of a GPU's memory; a chunk below 128 MiB saves little.
        return replace(self, loss_chunk_mb=max(128, limit_bytes // 25 // 2**20 // 128 * 128))

    def __str__(self):
        """The levers that are not at their default, for messages: ', recompute'."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        moved.pop("loss_chunk_mb", None)  # within() sets it everywhere
        if not self.shard:
            moved.pop("gather_once", None)
        return "".join(f", {name}" if value is True else f", {name} {value}" for name, value in moved.items())


FITTED = ("recompute", "loss_chunk_mb", "shard")  # levers that auto-fit may move if the user doesn't set them


def memory_limit(free_bytes, memory_limit_gb):
    """Bytes that training may reserve: free memory less a margin, or memory_limit_gb (GiB) if that is less.

    The margin, 5% and at most 1 GiB, is for what the allocator doesn't count: libraries' workspaces, loaded kernels.
    """
    limit = int(free_bytes - min(0.05 * free_bytes, GIB))
    return min(limit, int(memory_limit_gb * GIB)) if memory_limit_gb else limit
