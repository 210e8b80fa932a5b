"""OpenWebText, or a corpus of your own, in GPT-2's BPE, each document followed by <|endoftext|>.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --max_tokens=100_000_000
    python data/openwebtext/prepare.py --source='corpus/*.parquet' --out=mine
    python data/openwebtext/prepare.py --source=HuggingFaceFW/fineweb-edu --name=sample-10BT --max_tokens=1e8 --out=edu

OpenWebText is 54 GB on disk while it is fetched, and gives about 9 billion tokens (17 GB, twice that while they are
shuffled) to train on and 4.4 million to validate. With --max_tokens only what makes so many tokens is fetched. Val is
0.05% of the documents, at least one, and more where that is shorter than a block of config/.
"""

import glob
import gzip
import json
import os
import sys
import zlib
from contextlib import contextmanager

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(folder))

import corpus  # noqa: E402
from corpus import UsageError, first_line, usage_errors  # noqa: E402

from nanofit.host import processors  # noqa: E402

EXPECTED = "expected a JSON object on each line, or one list of them"
ROWS = 64  # of a parquet file, read at a time


# ---- readers: a file's documents, None for one without text; nothing is read before it is asked for --------
def read_parquet(path, column):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if os.path.getsize(path) == 0:
        return
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the one that returns freed memory to the system
    with (
        usage_errors(OSError, pyarrow.ArrowException, prefix=f"{path} can't be read as parquet: "),
        # Without pre_buffer, because a file may be a single group of rows that is larger than memory.
        ParquetFile(path, pre_buffer=False, buffer_size=2**17) as file,
    ):
        require(column, file.schema_arrow.names, path)
        for rows in file.iter_batches(batch_size=ROWS, columns=[column], use_threads=False):
            yield from rows[column].to_pylist()


def read_json(path, column):
    """An object on each line, or one list of them."""
    with opened(path) as file:
        is_list = file.read(100).lstrip().startswith("[")
        file.seek(0)
        first = True
        for number, text in [(1, file.read())] if is_list else enumerate(file, start=1):
            if not text.strip():
                continue
            with usage_errors(ValueError, RecursionError, prefix=f"{path}, line {number}: {EXPECTED}: "):
                rows = json.loads(text)
            for row in rows if is_list else [rows]:
                if not isinstance(row, dict):
                    raise UsageError(f"{path}, line {number}: expected JSON objects, not {type(row).__name__}")
                if first:
                    require(column, row, path)
                    first = False
                yield row.get(column)


def read_paragraphs(path, column):
    """A blank line ends a document."""
    lines = []
    with opened(path) as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).rstrip("\n")
                lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


READERS = {".parquet": read_parquet, ".jsonl": read_json, ".json": read_json, ".txt": read_paragraphs}


@contextmanager
def opened(path):
    """A text file, which may be compressed by gzip."""
    is_compressed = path.lower().endswith(".gz")
    with (
        usage_errors(OSError, EOFError, zlib.error, UnicodeDecodeError, prefix=f"{path} can't be read: "),
        (gzip.open if is_compressed else open)(path, "rt", encoding="utf-8-sig") as file,
    ):
        yield file


def require(column, columns, source):
    if column not in columns:
        raise UsageError(
            f"{source} has the columns {', '.join(map(str, columns))}: expected one named {column!r}; choose one with "
            "--text_column"
        )


