"""Files and folders that appear under their name whole, or not at all."""

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from nanofit.errors import UsageError, system_error


def refuse_to_replace(path):
    """Raise a UsageError where there is something that writing to path would replace; an empty folder is nothing."""
    if os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path):
        return
    if os.path.lexists(path):
        what = "is not empty" if os.path.isdir(path) else "is there already"
        raise UsageError(f"{path} {what}: name another one, or remove it first")


def permissions():
    """Those of a new file, by the user's umask; tempfile's are their owner's alone."""
    umask = os.umask(0)  # there is no other way to ask
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def replacing(path, mode="w"):
    """Gives an open file (mode: 'w' for UTF-8, or 'wb') that takes the place of path when it is whole on disk.

    Until then, and where anything is raised, path is as it was. The file's own name until then is nobody's: what lies
    under a fixed one may be a link to somebody's file.
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
    """Gives a path to write a new file or folder to, which gets its own name when it is done.

    Raises UsageError where the name is taken, and where the disk doesn't take it; what was written is gone then.
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
