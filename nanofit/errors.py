"""What a user reads when something goes wrong, and the one place that knows how memory ends."""

import re
import sys
from contextlib import contextmanager

# What torch and the libraries below it say, in a plain RuntimeError, where memory ran out.
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, MPS and NCCL
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # the CPU's allocator, on Linux and macOS
    "not enough memory",  # and on Windows
)


class UsageError(ValueError):
    """A mistake in what the user gave. Its message is a sentence, shown without a traceback."""


@contextmanager
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


def is_out_of_memory(error):
    """Whether an exception says that the memory of a device or of the machine ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which isn't imported
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def memory_sentence(error):
    """What an out-of-memory error tells, in a few words: torch's own message goes on with advice that is in force."""
    asked = re.search(r"ried to allocate ([\d.]+ [KMGT]?i?B|\d+ bytes)", str(error))
    return f"memory ran out{f' on asking for {_rounded(asked[1])}' if asked else ''}"


def _rounded(amount):
    number, unit = amount.split()
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else amount


def show_errors_as_sentences(when_memory_ends=lambda: "use less at a time"):
    """From here on an uncaught UsageError ends the program with its sentence and exit code 1.

    So does an error that says that memory ran out, with when_memory_ends(): what to do then.
    """

    def show(kind, error, trace):
        if issubclass(kind, UsageError):
            print(f"error: {error}", file=sys.stderr)
        elif is_out_of_memory(error):
            print(f"error: {memory_sentence(error)}\n{when_memory_ends()}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = show
