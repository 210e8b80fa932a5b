"""Prepare a corpus of 300 MB: what --max_tokens reads of it, what memory it takes, and what kills leave.

    python tests/bigdata.py --megabytes=300 --kills=10

Ends with exit code 1 where more than 5% is read for a million tokens, where the peak memory of 10 MB and of all differ
by more than 10%, or where a kill leaves a data set that is neither the old nor the new one.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
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


def state(folder):
    """A checksum of a data set's files; '' where one that training needs is missing."""
    files = {p.name: p.read_bytes() for p in sorted(folder.glob("*.*")) if p.suffix in (".bin", ".pkl", ".json")}
    if not {"train.bin", "val.bin"} <= set(files):
        return ""
    return hashlib.sha256(b"".join(name.encode() + content for name, content in files.items())).hexdigest()


def kill(folder, kills):
    """Replace a data set by another and kill that at random moments; the number of states that are neither's."""
    commands = [
        ["data/openwebtext/prepare.py", "--source=small.parquet", "--max_tokens=100_000", "--out=killed"],
        ["data/from_text/prepare.py", "text.txt", "--characters", "--out=killed"],
    ]
    Path(folder, "text.txt").write_text("to be or not to be\n" * 300_000)
    whole, seconds = [], []
    for command in commands:
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
        whole.append(state(Path(folder, "data", "killed")))
    wrong = 0
    for number in range(kills):
        which = number % 2
        process = subprocess.Popen([sys.executable, *commands[which]], cwd=folder, stdout=subprocess.DEVNULL)
        moment = random.uniform(0, 1.1 * seconds[which])
        time.sleep(moment)
        process.kill()
        ended = process.wait() == 0
        found = state(Path(folder, "data", "killed"))
        names = {whole[0]: "words", whole[1]: "characters", "": "nothing to train on"}
        print(f"killed after {moment:.2f} s{', at its end' * ended}: {names.get(found, 'WRONG')}")
        wrong += found not in names
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10)
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
        wrong = kill(folder, args.kills)
    share, ratio = some["read"] / size, large["peak"] / small["peak"]
    print(f"read for a million tokens: {some['read'] / 1e6:.1f} of {size / 1e6:.0f} MB, {share:.1%} (at most 5%)")
    print(
        f"peak memory: {small['peak'] / 1e6:.0f} and {large['peak'] / 1e6:.0f} MB, a ratio of {ratio:.3f} (at most 1.1)"
    )
    print(f"wrong after {args.kills} kills: {wrong}")
    if share > 0.05 or not 1 / 1.1 < ratio < 1.1 or wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
