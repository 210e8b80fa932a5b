"""Removes from a text the names of the user, the host and their folders, so that it can be made public."""

import getpass
import os
import re
import socket


def private(value, root):
    """value without names of users and hosts, and without paths, except those below root, which become relative.

    value: a text, or a dict, list or tuple of texts; anything else is returned as it is.
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
    # Of other absolute paths only the last part is kept. 1 / 2 and URLs are no paths.
    text = re.sub(r"(?:(?<![\w.…/])/(?!/)|~/|\b[A-Za-z]:\\)(?:[^\s'\":,;()]*[/\\])+", "…/", text)
    text = re.sub(r"(process \d+) on [^,\s]+", r"\1", text)  # from run.lock, maybe of another host
    for name in {_user(), socket.gethostname(), socket.gethostname().split(".")[0]} - {""}:
        text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", "…", text)
    return text


def _user():
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
