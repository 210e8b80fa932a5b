"""What the prepare.py files share: fetching text, and writing train.bin, val.bin and meta.pkl."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the project, for codec.py

from nanofit import codec
from nanofit.errors import UsageError, show_errors_as_sentences, usage_errors

show_errors_as_sentences()
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def read_or_fetch(path, folder, url):
    """The text of path; without a path, of folder/input.txt, which is fetched from url where it is missing."""
    if path is None:
        path = os.path.join(folder, "input.txt")
        if not os.path.exists(path):
            from torch.hub import download_url_to_file  # a progress bar, and a file only when it is whole

            print(f"fetching {url}")
            try:
                download_url_to_file(url, path)
            except OSError as e:  # urllib's errors are its children
                raise UsageError(
                    f"{url} can't be fetched ({e}): connect to the network, or give the text with --input FILE"
                ) from e
    with usage_errors(OSError, UnicodeDecodeError, prefix=f"{path} can't be read as UTF-8 text: "):
        return Path(path).read_text(encoding="utf-8")


def halves(text):
    """The first 90% of the characters, for training, and the last 10%, for validation."""
    cut = int(len(text) * 0.9)
    if cut == 0:
        raise UsageError("the text is empty or a single character: there is nothing to split into train and val")
    return {"train": text[:cut], "val": text[cut:]}


def write_tokens(folder, split, ids):
    """Write token ids (below 65,536) to folder/split.bin, whole or not at all, and say how many."""
    path = os.path.join(folder, f"{split}.bin")
    np.asarray(ids, dtype="<u2").tofile(path + ".part")
    os.replace(path + ".part", path)
    print(f"{split} has {len(ids):,} tokens")


def write_characters(folder, text):
    """A character-level data set: each distinct character of text is a symbol, in the order of its code point."""
    symbols = sorted(set(text))
    if len(symbols) > 65536:
        raise UsageError(f"the text has {len(symbols):,} different characters, more than a uint16 token can name")
    print(f"{len(text):,} characters, {len(symbols)} of them different: {''.join(symbols)!r}")
    stoi = {c: i for i, c in enumerate(symbols)}
    for split, part in halves(text).items():
        # An array of code points, looked up in one go: a Python list of ids would take 30 times the text.
        points = np.frombuffer(part.encode("utf-32-le"), dtype="<u4")
        table = np.zeros(ord(symbols[-1]) + 1, dtype="<u2")
        table[[ord(c) for c in symbols]] = range(len(symbols))
        write_tokens(folder, split, table[points])
    path = os.path.join(folder, "meta.pkl")
    with open(path + ".part", "wb") as f:
        pickle.dump({"vocab_size": len(symbols), "itos": dict(enumerate(symbols)), "stoi": stoi}, f)
    os.replace(path + ".part", path)


def write_bpe(folder, text):
    """A data set in GPT-2's BPE."""
    bpe = codec.gpt2_bpe()
    for split, part in halves(text).items():
        write_tokens(folder, split, bpe.encode_ordinary(part))
