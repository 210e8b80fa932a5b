"""Files of token ids.

A data set is a folder with train.bin and val.bin: little-endian token ids without a header. nanoGPT's are uint16, but
other widths are read as well.
"""

import difflib
import glob
import json
import os
import zlib

import numpy as np
import torch

from nanofit.codec import load_meta
from nanofit.errors import UsageError, usage_errors

SPLITS = ("train", "val")
ENDS = 2**16  # bytes at each end of a file that are examined
NANOGPTS = np.dtype("<u2")  # how nanoGPT stores ids
WIDER = (np.dtype("<i8"), np.dtype("<u4"))  # how others store them
ENOUGH_IDS = 16  # other than 0, to recognise a type
FEW_SYMBOLS = 256  # up to here, a vocabulary is of characters, and every second one may be the same
LARGEST_VOCABULARY = 2**18  # of tokenizers


def _missing(folder):
    """What to do about a missing data set: the command that makes it, or a similar name."""
    prepare = os.path.join(folder, "prepare.py")
    if os.path.exists(prepare):
        return f"run: python {prepare}"
    if not os.path.isdir("data"):
        return f"there is no folder data in {os.getcwd()}: start beside it"
    there = [os.path.basename(os.path.dirname(path)) for path in sorted(glob.glob("data/*/val.bin"))]
    near = difflib.get_close_matches(os.path.basename(folder), there, n=1)
    return f"did you mean --dataset={near[0]}?" if near else f"there is no {prepare} that could make it"


def _stat(path):
    """os.stat of a .bin file; UsageError if there is none."""
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist: {_missing(os.path.dirname(path))}")
    return os.stat(path)


def _ends(path):
    """(the first bytes of a file, its last bytes, the position of these), at most ENDS of each."""
    place = max(0, _stat(path).st_size - ENDS)
    with usage_errors(OSError, prefix=f"{path} can't be read: "), open(path, "rb") as f:
        head = f.read(ENDS)
        f.seek(place)
        return head, f.read(ENDS), place


def _fingerprint(path):
    """A checksum of a file's two ends."""
    head, tail, _ = _ends(path)
    return zlib.crc32(tail, zlib.crc32(head))


def _ids_at_ends(path, kind):
    """The ids at both ends of a file, read as this type; none if the file's size doesn't fit it."""
    head, tail, place = _ends(path)
    tail, width = tail[-place % kind.itemsize :], kind.itemsize
    if len(head) % width or len(tail) % width:
        return np.empty(0, kind)
    return np.concatenate([np.frombuffer(head, kind), np.frombuffer(tail, kind)])


def _are_of(ids, vocab_size):
    """Whether there are enough ids to judge by, and all are in the vocabulary."""
    return np.count_nonzero(ids) >= ENOUGH_IDS and ids.min() >= 0 and ids.max() < vocab_size


def _named_type(folder):
    """The type of ids that meta.pkl or prepared.json in a data set's folder names, or None."""
    record = os.path.join(folder, "prepared.json")
    named = (load_meta(folder) or {}).get("dtype")
    if named is None and os.path.isfile(record):
        with usage_errors(OSError, ValueError, prefix=f"{record} can't be read: "), open(record, "rb") as f:
            held = json.load(f)
        named = held.get("dtype") if isinstance(held, dict) else None
    if named is None:
        return None
    named = getattr(named, "__name__", str(named))  # numpy.uint32 itself, or its name
    prefix = f"{folder}: dtype in its meta.pkl or prepared.json must be a type of whole numbers, such as 'uint32': "
    with usage_errors(TypeError, prefix=prefix):
        found = np.dtype(named)
    if found.kind not in "iu":
        raise UsageError(f"{prefix}it is {named!r}")
    return found.newbyteorder("<")


