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
import contextlib
import difflib
import os
import re
import symtable
import sys
import traceback

if __name__ != "configurator":  # run by exec, from a script that may lie elsewhere; this file was opened from here
    sys.path.append(os.getcwd())

try:
    from nanofit.errors import UsageError, show_errors_as_sentences, shown
except ModuleNotFoundError as e:
    if e.name != "nanofit":
        raise
    sys.exit(
        "error: configurator.py uses nanofit/, which lies beside it: start there, or add that folder to PYTHONPATH"
    )

SCRIPTS = ("train.py", "sample.py", "bench.py")  # they share config files, so one may name another's keys
NO_CONFIGS = (*SCRIPTS, "configurator.py", "doctor.py", "export.py", "model.py", "report.py")


def keys_of(namespace):
    """The configuration keys among a module's globals, with their values."""
    return {k: v for k, v in namespace.items() if not k.startswith("_") and isinstance(v, (bool, int, float, str))}


def coerce(key, value, kind, default, source, text=None):
    """value as a kind (bool, int, float or str), where nothing is lost on the way; else a UsageError.

    default, and source, where the value stands, are for the message. text: the value as typed, which a str key takes
    as it is.
    """
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind in (int, float) and type(value) is int and not -(2**63) <= value < 2**64:  # torch takes no more
        raise UsageError(f"{source}: {key} takes whole numbers of at most 64 bits, not {shown(value)}")
    if kind is str and "\0" in (value if type(value) is str else text or ""):
        raise UsageError(f"{source}: {key} holds a zero byte, which no path or name may")
    if type(value) is kind:
        return value
    if kind is str and text is not None:
        return text
    if kind is float and type(value) is int:
        return float(value)
    if kind is bool and shown(value, str).lower() in ("true", "false", "1", "0"):
        return str(value).lower() in ("true", "1")
    expected = {bool: "True or False", int: "a whole number", float: "a number", str: "a string in quotes"}[kind]
    raise UsageError(f"{source}: {key} must be {expected} (its default is {default!r}), not {shown(value)}")


def _nearest(word, words):
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else "--help lists the keys"


def _scripts_that_know(key):
    """The scripts beside this file, or in the current folder, that have a default for key; else model.py, if it has."""
    known = []
    for script in (*SCRIPTS, "model.py"):
        path = os.path.join(os.path.dirname(os.path.abspath(globals().get("__file__") or ".")), script)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                # A key stands at the beginning of a line; a field of GPTConfig doesn't, and has a type.
                if re.search(rf"^({re.escape(key)} *|    {re.escape(key)} *:.*[^=])=[^=]", f.read(), re.MULTILINE):
                    known.append(script)
    return known if known == ["model.py"] else [script for script in known if script in SCRIPTS]


def _nearest_config(path):
    """The config file whose name is most like that of path, in its folder or in config/; None where none is."""
    found = {}
    for folder in (os.path.dirname(path), "config"):
        with contextlib.suppress(OSError, ValueError):
            for name in sorted(os.listdir(folder or ".")):
                stem, extension = os.path.splitext(name)
                if extension == ".py" and name not in NO_CONFIGS:
                    found.setdefault(stem, os.path.join(folder, name))
    near = difflib.get_close_matches(os.path.basename(path).removesuffix(".py"), found, n=1)
    return found[near[0]] if near else None


