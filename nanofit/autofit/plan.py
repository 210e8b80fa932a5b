"""Values that auto-fit hands on: to its child process as lines of JSON, to the next start as a file beside the run.

No torch is imported here.
"""

import contextlib
import importlib.util
import json
import os
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace

from nanofit.files import replacing
from nanofit.units import CONTEXT_BYTES, FITTED, GIB, MemoryLevers, gib, memory_limit

OUT_OF_MEMORY = "out of memory"  # the failure of a trial that was too large
FAILS = "fails to compile"  # how the failure begins of one that would fail at another size as well
UNSIMULATED = "this model can't be simulated"  # how the failure begins of one whose steps don't run on fake tensors
KEPT = "auto_fit.json"  # the answer beside the run, readable for people


@dataclass(frozen=True)
class Job:
    """All that a trial must know of the run."""

    source: dict  # where the model's classes are imported from, as models.source_of
    model_args: dict
    device: str
    dtype: str
    grad_clip: float
    optimizer: str = "adamw"
    levers: MemoryLevers = field(default_factory=MemoryLevers)
    micro_batch_size: int = 1  # sequences
    micro_steps: int = 1  # of an iteration, on this device
    ranks: int = 1  # that hold a model together, or one each
    sharers: int = 1  # of these, how many take of this device's memory
    compile: bool = False
    compile_mode: str = "auto"
    memory_limit_gb: float = 0.0  # GiB; 0: what is free
    limit_bytes: int = 0  # found by an earlier trial; 0: find it
    simulate: bool = False  # on fake tensors, which take no memory and tell no time


@dataclass(frozen=True)
class Facts:
    """What a trial found out about its device."""

    name: str
    device_type: str = "cpu"
    sm_count: int = 0
    capability: tuple = (0, 0)
    has_triton: bool = False
    total_bytes: int = 0
    free_bytes: int = 0
    limit_bytes: int = 0  # what training may take
    process_bytes: int = 0  # of it, what a process takes before it has a model
    neighbours: tuple = ()  # (pid, name, MiB) of other processes that hold memory of this GPU

    @classmethod
    def here(cls, device, memory_limit_gb=0.0, sharers=1):
        """Those of a torch.device, which sharers ranks use together. To ask takes some of a GPU's memory."""
        from nanofit import machine

        free = machine.free_memory_bytes(device) // sharers
        return cls(
            name=machine.device_name(device) + (f" of {sharers} ranks" if sharers > 1 else ""),
            device_type=device.type,
            sm_count=machine.sm_count(device),
            capability=machine.capability(device),
            has_triton=importlib.util.find_spec("triton") is not None,
            total_bytes=machine.total_memory_bytes(device),
            free_bytes=free,
            limit_bytes=memory_limit(free, memory_limit_gb),
            process_bytes=machine.peak_reserved_bytes(device) if device.type == "cpu" else 0,
            neighbours=tuple(machine.gpu_processes(device)),
        )

    @classmethod
    def of_card(cls, card, memory_limit_gb=0.0):
        """Those of a cards.Card that nobody else uses."""
        total = int(card.memory_gb * GIB)
        free = total - CONTEXT_BYTES
        limit = memory_limit(free, memory_limit_gb)
        return cls(card.name or "a card", "cuda", card.sm_count, card.capability, True, total, free, limit)

    def __str__(self):
        sms = f"{self.sm_count} SMs, " if self.sm_count else ""
        return f"{self.name}, {sms}{gib(self.total_bytes)}, {gib(self.free_bytes)} free, limit {gib(self.limit_bytes)}"


@dataclass(frozen=True)
class Trial:
    """What trying one micro-batch size showed."""

    micro_batch_size: int
    levers: MemoryLevers = field(default_factory=MemoryLevers)
    compiled: bool = False
    peak_bytes: int = 0  # most that was reserved; 0 where it isn't known
    allocated_bytes: int = 0  # of the peak, what tensors held; 0 where torch doesn't count it
    tokens_per_second: float = 0.0  # 0 where it wasn't measured
    failure: str = ""  # why there are no figures
    retries: int = 0  # of the allocator, which had to give up its cache to find memory
    compile_seconds: float = 0.0
    parts: dict = field(default_factory=dict)  # of a simulated peak: bytes by what they are for
    limit_bytes: int = 0

    @property
    def fits(self):
        """Whether training may run so: within the limit, whole, and without the allocator in distress."""
        return not self.failure and 0 < self.peak_bytes <= self.limit_bytes and not self.retries

    @property
    def out_of_memory(self):
        """Whether it failed for want of memory and nothing else."""
        return self.failure in ("", OUT_OF_MEMORY) and not self.fits

    def __str__(self):
        peak = f"peak {gib(self.peak_bytes)}" if self.peak_bytes else self.failure
        speed = f"   {self.tokens_per_second:,.0f} tok/s" if self.tokens_per_second else ""
        why = f" (the allocator ran short {self.retries} times)" if self.retries else ""
        verdict = "   fits" if self.fits else f"   does not fit{why}" if self.out_of_memory else ""
        return f"{peak}{speed}{verdict}"


