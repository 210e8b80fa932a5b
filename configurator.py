"""Apply config files and --key=value overrides to a script's module-level keys.

    python train.py config/train_gpt2.py --batch_size=32

Arguments are read from left to right and the later wins. A config file is Python that assigns keys by
name; it is run, so use only files that you trust. A key is a module-level name of the script whose default
is a bool, int, float or str. Two ways in:

    from configurator import configure
    config, given = configure(globals())

    exec(open('configurator.py').read())  # nanoGPT's way, for scripts that were written for it
"""

import ast
import builtins
import difflib
import glob
import os
import symtable
import sys
import time
import traceback

if __name__ != "configurator":  # run by exec, by a script that may lie in another folder
    sys.path.append(os.getcwd())

try:
    from nanofit.errors import UsageError, show_errors_as_sentences, shown
except ModuleNotFoundError as e:
    if e.name != "nanofit":
        raise
    sys.exit(
        "error: configurator.py uses nanofit/, which lies beside it: start there, or add that folder to PYTHONPATH"
    )

PATHS = ("out_dir", "init_from", "dataset", "to", "weights_only_to", "hellaswag")  # a leading ~ is the home folder
SCRIPTS = ("train.py", "sample.py", "bench.py", "export.py", "report.py", "doctor.py", "model.py", "configurator.py")
NEAR = 0.8  # how similar a misspelt key is; less similar ones may be another script's keys


def keys_of(namespace):
    """The configuration keys among a module's globals, with their values."""
    return {k: v for k, v in namespace.items() if not k.startswith("_") and isinstance(v, (bool, int, float, str))}


def coerce(key, value, kind, default, source, text=None):
    """value as a kind (bool, int, float, str; list for a model's field) if nothing is lost by that; else a UsageError.

    default and source (where the value comes from) are for the message. text: the value as typed, which a str key
    takes as it is. Numbers of numpy and torch become Python's, which a checkpoint can hold.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    # nanoGPT only compares these two with iterations. W&B invents a name for None.
    if (key in ("warmup_iters", "lr_decay_iters") and type(value) is float) or (
        key == "wandb_run_name" and value is None
    ):
        return value
    if kind in (int, float) and type(value) is int and not -(2**63) <= value < 2**64:  # torch takes no more
        raise UsageError(f"{source}: {key} takes whole numbers of at most 64 bits, not {shown(value)}")
    if kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        value = text if text is not None and type(value) is not str else value
    if type(value) is kind:
        return os.path.expanduser(value) if key in PATHS else value
    if kind is float and type(value) is int:
        return float(value)
    if kind is bool and shown(value, str).lower() in ("true", "false", "1", "0"):
        return str(value).lower() in ("true", "1")
    if kind is list and type(value) is tuple:
        return list(value)
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a string in quotes", list: "a list"}
    raise UsageError(f"{source}: {key} must be {words[kind]} (its default is {default!r}), not {shown(value)}")


def _nearest(word, words, cutoff=0.6):
    """'did you mean ...?', or '' if no word is similar enough."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=cutoff)
    return f"did you mean '{near[0]}'?" if near else ""


def _run_config_file(path, namespace):
    """{name: value} that a config file assigns. It sees the script's names, as in nanoGPT, and time, as there."""
    if os.path.isdir(path):
        raise UsageError(f"'{path}' is a folder, not a config file: to name a run's folder, write --out_dir={path}")
    if not os.path.exists(path):
        near = _nearest(path, [file for file in glob.glob("config/*.py") + glob.glob("*.py") if file not in SCRIPTS])
        raise UsageError(f"config file '{path}' does not exist{near and '; '}{near} (a key is set by --key=value)")
    after = {"time": time, **namespace}
    try:
        with open(path, "rb") as f:
            text = f.read()  # bytes: Python finds the encoding of a source by itself
        symbols = symtable.symtable(text, path, "exec").get_symbols()
        exec(builtins.compile(text, path, "exec"), after)  # in a script that uses exec, compile is a key
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else None
        where = f"{path}, line {line}" if line else path
        said = shown(e, str)
        raise UsageError(f"{where}: {type(e).__name__}: {said}: a config file is Python that assigns keys") from e
    names = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    unset = object()
    names |= {name for name, value in after.items() if namespace.get(name, unset) is not value}  # assigned by exec
    return {name: value for name, value in after.items() if name in names and not name.startswith("_")}


