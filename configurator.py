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
import difflib
import os
import re
import symtable
import sys
import traceback

from nanofit.errors import UsageError, show_errors_as_sentences

SCRIPTS = ("train.py", "sample.py", "bench.py")  # they share config files, so one may name another's keys


def keys_of(namespace):
    """The configuration keys among a module's globals, with their values."""
    return {k: v for k, v in namespace.items() if not k.startswith("_") and isinstance(v, (bool, int, float, str))}


def _shown(value, form=repr):
    """value as text for a message, cut where it is long."""
    try:
        text = form(value)
    except (ValueError, RecursionError):  # an int of more than 4,300 digits; lists in lists in lists
        return f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def coerce(key, value, default, source, text=None):
    """value in the type of default, where nothing is lost on the way; else a UsageError.

    source: where the value stands, for the message. text: the value as typed, which a str key takes as it is.
    """
    kind = type(default)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind in (int, float) and type(value) is int and not -(2**63) <= value < 2**64:  # torch takes no more
        raise UsageError(f"{source}: {key} takes whole numbers of at most 64 bits, not {_shown(value)}")
    if type(value) is kind:
        return value
    if kind is str and text is not None:
        return text
    if kind is float and type(value) is int:
        return float(value)
    if kind is bool and _shown(value, str).lower() in ("true", "false", "1", "0"):
        return str(value).lower() in ("true", "1")
    expected = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a string in quotes",
    }[kind]
    raise UsageError(f"{source}: {key} must be {expected} (its default is {default!r}), not {_shown(value)}")


def _nearest(word, words):
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else "--help lists the keys"


def _scripts_that_know(key):
    """The scripts beside this file, or in the current folder, that have a default for key."""
    known = []
    for script in SCRIPTS:
        path = os.path.join(os.path.dirname(os.path.abspath(globals().get("__file__") or ".")), script)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                if re.search(rf"^{re.escape(key)} *=[^=]", f.read(), re.MULTILINE):
                    known.append(script)
    return known


def _run_config_file(path, namespace):
    """The names that a config file assigns, as a dict; it sees the script's names, as in nanoGPT."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        readable = os.path.isdir(folder) and os.access(folder, os.R_OK)
        there = [f for f in os.listdir(folder) if f.endswith(".py")] if readable else []
        near = difflib.get_close_matches(os.path.basename(path), there, n=1)
        hint = f"; did you mean '{os.path.join(folder, near[0])}'?" if near else ""
        raise UsageError(f"config file '{path}' does not exist{hint} (a key is set by --key=value)")
    after = dict(namespace)
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
        symbols = symtable.symtable(text, path, "exec").get_symbols()
        exec(compile(text, path, "exec"), after)
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


def configure(namespace, argv=None):
    """Override the keys in namespace (a script's globals()) by config files and --key=value.

    Returns (config, given): all keys with their final values, and the set of those that were named.
    Raises UsageError, a ValueError, for an unknown key, a value of the wrong type or a missing file; from
    here on the script shows a UsageError as one sentence.
    """

    def when_memory_ends():
        if "auto_fit" not in namespace:
            return "use a smaller batch_size" if "batch_size" in namespace else "use a shorter prompt or max_new_tokens"
        if not namespace["auto_fit"]:
            return "--auto_fit=True finds a split that fits"
        return "less was free than auto_fit found: --init_from=resume goes on from the checkpoint and looks again"

    show_errors_as_sentences(when_memory_ends)
    argv = sys.argv[1:] if argv is None else argv
    script = os.path.basename(namespace.get("__file__") or "this script")
    defaults = keys_of(namespace)
    given = set()
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_: None

    for arg in argv:
        if arg in ("-h", "--help"):
            print(f"usage: python {script} [config/file.py ...] [--key=value ...]\n\nkeys and their defaults:")
            for key, value in defaults.items():
                print(f"  --{key}={value!r}")
            raise SystemExit(0)

        if "=" not in arg:
            if arg.startswith("-"):
                raise UsageError(f"'{arg}' has no value: write {arg}=value, for example --batch_size=32")
            # An argument that isn't UTF-8 holds lone surrogates, which can't be printed.
            say(f"Overriding config with {arg.encode(errors='backslashreplace').decode()}:")
            for key, value in _run_config_file(arg, namespace).items():
                if key in defaults:
                    namespace[key] = coerce(key, value, defaults[key], arg)
                    given.add(key)
                    say(f"  {key} = {namespace[key]!r}")
                    continue
                # A helper of the file's own is kept, as in nanoGPT, but may not replace a name of the script.
                namespace.setdefault(key, value)
                if isinstance(value, (bool, int, float, str)) and not _scripts_that_know(key):
                    print(
                        f"warning: {arg}: no script knows the key '{key}': {_nearest(key, defaults)}", file=sys.stderr
                    )
            continue

        key, text = arg.split("=", 1)
        if not key.startswith("--"):
            raise UsageError(f"'{arg}' is neither a config file nor an override: write --{arg.lstrip('-')}")
        key = key[2:]
        if key not in defaults:
            others = _scripts_that_know(key)
            hint = f"it belongs to {' and '.join(others)}" if others else _nearest(key, defaults)
            raise UsageError(f"{script} has no key '{key}': {hint}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, OverflowError, SyntaxError, MemoryError, RecursionError):
            value = text  # not a Python literal: a string without quotes
        namespace[key] = coerce(key, value, defaults[key], "command line", text)
        given.add(key)
        say(f"Overriding: {key} = {namespace[key]!r}")

    return {key: namespace[key] for key in defaults}, given


def at_least(minimum, config, *keys):
    """Raise a UsageError for the first of these keys whose value is below minimum."""
    for key in keys:
        if not config[key] >= minimum:  # a nan is not at least anything
            raise UsageError(f"{key} must be at least {minimum}, not {config[key]}")


def one_of(choices, config, key):
    """Raise a UsageError if config[key] is not among choices."""
    if config[key] not in choices:
        raise UsageError(f"{key} must be one of {', '.join(map(repr, choices))}, not {config[key]!r}")


if __name__ != "configurator":  # run by exec, in another script's globals
    configure(globals())
