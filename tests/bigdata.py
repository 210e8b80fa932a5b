"""Prepare a corpus of 300 MB: what --max_tokens reads of it, and what memory it takes.

    python tests/bigdata.py --megabytes=300

Ends with exit code 1 where more than 5% is read for a million tokens, or where the peak memory of 10 MB and of all
differ by more than 10%.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import tiktoken
from pyarrow.parquet import write_table

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT.parent / "shared" / "tiktoken_cache"  # GPT-2's, where they lie beside the checkout: no network is asked
if TABLES.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TABLES))
# prepare.py in a process that tells what it has read and its peak memory, without what importing takes.
MEASURED = """
import re, runpy, sys
import pyarrow.parquet, tiktoken
tiktoken.get_encoding("gpt2")
def count(path, field): return int(re.search(field + r":\\s*(\\d+)", open(path).read())[1])
before = count("/proc/self/io", "rchar")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("read", count("/proc/self/io", "rchar") - before)
print("peak", 1024 * count("/proc/self/status", "VmHWM"))
"""


def write_corpus(path, megabytes):
    """A parquet file as its library writes it, of GPT-2's own words in documents of some 5,000 characters."""
    drawn, bpe = np.random.default_rng(0), tiktoken.get_encoding("gpt2")
    words = np.array([word for word in map(bpe.decode, ([i] for i in range(300, 20_000))) if word[1:].isalpha()])
    texts, size = [], 0
    while size < megabytes * 1e6:
        places = drawn.random(int(drawn.integers(100, 1800))) ** 3  # a few words are everywhere, as in a language
        texts.append("".join(words[(len(words) * places).astype(int)]))
        size += len(texts[-1])
    write_table(pyarrow.table({"text": texts, "url": [f"https://example.org/{i}" for i in range(len(texts))]}), path)
    print(f"{path}: {len(texts):,} documents, {size / 1e6:.0f} MB of text, {os.path.getsize(path) / 1e6:.0f} MB")


def measured(folder, *argv):
    """Run OpenWebText's prepare.py there: {'read': bytes, 'peak': bytes}."""
    command = [sys.executable, "-c", MEASURED, "data/openwebtext/prepare.py", *argv]
    print("prepare.py", *argv)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(1)
    return {name: int(value) for name, value in re.findall(r"^(read|peak) (\d+)$", done.stdout, re.MULTILINE)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("data", "config", "nanofit"):
            ignore = shutil.ignore_patterns("*.bin", "*.pkl", "*.part", "input.txt", "__pycache__")
            shutil.copytree(ROOT / name, Path(folder, name), ignore=ignore)
        write_corpus(Path(folder, "small.parquet"), 10)
        write_corpus(Path(folder, "large.parquet"), args.megabytes)
        size = os.path.getsize(Path(folder, "large.parquet"))
        some = measured(folder, "--source=large.parquet", "--max_tokens=1_000_000", "--out=some")
        small = measured(folder, "--source=small.parquet", "--out=small")
        large = measured(folder, "--source=large.parquet", "--out=large")
    share, ratio = some["read"] / size, large["peak"] / small["peak"]
    print(f"read for a million tokens: {some['read'] / 1e6:.1f} of {size / 1e6:.0f} MB, {share:.1%} (at most 5%)")
    print(
        f"peak memory: {small['peak'] / 1e6:.0f} and {large['peak'] / 1e6:.0f} MB, a ratio of {ratio:.3f} (at most 1.1)"
    )
    if share > 0.05 or not 1 / 1.1 < ratio < 1.1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
