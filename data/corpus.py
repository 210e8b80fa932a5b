"""What the prepare.py files share: fetching text, tokenising it, and writing a data set whole or not at all."""

import argparse
import http.client
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # this project's nanofit, no other

import nanofit

nanofit.start()  # before the larger imports, in which Ctrl-C may come
import numpy as np

from nanofit import codec
from nanofit.errors import PatientOutput, UsageError, first_line, usage_errors

DATA = os.path.dirname(os.path.abspath(__file__))
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

SEED = 2357  # nanoGPT's, for the order of the documents, which decides which of them are val
VAL_SHARE = 0.0005  # of the documents, as nanoGPT
BLOCK_SIZES = (128, 256, 1024)  # with which config/ trains, ascending
SMALL_VAL_BLOCKS = 16  # size of val if that share of the documents is shorter than one block
MOST_SPACES = 500_000  # white space in a row that tiktoken's regular expression takes; at a million it panics
MOST_VAL = 10_000_000  # tokens, if val is 10% of a text
BATCH_CHARACTERS = 1_000_000  # tokenised at a time
MULTIPLE = 64  # of vocab_size: whole tiles of a matrix product are faster
COPIED_TOKENS = 2**21  # copied at a time

# A data set's files, in the order in which old ones are removed and new ones come. Wherever that is interrupted, there
# is no mixture of old and new files to train on.
FILES = ("val.bin", "prepared.json", "meta.pkl", *codec.TOKENIZER_FILES, "train.bin")
READY = "ready.part"  # the folder of the new files while the old ones are removed


# ---- talking to a person -----------------------------------------------------------------------------------
def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def counted(documents):
    return f"{documents:,} document{'s' * (documents != 1)}"


class Parser(argparse.ArgumentParser):
    """The arguments of a prepare.py, --force among them. A mistake is a UsageError."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.add_argument("--force", action="store_true", help="let a text too short to train on replace a larger one")

    def add_tokenizer(self):
        self.add_argument(
            "--tokenizer",
            default="gpt2",
            help="a Hugging Face tokenizer.json, a SentencePiece .model, a folder with one of them, or the name of an "
            "encoding of tiktoken's, such as cl100k_base (default: gpt2)",
        )

    def error(self, message):
        raise UsageError(f"{message} ({self.prog} --help tells what may be given)")


def whole_number(text):
    """A whole number above zero, such as 100_000_000 or 1e8."""
    try:
        number = float(text) if re.search(r"[.eE]", text) else int(text)
    except ValueError:
        number = 0
    if not 1 <= number < 2**63 or number != int(number):
        raise argparse.ArgumentTypeError(f"expected a whole number above zero, such as 100_000_000, not {text!r}")
    return int(number)


def run(main):
    """Run main(). Ctrl-C and SIGTERM end it with a line and the signal's exit code, and leave nothing behind."""

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)
    # If a pipe is closed or a disk is full, preparing the data goes on.
    with redirect_stdout(PatientOutput(sys.stdout)), redirect_stderr(PatientOutput(sys.stderr)):
        try:
            main()
        except KeyboardInterrupt as e:
            print("interrupted: nothing was replaced", file=sys.stderr)
            sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))


# ---- a data set's files ------------------------------------------------------------------------------------
def folder_named(name, own=""):
    """The folder of the data set that --out names. own: the data set whose prepare.py this is.

    Raises UsageError for an impossible name, and for another data set that has a prepare.py.
    """
    folder, root = Path(DATA, name), Path(DATA).resolve()
    if folder.resolve() in (root, *root.parents):
        raise UsageError(f"--out={name} is not the name of a data set: expected one such as --out=mine")
    if os.path.exists(folder / "prepare.py") and folder.resolve() != root / own:
        raise UsageError(f"{folder} is made by a prepare.py of its own: name your data set with --out=NAME")
    return folder


def each_once(paths):
    """The paths, sorted, each file once, whatever links lead to it."""
    found = {}
    for path in sorted(paths):
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


