"""What train.py imports first: until its loop listens to signals, Ctrl-C ends it at once; and which attempt this is.

Python's own way, an exception, is lost where it comes up in a __del__ or in what a library calls back: training would
go on as if nobody had asked. There is nothing to save yet; a probe ends by itself, as its standard input does.
"""

import os
import signal
import sys

from nanofit.errors import PatientOutput


def _end(number, frame):
    try:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)  # says so
    finally:
        os._exit(128 + number)


# Nothing is changed where Ctrl-C is ignored, as in a shell's background, or where it belongs to an interactive Python.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and not (sys.flags.interactive or hasattr(sys, "ps1")):
    signal.signal(signal.SIGINT, _end)

# Where torchrun has started the ranks again, one of them says so. Other counts than torchrun's are not for us.
again, most = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
if os.environ.get("RANK") == "0" and again.isdecimal() and most.isdecimal() and int(again) > 0:
    print(f"attempt {int(again) + 1} of {int(most) + 1}", file=PatientOutput(sys.stdout))