@dataclass(frozen=True)
class Plan:
    """How the effective batch is split, and why."""

    batch_size: int  # as configured
    gradient_accumulation_steps: int  # as configured, of all ranks together
    micro_batch_size: int
    levers: MemoryLevers = field(default_factory=MemoryLevers)
    compile: bool = False
    limit_bytes: int = 0
    peak_bytes: int = 0
    tokens_per_second: float = 0.0  # of one rank; 0 where it wasn't measured
    reasons: tuple = ()  # of the size first
    trials: tuple = field(default=(), compare=False)

    def __post_init__(self):
        size, batch_size = self.micro_batch_size, self.batch_size
        if min(size, batch_size, self.gradient_accumulation_steps) < 1:
            raise ValueError("a batch, its parts and their number are at least 1")
        joined = size // batch_size if size % batch_size == 0 else 0
        if batch_size % size and not (joined and self.gradient_accumulation_steps % joined == 0):
            raise ValueError("a micro-batch divides the batch, or joins several")

    @property
    def accumulation(self):
        """Micro-steps of an iteration, of all ranks together."""
        return self.batch_size * self.gradient_accumulation_steps // self.micro_batch_size

    def __str__(self):
        return (
            f"batch_size {self.batch_size} -> {self.micro_batch_size}, gradient_accumulation_steps "
            f"{self.gradient_accumulation_steps} -> {self.accumulation}, effective batch "
            f"{self.batch_size * self.gradient_accumulation_steps}"
        )


def levers_of(config):
    """The MemoryLevers among a run's keys."""
    return MemoryLevers(**{lever.name: config[lever.name] for lever in fields(MemoryLevers)})


def as_configured(config):
    """The Plan of a run that nothing is chosen for."""
    return Plan(
        batch_size=config["batch_size"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        micro_batch_size=config["batch_size"],
        levers=levers_of(config),
        compile=config["compile"],
        limit_bytes=int(config["memory_limit_gb"] * GIB),
    )


def to_json(value):
    """One of the values above as a line of JSON, with its kind."""
    return json.dumps({"kind": type(value).__name__, **asdict(value)})


def from_json(line, *kinds):
    """The value, of one of these kinds, that to_json made this line of; None where the line is anything else."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    named = read.pop("kind", None) if isinstance(read, dict) else None
    kind = next((kind for kind in kinds if kind.__name__ == named), None)
    return from_dict(kind, read) if kind else None


def from_dict(kind, told):
    """The value of this kind of which asdict gave what is told; None where it can't be made of that."""
    try:
        return _made(kind, told)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        return None  # a field is missing or another's, a Plan's sizes don't divide, a number has 400 digits


def _made(kind, told):
    if is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        return kind(**{name: _made(kinds[name], value) for name, value in told.items()})
    if kind is tuple:
        return tuple(tuple(inner) if type(inner) is list else inner for inner in told)  # neighbours are tuples in one
    if kind is int:
        float(told)  # the same for people: gib()
    return kind(told)


# ---- the answer beside the run -----------------------------------------------------------------------------


def recall(out_dir, key, asked, free, sizes):
    """(the Plan kept in out_dir for a run of the same key, or None, and why not).

    asked: the Plan as configured; of the kept one, what is ours to choose is taken: the size, one of sizes, compiling,
    and the levers named in free.
    """
    path = os.path.join(out_dir, KEPT)
    kept = _read(path)
    plan = from_dict(Plan, kept.get("plan"))
    if plan and kept.get("key") == json.loads(json.dumps(key)) and plan.micro_batch_size in sizes:
        levers = replace(asked.levers, **{name: getattr(plan.levers, name) for name in FITTED if name in free})
        split = dict(batch_size=asked.batch_size, gradient_accumulation_steps=asked.gradient_accumulation_steps)
        return replace(plan, **split, levers=levers, compile=plan.compile and asked.compile), ""
    return None, f"{path} is no answer for this run: looking again" if "plan" in kept else ""


def remember(out_dir, key, plan):
    """Keep a plan in out_dir, whole or not at all; '' or why that failed."""
    kept = asdict(plan)
    try:
        _write(out_dir, {"key": key, "plan": kept, "trials": kept.pop("trials")})
    except OSError as e:
        return f"{os.path.join(out_dir, KEPT)} can't be written ({e.strerror}): the next start will look again"
    return ""


def note_smaller(out_dir, batch_size, size):
    """Let the next start of this run begin with micro-batches of this size: for one that memory ended at a larger."""
    with contextlib.suppress(OSError):  # a full disk: the message that ends this start says the same
        _write(out_dir, {"smaller": [batch_size, size]})


def noted_smaller(out_dir):
    """[batch_size, size] as note_smaller was given them, or None."""
    return _read(os.path.join(out_dir, KEPT)).get("smaller")


def _read(path):
    """What a file of JSON says by name; nothing where it can't be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if os.path.isfile(path):  # to open a pipe would wait
            with open(path, encoding="utf-8") as f:
                read = json.load(f)
            return read if isinstance(read, dict) else {}
    return {}


def _write(out_dir, said):
    """Add what is said to the file in out_dir."""
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, KEPT)
    with replacing(path) as f:
        json.dump({**_read(path), **said}, f, indent=2)
        f.write("\n")