# ---- sources -----------------------------------------------------------------------------------------------
def kind_of(path):
    """The file type in a name: .jsonl for a.jsonl and a.jsonl.gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def local_files(source):
    """The files that source names, sorted; None if it can only be a name on the hub."""
    if not source:
        raise UsageError("--source is empty: expected a hub name, files or a folder")
    if os.path.isdir(source):
        found = [os.path.join(parent, name) for parent, _, names in os.walk(source) for name in names]
        files = corpus.each_once(path for path in found if kind_of(path) in READERS)
        kinds = sorted({kind_of(path) for path in files})
        if len(kinds) > 1:
            pattern = os.path.join(source, "**", f"*{kinds[0]}")
            raise UsageError(f"--source {source} has {' and '.join(kinds)} files: choose, as with --source='{pattern}'")
        if not files:
            raise UsageError(f"--source {source} has no file that ends in {', '.join(READERS)}")
        return files
    # A link to a folder above makes ** find the same files again and again.
    files = [source] if os.path.exists(source) else corpus.each_once(glob.glob(source, recursive=True))
    if not files:
        if kind_of(source) in READERS or glob.has_magic(source):
            raise UsageError(f"--source {source}: no such file; give parquet, jsonl or txt files, or a hub name")
        return None
    for path in files:
        if not os.path.isfile(path):
            raise UsageError(f"--source {source}: {path} is not a file")
        if kind_of(path) not in READERS:
            raise UsageError(f"--source {source}: expected files that end in {', '.join(READERS)}, not {path}")
    return files


def on_the_hub(source, name, column, streaming, processes):
    """The documents of a data set on the Hugging Face hub. Streaming fetches only what is read, and keeps nothing."""
    import datasets

    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:  # a dozen kinds of errors, of the hub's client and of the network
        data = datasets.load_dataset(
            source, name, split="train", streaming=streaming, num_proc=None if streaming else processes
        )
        if data.column_names:  # streaming doesn't always know them
            require(column, data.column_names, source)
            data = data.select_columns([column])
        for row in data:
            require(column, row, source)
            yield row[column]
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(
            f"the data set {source} can't be fetched from the hub ({type(e).__name__}: {first_line(e)}): check its "
            "name, --name and the network, or give local files with --source 'FILES*.parquet' (or .jsonl, .txt)"
        ) from e


def texts(args):
    """The documents of args.source, one after the other."""
    files = local_files(args.source)
    if files is None:
        found = on_the_hub(args.source, args.name, args.text_column, args.max_tokens is not None, args.num_proc)
    elif args.name:
        raise UsageError(f"--name chooses among what a hub data set has, but --source {args.source} names files")
    else:
        found = (text for path in files for text in READERS[kind_of(path)](path, args.text_column))
    missing = 0
    for text in found:
        if text is None:
            missing += 1
        elif isinstance(text, str):
            yield text
        else:
            raise UsageError(
                f"--source {args.source}: the column {args.text_column!r} holds {type(text).__name__} values, not "
                "texts: choose another with --text_column"
            )
    if missing:
        corpus.warn(f"left out: {corpus.counted(missing)} without a text")


def main():
    parser = corpus.Parser(__doc__)
    parser.add_argument(
        "--source",
        default="Skylion007/openwebtext",
        help="a data set's name on the Hugging Face hub, or local files or a folder of them: .parquet or .jsonl with a "
        "column 'text', or .txt, where a blank line ends a document, also .jsonl.gz and .txt.gz; * and ** match as in "
        "a shell",
    )
    parser.add_argument("--name", help="which of a hub data set's configurations, such as sample-10BT")
    parser.add_argument("--text_column", default="text", help="the column that holds the text (default: text)")
    parser.add_tokenizer()
    parser.add_argument("--max_tokens", type=corpus.whole_number, help="only the first documents with so many tokens")
    parser.add_argument(
        "--out", default="openwebtext", help="the data set's name, a folder in data/ (default: openwebtext)"
    )
    parser.add_argument(
        "--num_proc",
        type=corpus.whole_number,
        default=max(1, processors() // 2),
        help="threads that tokenise, processes that fetch (default here: %(default)s, half of the processors)",
    )
    args = parser.parse_args()

    tokenizer = corpus.codec.codec_named(args.tokenizer)  # before anything is fetched, as it may fail
    with corpus.DataSet(corpus.folder_named(args.out, own="openwebtext"), args.force, tokenizer.symbols) as made:
        made.keep_tokenizer(tokenizer)
        given = {"source": args.source, "name": args.name, "max_tokens": args.max_tokens}
        made.record.update({key: value for key, value in given.items() if value is not None})
        documents = corpus.Documents(made, args.max_tokens)
        for ids, _ in corpus.tokenised(made, tokenizer, ((text, True) for text in texts(args)), args.num_proc):
            documents.add(ids)
            if args.max_tokens and documents.tokens >= args.max_tokens and len(documents) > 1:
                break
        if documents.tokens <= len(documents) * (tokenizer.end is not None):  # an empty document is only <|endoftext|>
            raise UsageError(f"--source {args.source} is empty: no document holds text")
        if len(documents) < 2:
            raise UsageError(f"--source {args.source} has 1 document: at least two are needed, one of them for val")
        documents.split_by_documents()


if __name__ == "__main__":
    corpus.run(main)
