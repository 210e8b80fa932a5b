"""What train.py imports first: until its loop listens to signals, Ctrl-C ends it at once.

Python's own way, an exception, is lost where it comes up in a __del__ or in what a library calls back: training would
go on as if nobody had asked. There is nothing to save yet; a probe ends by itself, as its standard input does.
"""

import os
import signal
import sys


def _end(number, frame):
    try:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)  # says so
    finally:
        os._exit(128 + number)


# Nothing is changed where Ctrl-C is ignored, as in a shell's background, or where it belongs to an interactive Python.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and not (sys.flags.interactive or hasattr(sys, "ps1")):
    signal.signal(signal.SIGINT, _end)
