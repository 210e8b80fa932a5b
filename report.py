"""A run in one page, which opens without a network: its curves, its last sample, what was decided and why.

python report.py out               writes out/report.html
python report.py out-a out-b       compares runs: writes out-a/compared.html
"""

import argparse
import os
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
import nanofit

nanofit.start()
from nanofit.errors import usage_errors
from nanofit.files import replacing


def main():
    parser = argparse.ArgumentParser(description="A run in one page, which opens without a network.")
    parser.add_argument("folders", nargs="+", metavar="out_dir", help="a run's folder; several are compared")
    folders = parser.parse_args().folders
    with usage_errors(ImportError, prefix="the report's charts are drawn by Bokeh: pip install bokeh. "):
        from nanofit.tools.report.page import page_of
        from nanofit.tools.report.run import Run, labels_of

    runs = [Run(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]
    path = os.path.join(folders[0], "report.html" if len(runs) == 1 else "compared.html")
    page = page_of(runs).encode(errors="replace")  # names of folders may be no UTF-8
    with usage_errors(OSError, prefix=f"{path} can't be written: "), replacing(path, "wb") as file:
        file.write(page)
    print(path)


if __name__ == "__main__":
    main()
