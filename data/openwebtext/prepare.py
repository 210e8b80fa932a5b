"""OpenWebText, or a corpus of your own, in GPT-2's BPE, each document followed by <|endoftext|>.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --source 'corpus/*.parquet'

OpenWebText is 54 GB on disk while it is prepared, and gives about 9 billion tokens (17 GB) to train on and
4.4 million to validate. Memory stays flat whatever the size. Val is 0.05% of the documents, at least one.
"""

import argparse
import glob
import os
import sys

import numpy as np

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(folder))

from corpus import UsageError, codec, usage_errors  # noqa: E402

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
SHARDS = 1024  # a shard of the tokenised corpus is what is held in memory at a time


def load(source, num_proc):
    """The documents of a hub data set or of local files, as a datasets.Dataset with a column 'text'."""
    import datasets

    suffix = os.path.splitext(source)[1]
    if suffix in FORMATS or os.path.exists(source) or glob.glob(source):
        files = sorted(glob.glob(source)) or [source]
        if missing := [f for f in files if not os.path.isfile(f)]:
            raise UsageError(f"--source {missing[0]}: no such file; give parquet, jsonl or txt files, or a hub name")
        if suffix not in FORMATS:
            raise UsageError(f"--source {source}: expected files that end in {', '.join(FORMATS)}, not {suffix!r}")
        options = {"sample_by": "paragraph"} if FORMATS[suffix] == "text" else {}
        with usage_errors(Exception, prefix=f"--source {source} can't be read: "):
            data = datasets.load_dataset(FORMATS[suffix], data_files=files, split="train", **options)
    else:
        try:
            data = datasets.load_dataset(source, split="train", num_proc=num_proc)
        except Exception as e:  # a dozen kinds, of the hub's client and of the network
            raise UsageError(
                f"the data set {source} can't be fetched from the hub ({type(e).__name__}): connect to the network, or "
                "give local files with --source 'FILES*.parquet' (or .jsonl, .txt)"
            ) from e
    if "text" not in data.column_names:
        raise UsageError(f"--source {source} has the columns {', '.join(data.column_names)}: expected one named 'text'")
    if len(data) < 2:
        raise UsageError(f"--source {source} has {len(data)} document(s): at least two are needed, one of them for val")
    return data.select_columns("text")


def tokenize(documents):
    """A batch of documents to their token ids, in the form that Dataset.map wants."""
    bpe = codec.gpt2_bpe()
    ids = [[*tokens, bpe.eot_token] for tokens in bpe.encode_ordinary_batch(documents["text"], num_threads=1)]
    return {"ids": ids, "len": [len(tokens) for tokens in ids]}


def write(data, split, into):
    """Write the ids of a tokenised data set to split.bin, a shard at a time; the file appears when it is whole."""
    from tqdm import tqdm  # comes with datasets

    path = os.path.join(into, f"{split}.bin")
    shards = min(SHARDS, len(data))  # never more than rows, or some would be empty
    count = 0
    with open(path + ".part", "wb") as f:
        for index in tqdm(range(shards), desc=f"writing {split}.bin"):
            shard = data.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")
            tokens = np.concatenate(shard["ids"][:]).astype("<u2")
            tokens.tofile(f)
            count += len(tokens)
    os.replace(path + ".part", path)
    print(f"{split} has {count:,} tokens of {len(data):,} documents")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source",
        default="Skylion007/openwebtext",
        help="a data set's name on the Hugging Face hub, or local files: .parquet or .jsonl with a column 'text', or "
        ".txt, where a blank line ends a document; * and ? match as in a shell",
    )
    parser.add_argument(
        "--num_proc",
        type=int,
        default=max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) // 2),
        help="processes that tokenise (default here: %(default)s, half of the processors)",
    )
    args = parser.parse_args()
    if args.num_proc < 1:
        raise UsageError(f"--num_proc must be at least 1, not {args.num_proc}")

    codec.gpt2_bpe()  # fetched here once, not by every process
    data = load(args.source, args.num_proc)
    splits = data.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    splits["val"] = splits.pop("test")
    for split, documents in splits.items():
        tokens = documents.map(
            tokenize,
            batched=True,
            remove_columns=["text"],
            num_proc=min(args.num_proc, len(documents)) if args.num_proc > 1 else None,
            desc=f"tokenising {split}",
        )
        write(tokens, split, folder)


if __name__ == "__main__":  # processes that tokenise may import this file again
    main()
