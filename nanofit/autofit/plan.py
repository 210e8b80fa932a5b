"""Values that auto-fit passes on: to its child process as lines of JSON, to the next start as a file beside the run.

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
FAILS = "fails to compile"  # how a trial's failure begins if compiling would fail at other sizes as well
UNSIMULATED = "this model can't be simulated"  # how it begins if the model doesn't run on fake tensors
KEPT = "auto_fit.json"  # the answer beside the run


@dataclass(frozen=True)
class Job:
    """What a trial needs to know about the run."""

    source: dict  # where the model's classes are imported from, as models.source_of
    model_args: dict
    device: str
    dtype: str
    grad_clip: float
    optimizer: str = "adamw"
    levers: MemoryLevers = field(default_factory=MemoryLevers)
    micro_batch_size: int = 1  # sequences
    micro_steps: int = 1  # of an iteration, on this device
    ranks: int = 1  # of the run
    sharers: int = 1  # ranks that use this device's memory
    compile: bool = False
    compile_mode: str = "auto"
    memory_limit_gb: float = 0.0  # GiB; 0: what is free
    limit_bytes: int = 0  # found by an earlier trial; 0: find it
    simulate: bool = False  # on fake tensors, which take no memory and tell no time


@dataclass(frozen=True)
class Facts:
    """Facts about a device."""

    name: str
    device_type: str = "cpu"
    sm_count: int = 0
    capability: tuple = (0, 0)
    has_triton: bool = False
    total_bytes: int = 0
    free_bytes: int = 0
    limit_bytes: int = 0  # what training may take
    process_bytes: int = 0  # what a process takes of the limit before it has a model
    neighbours: tuple = ()  # (pid, name, MiB) of other processes that hold memory of this GPU

    @classmethod
    def here(cls, device, memory_limit_gb=0.0, sharers=1):
        """Facts about a torch.device that this many ranks share. Asking takes some of a GPU's memory."""
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
        """Facts about a cards.Card that nobody else uses."""
        total = int(card.memory_gb * GIB)
        free = total - CONTEXT_BYTES
        limit = memory_limit(free, memory_limit_gb)
        return cls(card.name or "a card", "cuda", card.sm_count, card.capability, True, total, free, limit)

    def __str__(self):
        sms = f"{self.sm_count} SMs, " if self.sm_count else ""
        return f"{self.name}, {sms}{gib(self.total_bytes)}, {gib(self.free_bytes)} free, limit {gib(self.limit_bytes)}"


@dataclass(frozen=True)
class Trial:
    """The result of trying one micro-batch size."""

    micro_batch_size: int
    levers: MemoryLevers = field(default_factory=MemoryLevers)
    compiled: bool = False
    peak_bytes: int = 0  # most that was reserved; 0 if unknown
    allocated_bytes: int = 0  # most that tensors held; 0 if torch doesn't count it
    tokens_per_second: float = 0.0  # 0 if not measured
    failure: str = ""  # why there are no figures
    retries: int = 0  # how often the allocator had to free its cache to find memory
    compile_seconds: float = 0.0
    parts: dict = field(default_factory=dict)  # a simulated peak: {what it is for: bytes}
    limit_bytes: int = 0

    @property
    def fits(self):
        """Whether training can run so: it didn't fail, kept to the limit, and the allocator never had to retry."""
        return not self.failure and 0 < self.peak_bytes <= self.limit_bytes and not self.retries

    @property
    def out_of_memory(self):
        """Whether it failed only because memory ran out."""
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
    gradient_accumulation_steps: int  # as configured, all ranks together
    micro_batch_size: int
    levers: MemoryLevers = field(default_factory=MemoryLevers)
    compile: bool = False
    limit_bytes: int = 0
    peak_bytes: int = 0
    tokens_per_second: float = 0.0  # of one rank; 0 if not measured
    reasons: tuple = ()  # the reason for the size first
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
        """Micro-steps of an iteration, all ranks together."""
        return self.batch_size * self.gradient_accumulation_steps // self.micro_batch_size

    def __str__(self):
        size, steps = self.batch_size, self.gradient_accumulation_steps
        effective = size * steps
        if self.micro_batch_size != size:
            size, steps = f"{size} -> {self.micro_batch_size}", f"{steps} -> {self.accumulation}"
        return f"batch_size {size}, gradient_accumulation_steps {steps}, effective batch {effective}"