def token_type(path, vocab_size):
    """The numpy dtype of the ids in a .bin file: named in meta.pkl or prepared.json beside it, or recognised.

    A file of uint32 can be recognised: read as uint16, every second id would be 0, or small.
    """
    if (named := _named_type(os.path.dirname(path))) is not None:
        return named
    for kind in WIDER:
        ids = _ids_at_ends(path, kind)
        if not _are_of(ids, vocab_size):
            continue
        if kind.itemsize == 8 or vocab_size > FEW_SYMBOLS or not ids.all():
            return kind
        # It may also be uint16 with symbol 0 in every second place, as nanoGPT would read it.
        print(f'warning: every second id in {path} is 0; if they are {kind} ids, say "dtype": "{kind}" in meta.pkl')
    if vocab_size > 2**16 and _are_of(_ids_at_ends(path, WIDER[-1]), LARGEST_VOCABULARY):
        return WIDER[-1]  # some ids are not in the vocabulary; reading them will tell
    return NANOGPTS


class TokenFile:
    """A .bin file, from which sequences of block_size + 1 tokens are read.

    Raises UsageError if it isn't such a file, has changed since, or holds an id that is not in the vocabulary.
    """

    def __init__(self, path, block_size, vocab_size):
        self.path, self.block_size, self.vocab_size = path, block_size, vocab_size
        self.kind = token_type(path, vocab_size)
        self.tokens, self._changed = self._look()
        self.checksum = _fingerprint(path)

    def _look(self):
        """(how many tokens the file has, when it was last changed)."""
        found = _stat(self.path)
        tokens, rest = divmod(found.st_size, self.kind.itemsize)
        if rest or not tokens:
            raise UsageError(
                f"{self.path} has {found.st_size:,} bytes: expected {self.kind} tokens of {self.kind.itemsize} bytes "
                f"each, and not none{self._hint()}; prepare it again"
            )
        if tokens <= self.block_size:
            raise UsageError(
                f"{self.path} has {tokens:,} tokens: too few for block_size={self.block_size}, which needs at least "
                f"{self.block_size + 1:,}; use a smaller block_size or more text"
            )
        return tokens, found.st_mtime_ns

    def _hint(self):
        """A hint if the file looks like another type of ids, else ''."""
        candidates = [(kind, self.vocab_size) for kind in (*WIDER, NANOGPTS)]
        candidates += [(kind, LARGEST_VOCABULARY) for kind in WIDER]
        for kind, vocab_size in candidates:
            if kind != self.kind and _are_of(_ids_at_ends(self.path, kind), vocab_size):
                return f" (read as {self.kind}; it looks like {kind}: see dtype in meta.pkl or prepared.json)"
        return ""

    def _look_again(self):
        """Raise a UsageError if the file has changed."""
        tokens, changed = self._look()
        if tokens != self.tokens or (changed != self._changed and _fingerprint(self.path) != self.checksum):
            raise UsageError(
                f"{self.path} has changed since the run began (it had {self.tokens:,} tokens, and now has {tokens:,}, "
                "or others): put the old file back, or start again for the new one"
            )
        self._changed = changed

    def draw(self, count, generator):
        """Random starts of sequences, int64 (count,)."""
        return torch.randint(self.tokens - self.block_size, (count,), generator=generator)

    def read(self, starts):
        """The sequences that begin at starts, int64 (len(starts), T + 1)."""
        self._look_again()
        rows = np.empty((len(starts), self.block_size + 1), self.kind)
        # Read, not mapped: a mapping keeps its pages in memory, and kills the process if the file shrinks.
        with usage_errors(OSError, prefix=f"{self.path} can't be read: "), open(self.path, "rb", buffering=0) as f:
            for row, start in zip(rows, starts.tolist(), strict=True):
                f.seek(start * self.kind.itemsize)
                if f.readinto(memoryview(row).cast("B")) != row.nbytes:
                    raise UsageError(f"{self.path} ends before token {start + len(row):,}: it was cut short in mid-run")
        rows = rows.astype(np.int64)
        if rows.min() < 0 or rows.max() >= self.vocab_size:
            row, column = np.argwhere((rows < 0) | (rows >= self.vocab_size))[0]
            raise UsageError(
                f"{self.path} holds token {rows[row, column]} at position {starts[row] + column:,}, but the vocabulary "
                f"has {self.vocab_size} (0 to {self.vocab_size - 1}){self._hint()}: prepare the data for this model, "
                "or check meta.pkl"
            )
        return rows


def open_data(folder, block_size, vocab_size):
    """{split: TokenFile} of the data set in folder."""
    return {split: TokenFile(os.path.join(folder, f"{split}.bin"), block_size, vocab_size) for split in SPLITS}
