"""The running Python's own standard library, by characters: about 12 MB of real text without a download.

    python data/python_char/prepare.py

Its .py files in the order of their paths, tests left out, bytes that aren't ASCII dropped. Another version of
Python gives a slightly different corpus.
"""

import os
import sys
import sysconfig

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(folder))

import corpus  # noqa: E402

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def standard_library():
    """Paths of the standard library's modules, sorted, relative paths compared."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for parent, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in LEFT_OUT]
        found += [os.path.join(parent, f) for f in files if f.endswith(".py")]
    return sorted(found)


def ascii_text(path):
    """A file's ASCII characters, line ends as in Unix."""
    with open(path, "rb") as f:
        return f.read().decode("ascii", errors="ignore").replace("\r\n", "\n")


def main():
    args = corpus.Parser(__doc__).parse_args()
    files = standard_library()
    if not files:
        raise corpus.UsageError("this Python has no .py files of its standard library on disk: use another Python")
    print(f"{len(files):,} files of the standard library of Python {sys.version.split()[0]}")
    with corpus.DataSet(folder, args.force) as made:
        corpus.write_characters(made, "".join(map(ascii_text, files)))


if __name__ == "__main__":
    corpus.run(main)
