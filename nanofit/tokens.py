"""Files of token ids.

A data set is a folder with train.bin and val.bin: token ids, little-endian, without a header. nanoGPT's are uint16;
ids of other widths are read as what they are.
"""

import difflib
import json
import os
import zlib

import numpy as np
import torch

from nanofit.codec import load_meta
from nanofit.errors import UsageError, usage_errors

SPLITS = ("train", "val")
ENDS = 2**16  # bytes at each end of a file that are looked at
NANOGPTS = np.dtype("<u2")  # how nanoGPT stores ids
WIDER = (np.dtype("<i8"), np.dtype("<u4"))  # and how other tokenizers' files may
ENOUGH_IDS = 16  # other than 0, to tell a type by
FEW_SYMBOLS = 256  # a vocabulary of characters, mostly: there, a space may well be every second token
LARGEST_VOCABULARY = 2**18  # that tokenizers have


def _missing(folder):
    """The sentence for a data set that isn't there: what to run, or what the name may have meant."""
    prepare = os.path.join(folder, "prepare.py")
    if os.path.exists(prepare):
        return f"run: python {prepare}"
    parent, name = os.path.split(folder)
    while parent and not os.path.isdir(parent):  # --dataset=data/mine asks for data/data/mine
        parent = os.path.dirname(parent)
    there = sorted(os.listdir(parent)) if os.path.isdir(parent) and os.access(parent, os.R_OK) else []
    whole = [n for n in there if all(os.path.isfile(os.path.join(parent, n, f"{split}.bin")) for split in SPLITS)]
    near = difflib.get_close_matches(name, whole, n=1)
    return f"did you mean --dataset={near[0]}?" if near else f"there is no {prepare} that could make it"


def _stat(path):
    """os.stat of a .bin file; a UsageError where there is none."""
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist: {_missing(os.path.dirname(path))}")
    return os.stat(path)


def _ends(path):
    """(the first bytes of a file, the last ones, where these begin), at most ENDS of each."""
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
    """The ids at both ends of a file, read as this type; none where the file's size doesn't fit it."""
    head, tail, place = _ends(path)
    tail, width = tail[-place % kind.itemsize :], kind.itemsize
    if len(head) % width or len(tail) % width:
        return np.empty(0, kind)
    return np.concatenate([np.frombuffer(head, kind), np.frombuffer(tail, kind)])


def _are_of(ids, vocab_size):
    """Whether ids, enough to tell, are all in a vocabulary."""
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
    """The type of ids in a .bin file, a numpy dtype: what meta.pkl or prepared.json beside it names, or how it looks.

    A file of uint32 shows: read as uint16, every second id would be 0, or next to it where the vocabulary is large.
    """
    if (named := _named_type(os.path.dirname(path))) is not None:
        return named
    for kind in WIDER:
        ids = _ids_at_ends(path, kind)
        if not _are_of(ids, vocab_size):
            continue
        if kind.itemsize == 8 or vocab_size > FEW_SYMBOLS or not ids.all():
            return kind
        # As uint16, symbol 0 would be every second one, and nowhere else: as likely, and how nanoGPT reads it.
        print(f'warning: every second id in {path} is 0; if they are {kind} ids, say "dtype": "{kind}" in meta.pkl')
    if vocab_size > 2**16 and _are_of(_ids_at_ends(path, WIDER[-1]), LARGEST_VOCABULARY):
        return WIDER[-1]  # ids that are too large for the vocabulary: reading them tells which
    return NANOGPTS


class TokenFile:
    """A .bin file, of which sequences of T tokens and one more are read.

    Raises UsageError where it isn't one, has changed since, or holds an id that is not in the vocabulary.
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
        """What the file looks like, where that is another type than the one as which it is read."""
        candidates = [(kind, self.vocab_size) for kind in (*WIDER, NANOGPTS)]
        candidates += [(kind, LARGEST_VOCABULARY) for kind in WIDER]
        for kind, vocab_size in candidates:
            if kind != self.kind and _are_of(_ids_at_ends(self.path, kind), vocab_size):
                return f" (read as {self.kind}; it looks like {kind}: see dtype in meta.pkl or prepared.json)"
        return ""

    def _look_again(self):
        """Raise a UsageError where the file has changed."""
        tokens, changed = self._look()
        if tokens != self.tokens or (changed != self._changed and _fingerprint(self.path) != self.checksum):
            raise UsageError(
                f"{self.path} has changed since the run began (it had {self.tokens:,} tokens, and now has {tokens:,}, "
                "or others): put the old file back, or start again for the new one"
            )
        self._changed = changed

    def draw(self, count, generator):
        """Where so many sequences begin, at random, int64 (count,)."""
        return torch.randint(self.tokens - self.block_size, (count,), generator=generator)

    def read(self, starts):
        """The sequences that begin at starts, int64 (len(starts), T + 1)."""
        self._look_again()
        rows = np.empty((len(starts), self.block_size + 1), self.kind)
        # Read, not mapped: a mapping keeps the pages that it touched, and kills the process if the file shrinks.
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
