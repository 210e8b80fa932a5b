"""Tiny Shakespeare by characters: 65 symbols, 1,003,854 tokens to train on and 111,540 to validate.

python data/shakespeare_char/prepare.py [--input FILE]
"""

import argparse
import os
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(folder))

import corpus  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--input", metavar="FILE", help="a UTF-8 text of your own; without it, Tiny Shakespeare is fetched")
args = parser.parse_args()
corpus.write_characters(folder, corpus.read_or_fetch(args.input, folder, corpus.SHAKESPEARE))
