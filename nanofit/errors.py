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

# What torch and the libraries below it say, in a plain RuntimeError, where memory ran out.
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, MPS and NCCL
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # the CPU's allocator, on Linux and macOS
    "not enough memory",  # and on Windows
)

_LOST_RANK = ("gloo/transport", "Gloo connectFullMesh", "Connection closed by peer", "Connection reset by peer")


class UsageError(ValueError):
    """A mistake in what the user gave. Its message is a sentence, shown without a traceback.

    of_rank: it is this rank's alone, and told at once. All others happen on every rank, as a rule: one tells.
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
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(value, form=repr):
    """value as text for a message, cut where it is long."""
    try:
        text = form(value)
    except (ValueError, RecursionError):  # an int of more than 4,300 digits; lists in lists in lists
        return f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_out_of_memory(error):
    """Whether an exception says that the memory of a device or of the machine ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which isn't imported
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_lost_rank(error):
    """Whether an exception says that another rank, or the way to it, is gone."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):  # torch's
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_RANK)


def is_old_driver(error):
    """Whether an exception says that the NVIDIA driver is older than torch's CUDA needs."""
    return any(words in str(error) for words in ("driver on your system is too old", "driver version is insufficient"))


def memory_sentence(error):
    """What an out-of-memory error tells, in a few words: torch's own message goes on with advice that is in force."""
    asked = re.search(r"ried to allocate ([\d.]+ [KMGT]?i?B|\d+ bytes)", str(error))
    return f"memory ran out{f' on asking for {_rounded(asked[1])}' if asked else ''}"


def _rounded(amount):
    number, unit = amount.split()
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else amount


def lost_sentence(rank, error):
    """What a rank tells that has lost another; torch's own words come last, without the places in its source."""
    words = re.sub(r"\[?[\w./-]*/[\w.-]+\.(cc|cpp|h):\d+\]?[,:]?\s*", "", first_line(error))
    words = textwrap.shorten(re.split(r"\.\s", words)[0].rstrip("."), 200, placeholder="...")
    return (
        f"error: rank {rank} has lost another, which has ended or can't be reached: look at what that one printed. The "
        f"next start with --init_from=auto, or resume, goes on from the last checkpoint ({words})"
    )


OUR_MISTAKE = "This is a mistake of the program's: please report it, with all that is printed above."
ONE_VOICE_SECONDS = 3  # in which torchrun ends a rank if another has failed as well: then that one has told already
LONGEST = 1000  # characters of a sentence; a name in it may be longer


# ---- the top frame -----------------------------------------------------------------------------------------


def show_errors_as_sentences():
    """From here on, what a user's input, files, disk, terminal or memory can cause ends the program with a sentence.

    The exit code is 1, or 130 after Ctrl-C. An error of any other kind is our own mistake: it keeps its traceback.
    """

    def show(kind, error, trace):
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # of a machine's ranks, one
        rank, follows = os.environ.get("RANK", "?"), False  # follows: another rank has failed before
        if issubclass(kind, KeyboardInterrupt):
            if speaks:
                _tell("interrupted")
            _flush()
            os._exit(128 + signal.SIGINT)
        if issubclass(kind, UsageError):
            sentence = f"error: {error}"
            if not speaks and not error.of_rank:
                time.sleep(ONE_VOICE_SECONDS)
                sentence = f"error: rank {rank}: {error}"
        elif issubclass(kind, ModuleNotFoundError) and error.name in ("torch", "numpy"):
            sentence = (
                f"error: {error.name} is not installed: pip install {error.name}; python doctor.py looks for more"
            )
        elif is_out_of_memory(error):
            sentence = f"error: {memory_sentence(error)}\n{_when_memory_ends(vars(sys.modules['__main__']))}"
        elif is_lost_rank(error):
            follows = True
            sentence = lost_sentence(rank, error)
        elif issubclass(kind, BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what reads us is gone, and isn't told again at the end
            sentence = "error: standard output was closed before all of it was written"
        elif issubclass(kind, OSError) and error.errno:
            where = f" ({error.filename})" if error.filename else ""
            sentence = f"error: {os.strerror(error.errno)}{where}"
        else:
            sys.__excepthook__(kind, error, trace)
            sentence = OUR_MISTAKE
        _tell(sentence)
        if follows:
            time.sleep(ONE_VOICE_SECONDS)
        _tell_torchrun(sentence)  # last: of those that told it, torchrun takes the first for the cause

    sys.excepthook = show


def _when_memory_ends(keys):
    """What the user of a script with these keys may do then."""
    if "auto_fit" in keys:
        if keys["auto_fit"]:
            return "less was free than auto_fit found: --init_from=resume goes on from the checkpoint and looks again"
        return "--auto_fit=True finds a split that fits"
    if "max_new_tokens" in keys:
        return "use a shorter prompt or max_new_tokens"
    return "use a smaller batch_size" if "batch_size" in keys else "use less at a time"


def mend_standard_streams():
    """Open those that were closed: the next file would get their number, and what libraries print with it.

    Characters that the locale lacks are printed as escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # until the process ends
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _tell(sentence):
    sentence = sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]}..."
    # Standard error may be gone as well, or be interrupted while it is written: the exit code still tells.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        print(sentence.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def _tell_torchrun(sentence):
    """Leave a sentence where torchrun, if it started this process, looks for what to say of its end.

    In the form of torch.distributed.elastic's ErrorHandler: of any other, torchrun says that it is new.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):  # what is printed still tells
            with open(f"{path}.part", "w") as file:
                json.dump(told, file)
            os.replace(f"{path}.part", path)


def _flush():
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()


class PatientOutput:
    """A standard output that gives up, and doesn't raise, where it can't be written: a full disk, a closed terminal."""

    def __init__(self, stream):
        self._stream, self._failure = stream, ""

    @property
    def failure(self):
        """Why it gave up, or ''."""
        self.flush()  # what waits to be written may fail as well
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
            with contextlib.suppress(OSError):  # what is buffered would be tried again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)
