"""Text to token ids and back: a data set's own symbols where it has a meta.pkl, else GPT-2's BPE."""

import io
import os
import pickle
import pickletools

from nanofit.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
LARGEST_META = 2**26  # bytes: some millions of symbols

# The opcodes that strings, numbers, lists and dicts are pickled with. The others import, call, or build tuples, of
# which a few bytes make a key that takes forever to hash.
_PLAIN = {
    "PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG",
    "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_LIST", "LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET",
    "LONG_BINGET",
}  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    """The second lock: should pickle read other opcodes than pickletools did, it still can't import anything."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def _unpickle(data):
    """The value that was pickled, where it is made of strings, numbers, lists and dicts alone."""
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in _PLAIN:
            raise pickle.UnpicklingError(f"it wants to run opcode {opcode.name} at byte {position}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > position:
            # The number of a place in a table, which pickle makes as long as that: up to 64 GiB.
            raise pickle.UnpicklingError(f"it wants a table of {argument:,} places at byte {position}")
    return _PlainUnpickler(io.BytesIO(data)).load()


def load_meta(folder):
    """meta.pkl of a data set as a dict with vocab_size, stoi and itos; None where there is none."""
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return None
    if not os.path.isfile(path):
        raise UsageError(f"{path} is not a file: prepare the data again")
    try:
        if (size := os.path.getsize(path)) > LARGEST_META:
            raise ValueError(f"it has {size:,} bytes")
        with open(path, "rb") as f:
            meta = _unpickle(f.read())
    except Exception as e:  # a damaged pickle can raise almost anything
        raise UsageError(
            f"{path} can't be read ({e}): expected a dict of strings, numbers, lists and dicts; prepare the data again"
        ) from e
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

    path, stoi, vocab_size = os.path.join(folder, "meta.pkl"), meta["stoi"], meta["vocab_size"]
    itos = dict(enumerate(meta["itos"])) if isinstance(meta["itos"], list) else meta["itos"]
    pairs = [*stoi.items(), *((symbol, i) for i, symbol in itos.items())]
    if not all(type(symbol) is str and type(i) is int and 0 <= i < vocab_size for symbol, i in pairs):
        raise UsageError(
            f"{path}: stoi must give the id of each symbol, a whole number from 0 to vocab_size - 1, and itos the "
            "symbol of each id, a string: prepare the data again"
        )

    def encode(text):
        unknown = sorted(set(text) - set(stoi))
        if unknown:
            several = f"characters {', '.join(map(repr, unknown[:20]))}, which are" if unknown[1:] else ""
            raise UsageError(
                f"the prompt has the {several or f'character {unknown[0]!r}, which is'} not among the {len(stoi)} "
                f"symbols of {path}: use only {''.join(stoi)[:300]!r}"
            )
        return [stoi[c] for c in text]

    def decode(ids):
        return "".join(itos.get(i, "") for i in ids)  # as with GPT-2's BPE, the padding stands for nothing

    return encode, decode, path