class DataSet:
    """A data set in the making. When its with block ends without an error, its files replace the old ones together.

    Until then they are in a temporary folder. Only one prepare.py at a time may work on a data set.

    vocab_size: the tokenizer's. kind: the numpy dtype of ids, uint16 as in nanoGPT, or uint32 if that is too small.
    """

    def __init__(self, folder, force=False, vocab_size=codec.GPT2_SYMBOLS):
        self.folder, self.force = Path(folder), force
        self.kind = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.record = {}  # goes into prepared.json, with the tokens
        self.open = ExitStack()  # closed at the end in any case

    def __enter__(self):
        with self.writing():
            self._is_new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
            for left in self.folder.glob("prepare-*.part"):  # by a prepare.py that was killed
                shutil.rmtree(left, ignore_errors=True)
            _replace(self.folder)
            self._parts = Path(tempfile.mkdtemp(prefix="prepare-", suffix=".part", dir=self.folder))
        return self

    def __exit__(self, kind, error, trace):
        try:
            with self.writing():  # closing writes buffers
                self.open.close()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._parts, ignore_errors=True)
            if self._is_new and not any(self.folder.iterdir()):
                self.folder.rmdir()
            if self._lock is not None:
                os.close(self._lock)

    @contextmanager
    def writing(self):
        """Turns errors of the disk, while this data set's files are written, into a UsageError."""
        try:
            yield
        except OSError as e:
            raise UsageError(
                f"{self.folder} can't be written ({e.strerror or first_line(e)}): make room or mend its permissions; "
                "the data set there is as it was"
            ) from e

    def part(self, name):
        """The temporary path of a file."""
        return self._parts / name

    def write(self, split, ids):
        """Write token ids to split.bin."""
        with self.writing(), open(self.part(f"{split}.bin"), "wb") as f:
            f.write(np.ascontiguousarray(ids, dtype=self.kind))

    def write_meta(self, vocab_size, **more):
        """Write meta.pkl. more: such as stoi and itos, which sampling needs and training doesn't."""
        with self.writing(), open(self.part("meta.pkl"), "wb") as f:
            pickle.dump({"vocab_size": vocab_size, **more}, f)

    def keep_tokenizer(self, tokenizer):
        """Write the tokenizer, or its name, for sample.py and export.py; nothing for GPT-2's BPE, as nanoGPT."""
        name, kind = tokenizer.name, os.path.splitext(tokenizer.name)[1]
        self.record["encoding"] = os.path.basename(name)
        if name == codec.GPT2:
            return
        more = {}
        if "tokenizer" + kind in codec.TOKENIZER_FILES:
            with self.writing():
                shutil.copyfile(name, self.part("tokenizer" + kind))
        else:
            more["tokenizer"] = name
        padded = -(-tokenizer.symbols // MULTIPLE) * MULTIPLE
        self.write_meta(padded, symbols=tokenizer.symbols, **more)
        print(f"{name} has {tokenizer.symbols:,} symbols: vocab_size {padded:,}, {self.kind} ids")
        if tokenizer.end is None:
            print("it names no end of a text: documents follow each other without one")

    def _finish(self):
        """Check the new files, and replace the old ones."""
        sizes = {split: os.path.getsize(self.part(f"{split}.bin")) for split in ("train", "val")}
        self.tokens = {split: size // self.kind.itemsize for split, size in sizes.items()}
        self._check_lengths()
        with self.writing():
            record = {"encoding": "GPT-2 BPE", **self.record, "dtype": self.kind.name, "tokens": self.tokens}
            self.part("prepared.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            for path in self._parts.iterdir():
                with open(path, "rb") as f:
                    os.fsync(f.fileno())  # on the disk, before the old files go
            before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                os.rename(self._parts, self.folder / READY)
                _replace(self.folder)
                for split, count in self.tokens.items():
                    documents = self.record.get("documents")
                    of_documents = f" of {counted(documents[split])}" if documents else ""
                    print(f"{split} has {count:,} tokens{of_documents}, {count / sum(self.tokens.values()):.2%} of all")
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _check_lengths(self):
        """Warn of splits too short for config/. One too short for all of config/ may not replace a larger data set."""
        split, shortest = min(self.tokens.items(), key=lambda item: item[1])
        too_long = [str(size) for size in BLOCK_SIZES if shortest <= size]
        if not too_long:
            return
        sentence = f"{split} has {shortest:,} tokens, too few for block_size={', '.join(too_long)} in config/"
        old = self.folder / "train.bin"
        there = old.stat().st_size // self.kind.itemsize if old.exists() else 0
        if len(too_long) == len(BLOCK_SIZES) and there > self.tokens["train"] and not self.force:
            raise UsageError(
                f"{sentence}, so that it doesn't replace the {there:,} tokens of {old}, which are as they were: give "
                "more text, or say --force"
            )
        warn(f"{sentence}: give more text" + (f", or train with --block_size={shortest - 1}" if shortest > 1 else ""))


def _lock(folder):
    """A descriptor that holds a lock on folder for this process; None if the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(descriptor)
        raise UsageError(f"another prepare.py is at work in {folder}: wait until it has ended, or end it") from e
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _replace(folder):
    """Replace the old files by those in folder/READY, or finish that if it was interrupted."""
    ready = folder / READY
    if not ready.is_dir():
        return
    if (ready / FILES[0]).exists():  # no new file has been moved yet, so all others are old
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    for name in FILES:
        if (ready / name).exists():
            os.rename(ready / name, folder / name)
    ready.rmdir()


# ---- a text, cut once --------------------------------------------------------------------------------------
def read_or_fetch(path, folder):
    """The text of path; without a path, of folder/input.txt, which is fetched if it is missing."""
    if path is None:
        path = os.path.join(folder, "input.txt")
        if not os.path.exists(path):
            from torch.hub import download_url_to_file  # a progress bar, and a file only when it is whole

            print(f"fetching {SHAKESPEARE}")
            try:
                download_url_to_file(SHAKESPEARE, path, hash_prefix=SHAKESPEARE_SHA256, progress=sys.stderr.isatty())
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, RuntimeError) as e:
                raise UsageError(
                    f"{SHAKESPEARE} can't be fetched ({first_line(e)}): connect to the network, or give the text with "
                    "--input FILE"
                ) from e
            except OSError as e:
                raise UsageError(f"{path} can't be written ({e.strerror}): make room or mend its permissions") from e
    with usage_errors(OSError, UnicodeDecodeError, prefix=f"{path} can't be read as UTF-8 text: "):
        text = Path(path).read_text(encoding="utf-8-sig")
    if not text.strip():
        raise UsageError(f"{path} is empty: expected a text")
    return text


def prepare_shakespeare(doc, folder, write):
    """Tiny Shakespeare, or the text that --input names, as a data set. write: write_characters or write_bpe."""
    parser = Parser(doc)
    parser.add_argument(
        "--input", metavar="FILE", help="a UTF-8 text of your own; without it, Tiny Shakespeare is fetched"
    )
    args = parser.parse_args()
    text = read_or_fetch(args.input, folder)
    with DataSet(folder, args.force) as made:
        write(made, text)


def halves(text):
    """The first 90% of the characters, for training, and the last 10%, for validation."""
    cut = int(len(text) * 0.9)
    return {"train": text[:cut], "val": text[cut:]}


def write_characters(made, text):
    """A character-level data set: each distinct character of text is a symbol, in the order of its code point."""
    encode = characters(made, set(text), len(text))
    for split, part in halves(text).items():
        made.write(split, encode(part))


def write_bpe(made, text):
    """A data set in GPT-2's BPE."""
    bpe = codec.codec_of(None)
    for split, part in halves(text).items():
        check_spaces(part, "the text")
        made.write(split, bpe.encode_ordinary(part))


def characters(made, symbols, count):
    """Write meta.pkl for a set of characters, and return the function from text to ids. count: the text's length."""
    symbols = sorted(symbols)
    made.kind = np.dtype("<u2" if len(symbols) <= 2**16 else "<u4")
    shown = "".join(symbols[:200])
    print(f"{count:,} characters, {len(symbols):,} of them different: {shown!r}{' ...' if len(symbols) > 200 else ''}")
    made.record["encoding"] = "characters"
    stoi = {c: i for i, c in enumerate(symbols)}
    made.write_meta(len(symbols), itos=dict(enumerate(symbols)), stoi=stoi)
    table = np.full(sys.maxunicode + 1, len(symbols), dtype="<u4")  # an id by code point
    table[[ord(c) for c in symbols]] = range(len(symbols))

    def encode(text):
        # An array of code points, looked up in one go: a Python list of ids would take 30 times the text.
        ids = table[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
        if len(ids) and ids.max() == len(symbols):
            raise UsageError("the text has changed while it was read: prepare it again")
        return ids.astype(made.kind)

    return encode


# ---- many documents ----------------------------------------------------------------------------------------
def check_spaces(text, name):
    """Raise a UsageError for a text that makes tiktoken panic."""
    if len(text) > MOST_SPACES:
        longest = max((len(m[0]) for m in re.finditer(r"\s+", text)), default=0)
        if longest > MOST_SPACES:
            raise UsageError(
                f"{name} has {longest:,} characters of white space in a row, and tiktoken takes {MOST_SPACES:,}: "
                "shorten them"
            )


def tokenised(made, tokenizer, pieces, threads):
    """Turn (text, whether a document ends with it) into (ids, the same), by a Codec, many at a time.

    At the end of a document the tokenizer's end-of-text token is added, such as <|endoftext|>.
    """
    end = [] if tokenizer.end is None else [tokenizer.end]

    def encode(number, text, ends):
        check_spaces(text, f"document {number:,}")
        ids = tokenizer.encode_ordinary(text)
        return np.array(ids + end if ends else ids, dtype=made.kind), ends

    with ThreadPoolExecutor(threads) as pool:  # tiktoken lets other threads run
        batch, size, number = [], 0, 1
        for text, ends in pieces:
            batch.append((number, text, ends))
            size += len(text)
            number += ends
            if size >= BATCH_CHARACTERS:
                yield from pool.map(encode, *zip(*batch, strict=True))
                batch, size = [], 0
        if batch:
            yield from pool.map(encode, *zip(*batch, strict=True))


def share_for_val(lengths, block_size):
    """How many of the shuffled documents are val: as in nanoGPT 0.05%, at least one. lengths: theirs, in tokens.

    If these are too short for a block: as many as have 10% of the tokens, at most SMALL_VAL_BLOCKS blocks; one less if
    val would be larger than train.
    """
    count = math.ceil(len(lengths) * VAL_SHARE)
    tokens = np.cumsum(lengths)
    if tokens[count - 1] <= block_size:
        wanted = min(tokens[-1] // 10, SMALL_VAL_BLOCKS * block_size)
        more = min(int(np.searchsorted(tokens, wanted)) + 1, len(lengths) - 1)
        count = max(count, more - bool(2 * tokens[more - 1] > tokens[-1]))
    return count


def _progress(what, total=None):
    """A bar of tokens and tokens per second on a terminal; nothing in a file."""
    from tqdm import tqdm  # comes with datasets

    return tqdm(desc=what, total=total, unit=" tokens", unit_scale=True, disable=None)


class Documents:
    """Tokenised documents, kept on the disk until all are there and can be split.

    It takes 8 bytes of memory a document, and about 40 while they are split.
    """

    def __init__(self, made, expected=None):
        self._made = made
        self._ends = array("Q")  # where each document ends, in tokens
        self.tokens = 0
        self._began = time.perf_counter()
        self._bar = made.open.enter_context(_progress("tokenising", expected))
        with made.writing():
            self._file = made.open.enter_context(open(made.part("documents"), "wb"))  # noqa: SIM115

    def __len__(self):
        return len(self._ends)

    def add(self, ids, ends=True):
        """Append ids, of the data set's kind, to the current document. ends: it ends with them."""
        with self._made.writing():
            self._file.write(ids)
        self.tokens += len(ids)
        self._bar.update(len(ids))
        if ends:
            self._ends.append(self.tokens)

    def split_by_documents(self):
        """Write train.bin and val.bin of whole documents, chosen and ordered by the seed as nanoGPT does."""
        starts, lengths = self._shuffled()
        block_size = BLOCK_SIZES[-1]
        count = share_for_val(lengths, block_size)
        usual = math.ceil(len(lengths) * VAL_SHARE)
        if count > usual:
            print(
                f"0.05% of the documents would give val {lengths[:usual].sum():,} tokens, too few for "
                f"block_size={block_size}: it takes {count:,} of {len(lengths):,} documents, "
                f"{lengths[:count].sum() / self.tokens:.1%} of the tokens"
            )
        if 2 * lengths[:count].sum() > self.tokens:
            warn("val has more tokens than train, because no document is divided: cut the longest into several")
        self._made.record["documents"] = {"train": len(lengths) - count, "val": count}
        self._write(starts, lengths, {"val": int(lengths[:count].sum()), "train": int(lengths[count:].sum())})

    def split_by_tokens(self):
        """Write train.bin and val.bin. Of the shuffled documents, the last 10% of tokens are val, at most MOST_VAL."""
        starts, lengths = self._shuffled()
        train = max(int(self.tokens * 0.9), self.tokens - MOST_VAL)
        self._write(starts, lengths, {"train": train, "val": self.tokens - train})

    def _shuffled(self):
        """(where each document starts, its length), int64 (documents,) in tokens, shuffled by the seed."""
        seconds = time.perf_counter() - self._began
        self._bar.close()
        speed = self.tokens / seconds
        print(f"{self.tokens:,} tokens of {counted(len(self))} in {seconds:.1f} s: {speed:,.0f} tokens/s")
        with self._made.writing():
            self._file.close()
        ends = np.frombuffer(self._ends, dtype=np.int64)
        lengths = np.diff(ends, prepend=0)
        order = np.random.default_rng(SEED).permutation(len(ends))
        return (ends - lengths)[order], lengths[order]

    def _write(self, starts, lengths, tokens):
        """Copy the documents, one after the other, to the files of the splits. tokens: {split: how many}."""
        path, width = self._made.part("documents"), self._made.kind.itemsize
        documents = zip(starts, lengths, strict=True)
        start = left = 0  # the rest of a document: its position and its length
        with self._made.writing(), open(path, "rb", buffering=0) as file, _progress("writing", self.tokens) as bar:
            for split, room in tokens.items():
                with open(self._made.part(f"{split}.bin"), "wb") as out:
                    while room:
                        if not left:
                            start, left = map(int, next(documents))
                        count = min(left, room, COPIED_TOKENS)
                        file.seek(width * start)
                        out.write(file.read(width * count))
                        bar.update(count)
                        start, left, room = start + count, left - count, room - count
        os.unlink(path)
