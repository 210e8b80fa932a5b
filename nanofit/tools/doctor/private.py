"""Takes out of a text what a person wouldn't paste into a public issue: who they are, their machine, their folders."""

import getpass
import os
import re
import socket


def private(value, root):
    """value, whose texts name no user, no host and no path but those below root, which become relative.

    value: a text, or a dict, list or tuple that holds some; anything else is given back as it is.
    """
    if isinstance(value, dict):
        return {name: private(inner, root) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(private(inner, root) for inner in value)
    return _private_text(value, root) if isinstance(value, str) else value


def _private_text(text, root):
    for folder in {os.path.realpath(root), root, os.getcwd()} - {"/"}:
        text = text.replace(folder + os.sep, "")
    if len(home := os.path.expanduser("~")) > 1:
        text = text.replace(home, "~")
    # Of other absolute paths only the last name is kept. Neither 1 / 2 nor a URL is a path.
    text = re.sub(r"(?:(?<![\w.…/])/(?!/)|~/|\b[A-Za-z]:\\)(?:[^\s'\":,;()]*[/\\])+", "…/", text)
    text = re.sub(r"(process \d+) on [^,\s]+", r"\1", text)  # as run.lock names a holder, maybe on another host
    for name in {_user(), socket.gethostname(), socket.gethostname().split(".")[0]} - {""}:
        text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", "…", text)
    return text


def _user():
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
