"""What the scripts in the root use. Arrows point down: scripts import this package, and hand it their model.

Importing has no effects. Each script calls start() first, which has them all.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import signal
import sys
from pathlib import Path

from nanofit.errors import mend_standard_streams, show_errors_as_sentences

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch reads the second from 2.10 on


def start(ctrl_c_ends_at_once=False):
    """Set up the process, before torch is imported, which reads the environment.

    Closed standard streams are opened, errors end the script with a sentence (see errors.py), torch's allocator gets
    memory that grows in place, and the compiler's cache keeps more. ctrl_c_ends_at_once: for a script that handles
    signals itself later on.
    """
    mend_standard_streams()
    show_errors_as_sentences()
    _prefer_expandable_segments()
    # Keep compiled steps whole for the next start. torch leaves out those with an autograd.Function, as in model.py.
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
    # The cache's key has a custom operator's name, and not what its backward pass computes: so it has model.py as well.
    with contextlib.suppress(OSError):
        source = Path(__file__).parents[1].joinpath("model.py").read_bytes()
        os.environ.setdefault("TORCH_COMPILE_CACHE_KEY_TAG", hashlib.sha256(source).hexdigest())
    # An ignored SIGINT stays ignored, as in a shell's background. In an interactive Python, Ctrl-C keeps its meaning.
    interactive = sys.flags.interactive or hasattr(sys, "ps1")
    if ctrl_c_ends_at_once and not interactive and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _prefer_expandable_segments():
    """Ask torch's allocator for memory that grows in place, which fragments less, unless the user has set it.

    Not under WSL2, whose drivers refuse it at the first allocation.
    """
    if sys.platform != "linux" or "microsoft" in platform.release().lower():
        return
    if set(ALLOCATOR_VARIABLES) & set(os.environ):
        return
    try:
        release = tuple(int(n) for n in importlib.metadata.version("torch").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return  # importing torch will say so
    os.environ[ALLOCATOR_VARIABLES[release >= (2, 10)]] = "expandable_segments:True"


def _end(number, frame):
    """End the process. Python's own handler raises an exception, which gets lost in a __del__ or a callback."""
    try:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)  # says so
    finally:
        os._exit(128 + number)