def _print_help(namespace, defaults):
    """List the keys with their current values, in the groups and with the comments of the script's source."""
    script = namespace.get("__file__") or ""
    print(f"usage: python {os.path.basename(script) or 'this script'} [config/file.py ...] [--key=value ...]")
    lines = []
    if os.path.isfile(script):
        with open(script, encoding="utf-8") as f:
            lines = f.read().splitlines()
    lines += ["# model.py's own" if lines else "# keys", *(f"{key} = " for key in defaults)]
    title, left = "", dict(defaults)
    for line in lines:
        key, assigned, rest = line.partition(" = ")
        if line.startswith("#"):
            title = line.strip("#- ")
        elif assigned and key in left:
            default, value = left.pop(key), namespace[key]
            if title:
                print(f"\n{title}:")
            title = ""
            changed = "" if value == default else f" (default {default!r})"
            print(f"  --{key}={value!r:<{max(1, 34 - len(key))}} {rest.partition('  # ')[2]}{changed}".rstrip())


class _Keys:
    """The keys of a script and how they are overridden."""

    def __init__(self, namespace, more):
        self.namespace = namespace
        self.script = os.path.basename(namespace.get("__file__") or "this script")
        self.defaults = keys_of(namespace)
        self.kinds = {key: type(default) for key, default in self.defaults.items()}
        self.given = set()
        for key, (kind, default) in more.items():
            self.kinds.setdefault(key, kind)
            self.defaults[key] = namespace.setdefault(key, default)

    def override(self, key, value, source, text=None):
        default = self.defaults[key]
        if value is not None or default is not None:
            value = coerce(key, value, self.kinds[key], default, source, text)
        self.namespace[key] = value
        self.given.add(key)

    def read_file(self, path):
        # An argument that isn't UTF-8 can't be printed as it is.
        _say(f"Overriding config with {path.encode(errors='backslashreplace').decode()}:")
        for key, value in _run_config_file(path, self.namespace).items():
            if key in self.defaults:
                self.override(key, value, path)
                _say(f"  {key} = {self.namespace[key]!r}")
                continue
            # The file's helpers become globals, as in nanoGPT, but don't replace a name that the script uses.
            if not hasattr(builtins, key):
                self.namespace.setdefault(key, value)
            if near := isinstance(value, (bool, int, float, str)) and _nearest(key, self.defaults, NEAR):
                print(f"warning: {path}: {self.script} has no key '{key}': {near}", file=sys.stderr)

    def read_argument(self, key, text):
        if key not in self.defaults:
            hint = _nearest(key, self.defaults) or "--help lists the keys"
            raise UsageError(f"{self.script} has no key '{key}': {hint}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, OverflowError, SyntaxError, MemoryError, RecursionError):
            value = text  # not a Python literal: a string without quotes
        self.override(key, value, "command line", text)
        _say(f"Overriding: {key} = {self.namespace[key]!r}")


def _say(line):
    if os.environ.get("RANK", "0") == "0":
        print(line)


def configure(namespace, argv=None, more=None):
    """Override the keys in namespace (a script's globals()) by config files and --key=value.

    more: {key: (type, default)} of further keys, which are put into namespace; a default may be None.
    Returns (config, given): all keys with their final values, and the set of those that were given.
    Raises UsageError, a ValueError, for an unknown key, a value of the wrong type or a missing file.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = _Keys(namespace, more or {})
    for arg in argv:
        name, sign, text = arg.partition("=")
        if arg in ("-h", "--help"):
            continue
        if sign and name.startswith("--"):
            keys.read_argument(name[2:], text)
        elif sign or arg.startswith("-"):
            key = name.lstrip("-").replace("-", "_")
            meant = f"--{key}={text or (True if keys.kinds.get(key) is bool else 'value')}"
            raise UsageError(f"'{arg}' is neither a config file nor --key=value: write {meant}")
        else:
            keys.read_file(arg)
    if {"-h", "--help"} & set(argv):
        _print_help(namespace, keys.defaults)
        raise SystemExit(0)
    return {key: namespace[key] for key in keys.defaults}, keys.given


if __name__ != "configurator":  # run by exec, in another script's globals
    show_errors_as_sentences()
    configure(globals())