def _run_config_file(path, namespace):
    """The names that a config file assigns, as a dict; it sees the script's names, as in nanoGPT."""
    if not os.path.isfile(path):
        near = _nearest_config(path)
        hint = f"; did you mean '{near}'?" if near else ""
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"config file '{path}' {what}{hint} (a key is set by --key=value)")
    after = dict(namespace)
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors begin UTF-8 with a mark
            text = f.read()
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path} is no UTF-8 text (byte {e.start} is {e.object[e.start]:#04x}): a config file is Python "
            "text: save it as UTF-8"
        ) from e
    except OSError as e:
        raise UsageError(f"{path} can't be read: {e.strerror}") from e
    try:
        symbols = symtable.symtable(text, path, "exec").get_symbols()
        exec(builtins.compile(text, path, "exec"), after)  # run by exec, compile is the script's key
    except SystemExit as e:
        raise UsageError(f"{path} ends the program (sys.exit): a config file is Python that assigns keys") from e
    except SyntaxError as e:
        where = f"{path}, line {e.lineno}" if e.lineno else path
        raise UsageError(f"{where}: {e.msg}: a config file is Python that assigns keys") from e
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UsageError(f"{where}: {type(e).__name__}: {e}") from e
    names = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    unset = object()
    changed = {name for name, value in after.items() if namespace.get(name, unset) is not value}  # by an exec inside
    return {name: value for name, value in after.items() if name in names | changed and not name.startswith("_")}


def _notes(script, keys):
    """({key: the comment beside it}, {key: the comment above its group}) as they stand in a script's source."""
    beside, groups, group = {}, {}, "keys"
    if script and os.path.isfile(script):
        with open(script, encoding="utf-8") as f:
            for line in f:
                if title := re.match(r"# (?:-+ )?(.*?)(?: -+)?$", line):
                    group = title[1]
                elif (found := re.match(r"(\w+) = .*?(?:  # (.*))?$", line)) and found[1] in keys:
                    beside.setdefault(found[1], found[2] or "")
                    groups.setdefault(found[1], group)
    return beside, groups


def _print_help(namespace, defaults):
    """List the keys in their groups, with their values so far and what the script's source says of them."""
    script = namespace.get("__file__")
    print(f"usage: python {os.path.basename(script or 'this script')} [config/file.py ...] [--key=value ...]")
    beside, groups = _notes(script, defaults)
    group = None
    for key, default in defaults.items():
        if groups.get(key, "model.py's own") != group:
            group = groups.get(key, "model.py's own")
            print(f"\n{group}:")
        changed = "" if namespace[key] == default else f" (default {default!r})"
        about = f"{beside.get(key, '')}{changed}".strip()
        print(f"  --{key}={namespace[key]!r:<{max(1, 34 - len(key))}} {about}".rstrip())


class _Keys:
    """The keys of a script, while they are overridden."""

    def __init__(self, namespace, more):
        self.namespace = namespace
        self.script = os.path.basename(namespace.get("__file__") or "this script")
        self.defaults = keys_of(namespace)
        self.kinds = {key: type(default) for key, default in self.defaults.items()}
        self.given = set()
        for key, (kind, default) in more.items():
            if key in namespace and key not in self.defaults:
                raise UsageError(
                    f"model.py: the field {key} of GPTConfig has a name that {self.script} uses: rename it"
                )
            self.kinds.setdefault(key, kind)
            self.defaults[key] = namespace.setdefault(key, default)

    def override(self, key, value, source, text=None):
        default = self.defaults[key]
        if value is not None or default is not None:
            value = coerce(key, value, self.kinds[key], default, source, text)
        self.namespace[key] = value
        self.given.add(key)

    def read_file(self, path):
        # An argument that isn't UTF-8 holds lone surrogates, which can't be printed.
        _say(f"Overriding config with {path.encode(errors='backslashreplace').decode()}:")
        for key, value in _run_config_file(path, self.namespace).items():
            if key in self.defaults:
                self.override(key, value, path)
                _say(f"  {key} = {self.namespace[key]!r}")
                continue
            # A helper of the file's own is kept, as in nanoGPT, but may not replace a name that the script uses.
            if not hasattr(builtins, key):
                self.namespace.setdefault(key, value)
            if isinstance(value, (bool, int, float, str)) and not _scripts_that_know(key):
                print(
                    f"warning: {path}: no script knows the key '{key}': {_nearest(key, self.defaults)}", file=sys.stderr
                )

    def read_argument(self, key, text):
        if key not in self.defaults:
            others = _scripts_that_know(key)
            hint = f"it belongs to {' and '.join(others)}" if others else _nearest(key, self.defaults)
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
    Returns (config, given): all keys with their final values, and the set of those that were named.
    Raises UsageError, a ValueError, for an unknown key, a value of the wrong type or a missing file.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = _Keys(namespace, more or {})
    for arg, following in zip(argv, [*argv[1:], ""], strict=False):  # the last has none
        if arg in ("-h", "--help"):
            continue
        name, sign, text = arg.partition("=")
        if sign and name.startswith("--"):
            keys.read_argument(name[2:], text)
        elif sign:
            raise UsageError(f"'{arg}' is neither a config file nor an override: write --{arg.lstrip('-')}")
        elif arg.startswith("-"):
            key = arg.lstrip("-")
            meant = following if following and not following.startswith("-") else "value"
            if keys.kinds.get(key) is bool and meant.lower() not in ("true", "false", "1", "0"):
                meant = "True"
            raise UsageError(f"'{arg}' has no value: write --{key}={meant}, with the sign between them")
        else:
            keys.read_file(arg)
    if {"-h", "--help"} & set(argv):
        _print_help(namespace, keys.defaults)
        raise SystemExit(0)
    return {key: namespace[key] for key in keys.defaults}, keys.given


if __name__ != "configurator":  # run by exec, in another script's globals
    show_errors_as_sentences()
    configure(globals())
