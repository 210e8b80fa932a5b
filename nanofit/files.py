"""Files and folders that appear under their name whole, or not at all."""

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from nanofit.errors import UsageError, system_error


def refuse_to_replace(path):
    """Raise a UsageError if writing to path would replace something. An empty folder may be replaced."""
    if os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path):
        return
    if os.path.lexists(path):
        what = "is not empty" if os.path.isdir(path) else "is there already"
        raise UsageError(f"{path} {what}: name another one, or remove it first")


def permissions():
    """The permissions of a new file by the user's umask. (tempfile makes files that only their owner can read.)"""
    umask = os.umask(0)  # there is no other way to ask
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def replacing(path, mode="w"):
    """Gives an open file (mode: 'w' for UTF-8, or 'wb') that takes the place of path when it is whole on disk.

    Until then, and if anything is raised, path is unchanged. The temporary file has a random name.
    """
    folder, name = os.path.split(path)
    handle, part = tempfile.mkstemp(prefix=f"{name}.", suffix=".part", dir=folder or ".")
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            os.chmod(part, permissions())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(part)
        raise


@contextmanager
def whole_or_not_at_all(path):
    """Gives a temporary path for a new file or folder, which is renamed to path when it is whole.

    Raises UsageError if path is taken or can't be written; then nothing is left behind.
    """
    refuse_to_replace(path)
    parent, name = os.path.split(os.path.abspath(path))
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".part", dir=parent) as room:
            part = os.path.join(room, name)
            yield part
            for file in [Path(part), *Path(part).rglob("*")]:
                if file.is_file():
                    os.chmod(file, permissions())  # safetensors makes files that nobody else can read
                    with open(file, "rb+") as f:
                        os.fsync(f.fileno())
            refuse_to_replace(path)
            if os.path.isdir(path):
                os.rmdir(path)
            os.rename(part, path)
    except (OSError, RuntimeError) as e:
        own = system_error(e)
        if own is None:
            raise
        raise UsageError(f"{path} can't be written ({own.strerror or own})") from e
