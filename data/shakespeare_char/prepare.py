"""Tiny Shakespeare by characters: 65 symbols, 1,003,854 tokens to train on and 111,540 to validate.

python data/shakespeare_char/prepare.py [--input=FILE] [--force]
"""

import os
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(folder))

import corpus  # noqa: E402


def main():
    parser = corpus.Parser(__doc__)
    parser.add_argument(
        "--input", metavar="FILE", help="a UTF-8 text of your own; without it, Tiny Shakespeare is fetched"
    )
    args = parser.parse_args()
    text = corpus.read_or_fetch(args.input, folder, corpus.SHAKESPEARE, corpus.SHAKESPEARE_SHA256)
    with corpus.DataSet(folder, args.force) as made:
        corpus.write_characters(made, text)


if __name__ == "__main__":
    corpus.run(main)
