"""What a user reads when something goes wrong: the top frame of every script, and how memory ends."""

import contextlib
import errno
import json
import os
import re
import signal
import sys
import textwrap
import time

from nanofit.units import gib

# What torch and the libraries below it say, in a plain RuntimeError, where memory ran out.
_OUT_OF_MEMORY = re.compile(
    "out of memory"  # CUDA, MPS and NCCL
    "|CUBLAS_STATUS_ALLOC_FAILED"
    "|CUDNN_STATUS_ALLOC_FAILED"
    "|can't allocate memory"  # the CPU's allocator, on Linux and macOS
    "|not enough memory"  # and on Windows
    "|Cannot allocate memory"  # Linux
    "|could not create a (primitive(?! descriptor)|memory object)"  # oneDNN
)

_LOST_RANK = re.compile("gloo/transport|Gloo connectFullMesh|Connection (closed|reset) by peer")


class UsageError(ValueError):
    """A mistake in what the user gave. Its message is a sentence, shown without a traceback.

    of_rank: it happens on this rank alone, which tells it at once. Other mistakes happen on every rank: one tells.
    """

    def __init__(self, sentence, of_rank=False):
        super().__init__(sentence)
        self.of_rank = of_rank


@contextlib.contextmanager
def usage_errors(*kinds, prefix=""):
    """Turn exceptions of these kinds, raised by a library about what the user asked for, into UsageErrors."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(f"{prefix}{error}") from error


def first_line(error):
    """The first line of an error's message, or its type if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def system_error(error):
    """The OSError behind an error, or None: torch.save hides it behind another error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def reason(error):
    """The system's words if an OSError is behind an error, else the error's type and first line."""
    inner = system_error(error)
    return (inner is not None and inner.strerror) or f"{type(error).__name__}: {first_line(error)}"


def shown(value, form=repr):
    """value as text for a message, cut if it is long."""
    try:
        text = form(value)
    except (ValueError, RecursionError):  # an int of more than 4,300 digits; lists in lists in lists
        return f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_out_of_memory(error):
    """Whether an exception says that the memory of a device or of the machine ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which isn't imported
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def is_lost_rank(error):
    """Whether an exception says that another rank, or the way to it, is gone."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):  # torch's
        return True
    return isinstance(error, RuntimeError) and bool(_LOST_RANK.search(str(error)))


def memory_sentence(error):
    """An out-of-memory error in a few words. torch's own message gives advice that this project follows already."""
    asked = re.search(r"ried to allocate ([\d.]+ [KMGT]?i?B|(\d+) bytes)", str(error))
    size = asked and (gib(int(asked[2])) if asked[2] else asked[1])
    return f"memory ran out on asking for {size}" if size else "memory ran out"


def lost_sentence(rank, error):
    """What this rank tells when it has lost another one. torch's own words come last."""
    words = textwrap.shorten(first_line(error), 200, placeholder="...")
    return (
        f"error: rank {rank} has lost another, which has ended or can't be reached: look at what that one printed. The "
        f"next start with --init_from=auto, or resume, goes on from the last checkpoint ({words})"
    )


ONE_VOICE_SECONDS = 3  # torchrun ends a rank within this time if another has failed as well, and has told it
LONGEST = 1000  # characters of a sentence; a path in it may be longer


# ---- the top frame -----------------------------------------------------------------------------------------


def show_errors_as_sentences():
    """From here on, an error that input, files, disk, terminal or memory cause ends the program with a sentence.

    The exit code is 1, or 130 after Ctrl-C. Any other error keeps its traceback.
    """

    def show(kind, error, trace):
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank of each machine
        if issubclass(kind, KeyboardInterrupt):
            if speaks:
                _tell("interrupted")
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                sys.stdout.flush()
            os._exit(128 + signal.SIGINT)
        sentence = _sentence_on(error)
        if issubclass(kind, UsageError) and not speaks and not error.of_rank:
            time.sleep(ONE_VOICE_SECONDS)
            sentence = f"error: rank {os.environ.get('RANK', '?')}: {error}"
        if sentence:
            _tell(sentence)
        else:
            sys.__excepthook__(kind, error, trace)
        if is_lost_rank(error):
            time.sleep(ONE_VOICE_SECONDS)  # torchrun names the rank that fails first: the one that is lost
        _tell_torchrun(sentence or f"{kind.__name__}: {first_line(error)}")

    sys.excepthook = show


def _sentence_on(error):
    """The sentence for an error, '' if its traceback tells more."""
    if isinstance(error, UsageError):
        return f"error: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "numpy"):
        return f"error: {error.name} is not installed: pip install {error.name}; python doctor.py looks for more"
    if is_out_of_memory(error):
        return f"error: {memory_sentence(error)}\n{_when_memory_ends(vars(sys.modules['__main__']))}"
    if is_lost_rank(error):
        return lost_sentence(os.environ.get("RANK", "?"), error)
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # else Python reports it again when it ends
        return "error: standard output was closed before all of it was written"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"error: {os.strerror(error.errno)}{f' ({error.filename})' if error.filename else ''}"
    return ""


def _when_memory_ends(keys):
    """What to do when memory has run out in a script with these keys."""
    if keys.get("auto_fit"):
        return "less was free than auto_fit found: --init_from=auto goes on from a checkpoint, and looks again"
    if "auto_fit" in keys:
        return "--auto_fit=True finds a split that fits"
    return "use less at a time: a smaller batch_size, a shorter prompt"


def mend_standard_streams():
    """Open standard streams that are closed, and print characters that the locale lacks as escapes.

    Otherwise the next file that is opened would get a stream's number, and with it what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # it gets the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _tell(sentence):
    sentence = sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]}..."
    # Standard error may be gone as well, or a signal may interrupt it: the exit code still tells.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        print(sentence.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def _tell_torchrun(sentence):
    """If torchrun started this process, leave it a sentence about its end, in the form of torch's ErrorHandler."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):  # what is printed still tells
            with open(f"{path}.part", "w") as file:
                json.dump(told, file)
            os.replace(f"{path}.part", path)


class PatientOutput:
    """A standard output that gives up instead of raising when it can't be written: a full disk, a closed terminal."""

    def __init__(self, stream):
        self._stream, self._failure = stream, ""

    @property
    def failure(self):
        """Why it gave up, or ''."""
        self.flush()  # buffered text may fail as well
        return self._failure

    def write(self, text):
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, act):
        if self._failure:
            return
        try:
            act()
        except (OSError, ValueError) as e:
            self._failure = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else str(e)
            if isinstance(e, OSError) and e.errno == errno.EPIPE:
                self._failure = "its reader has gone"
            with contextlib.suppress(OSError):  # else Python tries again to write the buffer when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)
