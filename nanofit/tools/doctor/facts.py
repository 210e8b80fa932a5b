"""What a helper would ask, as values: gather.py finds them out, checks.py judges them. Nothing of ours is imported.

What isn't known is None or '', and no fact may name a person or their machine: see gather.private.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """A CUDA GPU as torch and nvidia-smi see it."""

    name: str
    sm_count: int
    capability: tuple  # (major, minor)
    total_bytes: int
    free_bytes: int | None = None
    holders: tuple | None = ()  # (pid, name, MiB) of the processes that hold memory of it


@dataclass(frozen=True)
class DataSet:
    """A data set that is prepared."""

    name: str
    tokens: dict  # by split
    vocab_size: int | None = None  # of its meta.pkl
    failure: str = ""  # what is wrong with that


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file in out_dir; iteration: None where it is damaged."""

    name: str
    bytes: int
    iteration: int | None


@dataclass(frozen=True)
class Fit:
    """What a plan by simulation says of the batch. micro_batch_size: 0 where nothing fits, as failure tells."""

    limit_bytes: int = 0
    micro_batch_size: int = 0
    peak_bytes: int = 0
    recompute: bool = False
    split: str = ""  # as auto-fit says it
    failure: str = ""


@dataclass(frozen=True)
class Facts:
    # the machine
    system: str = ""
    is_wsl: bool = False
    on_windows_disk: bool = False  # WSL2 reaches it through a network protocol
    python: str = ""
    cores: int = 0
    memory_bytes: int | None = None
    memory_free_bytes: int | None = None  # in a container, what that leaves
    container_bytes: int | None = None  # the container's limit
    compilers: tuple = ()  # names of those that are found
    driver_cuda: tuple | None = None  # (major, minor), the newest CUDA that NVIDIA's driver runs
    gpus_hidden: bool = False  # by CUDA_VISIBLE_DEVICES
    environment: dict = field(default_factory=dict)  # torch's variables
    packages: dict = field(default_factory=dict)  # {name: version, '' where it isn't installed}
    # torch
    torch: str = ""
    torch_failure: str = ""  # why it can't be imported
    torch_cuda: str = ""  # the CUDA that it is built for
    architectures: tuple = ()  # that it has kernels for: 'sm_86', 'compute_90'
    driver: str = ""  # version of NVIDIA's driver
    cuda_said: str = ""  # what torch warned of when it looked for GPUs
    gpus: tuple = ()
    # the run that is asked for
    config: dict = field(default_factory=dict)
    given: tuple = ()  # the keys that were named
    refusal: str = ""  # why train.py would refuse the keys
    device_failure: str = ""  # why the device can't be used
    data_sets: tuple = ()
    data_failure: str = ""
    vocab_size: int | None = None  # of the model that would train
    data_vocab_size: int | None = None  # of the data set's meta.pkl
    largest_token: int | None = None  # that was seen at the ends of the data
    holder: str = ""  # what other process holds out_dir, in words
    checkpoints: tuple = ()
    resume_failure: str = ""
    disk_free_bytes: int | None = None  # where out_dir is
    checkpoint_bytes: int | None = None  # that a checkpoint of this model takes
    fit: Fit | None = None

    @property
    def gpu(self):
        """The GPU that the run would use, None where it is another device."""
        kind, _, index = self.config.get("device", "cpu").partition(":")
        at = int(index or 0)
        return self.gpus[at] if kind == "cuda" and at < len(self.gpus) else None

    @property
    def asks_cuda(self):
        """Whether the user named a CUDA device."""
        return "device" in self.given and self.config["device"].startswith("cuda")
