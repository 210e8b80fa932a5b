"""A run in one page, which opens without a network: curves, where memory goes, what was decided and why.

python report.py out                                writes out/report.html
python report.py out-a out-b --png=curves.png       compares; writes out-a/report.html and a picture
python report.py out --watch                        serves it on this machine while the run goes on
"""

import argparse
import contextlib
import os
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH leaves out
import nanofit

nanofit.start()
from nanofit.errors import usage_errors
from nanofit.files import replacing
from nanofit.tools.report.log import Log
from nanofit.tools.report.memory import Question
from nanofit.tools.report.run import Run, labels_of

NAME = "report.html"
MODEL_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.py")


def main():
    parser = argparse.ArgumentParser(description="A run in one page.", formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="out_dir", help="a run's folder; several are compared")
    parser.add_argument(
        "--watch", nargs="?", type=int, const=0, metavar="PORT", help="serve the report on localhost, always up to date"
    )
    parser.add_argument("--png", metavar="FILE", help="write the curves as a picture, too")
    asked = parser.parse_args()
    load = loader(asked.folders)
    if asked.png:
        from nanofit.tools.report.picture import draw

        draw(load(), asked.png)
        print(asked.png)
    if asked.watch is not None:
        from nanofit.tools.report.server import server_of

        with server_of(load, asked.watch) as server, contextlib.suppress(KeyboardInterrupt):
            print("http://{}:{} shows the run while it goes on; Ctrl-C ends this".format(*server.server_address))
            server.serve_forever()
        return
    from nanofit.tools.report.page import page_of

    page, path = page_of(load()), os.path.join(asked.folders[0], NAME)
    with usage_errors(OSError, prefix=f"{path} can't be written: "), replacing(path) as file:
        file.write(page)
    print(path)


def loader(folders):
    """A function that gives the folders' Runs, each time as far as they are written by then."""
    runs = [Run(folder, label, Log(folder)) for folder, label in zip(folders, labels_of(folders), strict=True)]
    known = None

    def load():
        nonlocal known
        question = Question(MODEL_FILE, folders) if known is None else None  # it thinks while the figures are read
        for run in runs:
            run.log.update()
        written = [run.written for run in runs]
        if written != known:
            known = written
            for run, answer in zip(runs, (question or Question(MODEL_FILE, folders)).answer(), strict=True):
                run.memory, run.checkpoints = answer.get("memory", []), answer.get("checkpoints", {})
                run.failure = answer.get("failure", "")
        return runs

    return load


if __name__ == "__main__":
    main()
