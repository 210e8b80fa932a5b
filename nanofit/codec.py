"""Text to token ids and back: a data set's own symbols where its meta.pkl has them, else GPT-2's BPE."""

import os
import pickle
from numbers import Integral

from nanofit.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
GPT2_SYMBOLS = 50257

# ---- meta.pkl ----------------------------------------------------------------------------------------------


def _stand_in(module, name):
    """An empty class in the place of one that a pickle names: nothing is imported, and what it held is dropped.

    It is a dict, so that an OrderedDict, a Counter or a defaultdict keeps what is in it.
    """
    nothing = {method: lambda self, *args, **keys: None for method in ("__init__", "__setstate__", "append", "extend")}
    return type(name, (dict,), {"__module__": module, "__hash__": object.__hash__, **nothing})


class _Unpickler(pickle.Unpickler):
    """Reads plain values and numpy's numbers. Of all else it makes stand-ins, so that a pickle can't run anything."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            import numpy as np

            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            import numpy as np

            if name == "scalar":
                return np.int64(0).__reduce__()[0]  # the same function, wherever this numpy has it
            return _stand_in("numpy", "ndarray")
        return _stand_in(module, name)


def _type_of(value):
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def load_meta(folder):
    """meta.pkl of a data set as a dict whose vocab_size is an int above zero; None where there is none.

    Training needs no more of it. Raises UsageError.
    """
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return None
    if not os.path.isfile(path):
        raise UsageError(f"{path} is not a file: prepare the data again")
    try:
        with open(path, "rb") as f:
            meta = _Unpickler(f).load()
    except Exception as e:  # a damaged pickle can raise almost anything
        raise UsageError(f"{path} can't be read, it is damaged or no pickle ({e}): prepare the data again") from e
    if not isinstance(meta, dict) or "vocab_size" not in meta:
        raise UsageError(f"{path} must hold a dict with vocab_size, not a {_type_of(meta)}: prepare the data again")
    vocab_size = meta["vocab_size"]
    if not isinstance(vocab_size, Integral) or isinstance(vocab_size, bool):
        raise UsageError(f"{path}: vocab_size is a {_type_of(vocab_size)}: write int(...)")
    if vocab_size < 1:
        raise UsageError(f"{path}: vocab_size must be at least 1, not {vocab_size}: prepare the data again")
    return {**meta, "vocab_size": int(vocab_size)}


def symbols_of(folder):
    """(stoi, itos) of a data set's meta.pkl: {symbol: id} and {id: symbol}; one is made from the other if need be.

    Raises UsageError for what can't be: training doesn't ask for symbols, so that this comes to light here.
    """
    path, meta = os.path.join(folder, "meta.pkl"), load_meta(folder)
    stoi, itos = meta.get("stoi"), meta.get("itos")
    for name, value in (("stoi", stoi), ("itos", itos)):
        kinds = (dict, list, tuple, str) if name == "itos" else dict
        if value is not None and (not isinstance(value, kinds) or not value):
            raise UsageError(f"{path}: {name} is a {_type_of(value)}: write a dict that is not empty")
    if stoi is None and itos is None:
        raise UsageError(f"{path} has neither stoi nor itos: training needs neither, but text does; add one of them")
    itos = dict(enumerate(itos)) if isinstance(itos, (list, tuple, str)) else itos
    itos = itos or {i: symbol for symbol, i in stoi.items()}
    stoi = stoi or {symbol: i for i, symbol in itos.items()}
    pairs = [*stoi.items(), *((symbol, i) for i, symbol in itos.items())]
    if not all(isinstance(s, str) and isinstance(i, Integral) and 0 <= i < meta["vocab_size"] for s, i in pairs):
        raise UsageError(
            f"{path}: stoi must give the id of each symbol, a whole number from 0 to vocab_size - 1, and itos the "
            "symbol of each id, a string: prepare the data again"
        )
    return {s: int(i) for s, i in stoi.items() if s}, {int(i): s for i, s in itos.items()}


def differs(meta, vocab_size):
    """Lines, one or none, for data whose symbols can't be the model's.

    meta: the data set's, or None. vocab_size: the model's.
    """
    if meta is None or meta["vocab_size"] == vocab_size:
        return []
    return [
        f"warning: meta.pkl of the data names {meta['vocab_size']:,} symbols, and the model has a vocabulary of "
        f"{vocab_size:,}: to the model, these ids may stand for other symbols"
    ]


# ---- text --------------------------------------------------------------------------------------------------


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


def codec_of(folder, vocab_size=None):
    """(encode, decode, name) for the data set in folder; None stands for no data set: GPT-2's BPE.

    encode: str to list of int, a UsageError for a character that the data set lacks. decode: list of int to str; an id
    that stands for nothing, as those of a padded vocabulary, gives nothing. vocab_size: of a model, which the symbols
    must fit, else a UsageError.
    """
    meta = load_meta(folder) if folder else None
    name, size = (os.path.join(folder, "meta.pkl"), meta["vocab_size"]) if meta else ("GPT-2 BPE", GPT2_SYMBOLS)
    if vocab_size is not None and size > vocab_size:
        lacking = f": {os.path.join(folder, 'meta.pkl')} is not in this folder" if folder and not meta else ""
        raise UsageError(
            f"the model has a vocabulary of {vocab_size:,}, and {name} has {size:,} symbols{lacking}; start in the "
            "folder whose data/ has the meta.pkl that the model was trained with"
        )
    if meta is None:
        bpe = gpt2_bpe()

        def decode(ids):
            return bpe.decode([i for i in ids if i < bpe.n_vocab])

        return lambda text: bpe.encode(text, allowed_special={END_OF_TEXT}), decode, name

    stoi, itos = symbols_of(folder)
    return lambda text: _encode(text, stoi, name), lambda ids: "".join(itos.get(i, "") for i in ids), name


def _encode(text, stoi, name):
    """The ids of a text, of which each time the longest symbol is taken that fits."""
    longest = max(map(len, stoi))
    ids, unknown, place = [], set(), 0
    while place < len(text):
        pieces = (text[place : place + size] for size in range(longest, 0, -1))
        symbol = next((piece for piece in pieces if piece in stoi), None)
        if symbol is None:
            unknown.add(text[place])
        else:
            ids.append(stoi[symbol])
        place += len(symbol or text[place])
    if unknown:
        unknown = sorted(unknown)
        several = f"characters {', '.join(map(repr, unknown[:20]))}, which are" if unknown[1:] else ""
        raise UsageError(
            f"the prompt has the {several or f'character {unknown[0]!r}, which is'} not among the {len(stoi)} "
            f"symbols of {name}: use only {''.join(stoi)[:300]!r}"
        )
    return ids
