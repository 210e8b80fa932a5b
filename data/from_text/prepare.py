"""A folder of your own text files, or one file, as a data set.

    python data/from_text/prepare.py ~/tales
    python data/from_text/prepare.py ~/tales --characters --out=tales_char
    python data/from_text/prepare.py ~/tales --tokenizer=tokenizer.json --out=tales_mine

makes data/tales in GPT-2's BPE, each file followed by <|endoftext|>, data/tales_char by characters, and data/tales_mine
by a tokenizer of your own; the last line says how to train on it. All files below the folder count, hidden ones and
links to folders aside. The files are shuffled by a seed, and the last 10% of all (at most 10 million tokens) are val.
"""

import os
import re
import shlex
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(folder))

import corpus  # noqa: E402
from corpus import UsageError, usage_errors  # noqa: E402

from nanofit.host import processors  # noqa: E402

PIECE = 2**16  # characters read at a time; several pieces are tokenised at once
ENOUGH_FOR_GPT2 = 10_000_000  # tokens


def text_files(path, out):
    """The file at path, or all files below it, sorted, without hidden ones and those of out."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        what = "is neither a folder nor a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"{path} {what}: give a folder of text files")
    found = []
    for parent, folders, names in os.walk(path, onerror=_raise):
        own = corpus.FILES if os.path.realpath(parent) == os.path.realpath(out) else ()
        folders[:] = [f for f in folders if not f.startswith(".") and not f.endswith(".part")]
        found += [os.path.join(parent, n) for n in names if not n.startswith(".") and n not in own]
    return corpus.each_once(filter(os.path.isfile, found))


def _raise(error):
    raise error


def pieces(path):
    """Pieces of a file, (text, whether it is the last), cut where GPT-2's BPE never joins two characters."""
    held = []
    with open(path, encoding="utf-8-sig") as file:
        while chunk := file.read(PIECE):
            if "\0" in chunk:
                raise UnicodeError("it holds a NUL, a character of code 0")
            if cut := _safe_cut(chunk):
                yield "".join([*held, chunk[:cut]]), False
                held = []
            held.append(chunk[cut:])
    yield "".join(held), True


def _safe_cut(text):
    """The position after the last line end without other white space beside it; 0 if there is none."""
    place = len(text) - 1
    while (place := text.rfind("\n", 1, place)) > 0:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place + 1
    return 0


def survey(paths):
    """(the files that are text, the set of their characters, how many characters), with a line for the other files."""
    found, symbols, count, left_out = [], set(), 0, []
    for path in paths:
        here, length, is_blank = set(), 0, True
        try:
            for text, _ in pieces(path):
                here.update(text)
                length += len(text)
                is_blank = is_blank and (not text or text.isspace())
        except UnicodeError as e:
            left_out.append(path if isinstance(e, UnicodeDecodeError) else f"{path} ({e})")
            continue
        if not is_blank:
            found.append(path)
            symbols |= here
            count += length
    if left_out:
        names = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        corpus.warn(f"left out, because not UTF-8 text: {names} ({len(left_out):,} of {len(paths):,} files)")
    return found, symbols, count


def train_command(made, name, by_characters):
    """The command that trains on a data set: a small model, or GPT-2 if there are enough tokens."""
    block_size = min(256, min(made.tokens.values()) - 1)
    if not by_characters and made.tokens["train"] > ENOUGH_FOR_GPT2:
        config, more = "train_openwebtext", " --auto_fit=True"
    else:
        config, more = "train_shakespeare_char", "" if block_size == 256 else f" --block_size={block_size}"
    out_dir = "out-" + os.path.basename(name)
    return f"python train.py config/{config}.py --dataset={shlex.quote(name)} --out_dir={shlex.quote(out_dir)}{more}"


def main():
    parser = corpus.Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="a folder of UTF-8 text files, or one such file")
    parser.add_argument("--characters", action="store_true", help="a token a character, instead of GPT-2's BPE")
    parser.add_tokenizer()
    parser.add_argument("--out", metavar="NAME", help="the data set's name, a folder in data/ (default: FOLDER's name)")
    args = parser.parse_args()
    path = os.path.abspath(args.folder)
    stem = os.path.basename(path) if os.path.isdir(path) else os.path.splitext(os.path.basename(path))[0]
    name = args.out or re.sub(r"[^\w.-]+", "_", stem).strip("._") or "text"
    out = corpus.folder_named(name)
    if args.characters and args.tokenizer != "gpt2":
        raise UsageError("--characters and --tokenizer are two ways to make tokens: choose one")
    tokenizer = None if args.characters else corpus.codec.codec_named(args.tokenizer)

    with usage_errors(OSError, prefix=f"{args.folder} can't be read: "):
        files, symbols, count = survey(text_files(args.folder, out))
    if not files:
        raise UsageError(f"{args.folder} is empty: there is no UTF-8 text in it")
    with corpus.DataSet(out, args.force, tokenizer.symbols if tokenizer else len(symbols)) as made:
        made.record.update({"source": args.folder, "files": len(files)})
        documents = corpus.Documents(made)
        texts = (piece for file in files for piece in pieces(file))
        with usage_errors(OSError, UnicodeError, prefix=f"{args.folder} can't be read: "):
            if args.characters:
                separator = "\n" if len(files) > 1 else ""
                encode = corpus.characters(made, symbols | set(separator), count)
                for text, ends in texts:
                    documents.add(encode(text if not ends or text.endswith("\n") else text + separator), ends)
            else:
                made.keep_tokenizer(tokenizer)
                for ids, ends in corpus.tokenised(made, tokenizer, texts, processors()):
                    documents.add(ids, ends)
        documents.split_by_tokens()
    if min(made.tokens.values()) > 1:
        print(f"to train on it: {train_command(made, name, args.characters)}")


if __name__ == "__main__":
    corpus.run(main)