def levers_of(config):
    """The MemoryLevers among a run's keys."""
    return MemoryLevers(**{lever.name: config[lever.name] for lever in fields(MemoryLevers)})


def as_configured(config):
    """The Plan of a run without auto-fit."""
    return Plan(
        batch_size=config["batch_size"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        micro_batch_size=config["batch_size"],
        levers=levers_of(config),
        compile=config["compile"],
        limit_bytes=int(config["memory_limit_gb"] * GIB),
    )


def to_json(value):
    """One of the values above as a line of JSON, with the name of its class."""
    return json.dumps({"kind": type(value).__name__, **asdict(value)})


def from_json(line, *kinds):
    """The value of one of these classes that to_json wrote; None if the line is anything else."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    named = read.pop("kind", None) if isinstance(read, dict) else None
    kind = next((kind for kind in kinds if kind.__name__ == named), None)
    return from_dict(kind, read) if kind else None


def from_dict(kind, told):
    """The inverse of asdict for this class; None if that isn't possible."""
    try:
        return _made(kind, told)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        return None  # a field is missing or unknown, or a Plan's sizes don't divide


def _made(kind, told):
    if is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        return kind(**{name: _made(kinds[name], value) for name, value in told.items()})
    if kind is tuple:
        return tuple(tuple(inner) if type(inner) is list else inner for inner in told)
    if kind is int and abs(told) >= 2**63:
        raise OverflowError
    return kind(told)


# ---- the answer beside the run -----------------------------------------------------------------------------


def recall(out_dir, key, asked, free, sizes):
    """(the Plan that is kept in out_dir for the same key, or None; why not).

    asked: the Plan as configured. Taken from the kept one are the size (one of sizes), compiling, and the levers in
    free.
    """
    path = os.path.join(out_dir, KEPT)
    kept = _read(path)
    plan = from_dict(Plan, kept.get("plan"))
    if plan and kept.get("key") == json.loads(json.dumps(key)) and plan.micro_batch_size in sizes:
        levers = replace(asked.levers, **{name: getattr(plan.levers, name) for name in FITTED if name in free})
        split = dict(batch_size=asked.batch_size, gradient_accumulation_steps=asked.gradient_accumulation_steps)
        return replace(plan, **split, levers=levers, compile=plan.compile and asked.compile), ""
    return None, f"{path} was found for other keys or another device: looking again" if "plan" in kept else ""


def remember(out_dir, key, plan):
    """Keep a plan in out_dir. Returns '' or why that failed."""
    kept = asdict(plan)
    try:
        _write(out_dir, {"key": key, "plan": kept, "trials": kept.pop("trials")})
    except OSError as e:
        return f"{os.path.join(out_dir, KEPT)} can't be written ({e.strerror}): the next start will look again"
    return ""


def note_smaller(out_dir, batch_size, size):
    """Keep the micro-batch size for the next start of a run that ends because memory ran out at a larger one."""
    with contextlib.suppress(OSError):  # a full disk: the error message tells the size as well
        _write(out_dir, {"smaller": [batch_size, size]})


def noted_smaller(out_dir):
    """[batch_size, size] as note_smaller kept them, or None."""
    return _read(os.path.join(out_dir, KEPT)).get("smaller")


def _read(path):
    """A file of JSON as a dict, which is empty if it can't be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if os.path.isfile(path):  # to open a pipe would wait
            with open(path, encoding="utf-8") as f:
                read = json.load(f)
            return read if isinstance(read, dict) else {}
    return {}


def _write(out_dir, said):
    """Merge a dict into the file in out_dir."""
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, KEPT)
    with replacing(path) as f:
        json.dump({**_read(path), **said}, f, indent=2)
        f.write("\n")
