"""Text to token ids and back: a data set's own symbols where it has a meta.pkl, else GPT-2's BPE."""

import os
import pickle

from configurator import UsageError

END_OF_TEXT = "<|endoftext|>"


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; refuses whatever would import or call something."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def load_meta(folder):
    """meta.pkl of a data set as a dict with vocab_size, stoi and itos; None where there is none."""
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as f:
            meta = _PlainUnpickler(f).load()
    except Exception as e:  # a damaged pickle can raise almost anything
        raise UsageError(f"{path} can't be read ({e}): expected a dict of plain values; prepare the data again") from e
    fits = isinstance(meta, dict) and type(meta.get("vocab_size")) is int and meta["vocab_size"] > 0
    if not fits or not isinstance(meta.get("stoi"), dict) or not isinstance(meta.get("itos"), (dict, list)):
        raise UsageError(f"{path} must hold a dict with vocab_size (a number), stoi and itos: prepare the data again")
    return meta


def gpt2_bpe():
    """GPT-2's byte-pair encoding, as a tiktoken.Encoding; tiktoken fetches its tables once and keeps them."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' errors, which tiktoken passes on
        raise UsageError(
            f"GPT-2's BPE can't be fetched ({type(e).__name__}): connect to the network once, or set "
            "TIKTOKEN_CACHE_DIR to a folder in which tiktoken has kept it"
        ) from e


def codec_of(folder):
    """(encode, decode, name) for the data set in folder; None stands for no data set: GPT-2's BPE.

    encode: str to list of int, a UsageError for a character that the data set lacks. decode: list of int to str.
    """
    meta = load_meta(folder) if folder else None
    if meta is None:
        bpe = gpt2_bpe()

        def decode(ids):
            # A padded vocabulary has ids that stand for nothing; an untrained model may draw them.
            return bpe.decode([i for i in ids if i < bpe.n_vocab])

        return lambda text: bpe.encode(text, allowed_special={END_OF_TEXT}), decode, "GPT-2 BPE"

    stoi, itos = meta["stoi"], meta["itos"]

    def encode(text):
        unknown = sorted(set(text) - set(stoi))
        if unknown:
            raise UsageError(
                f"the prompt has the character {unknown[0]!r}, which is not among the {len(stoi)} symbols of "
                f"{os.path.join(folder, 'meta.pkl')}: use only {''.join(stoi)!r}"
            )
        return [stoi[c] for c in text]

    return encode, lambda ids: "".join(itos[i] for i in ids), os.path.join(folder, "meta.pkl")
