"""Tiny Shakespeare in GPT-2's BPE: 301,966 tokens to train on and 36,059 to validate.

python data/shakespeare/prepare.py [--input=FILE] [--force]
"""

import os
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(folder))

import corpus  # noqa: E402

if __name__ == "__main__":
    corpus.run(lambda: corpus.prepare_shakespeare(__doc__, folder, corpus.write_bpe))
