"""Text to token ids and back, by the tokenizer that lies beside a data set or a model; without one, GPT-2's BPE."""

import codecs
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from operator import index
from pathlib import Path

import numpy as np

from nanofit.errors import UsageError, usage_errors

GPT2 = "GPT-2 BPE"
GPT2_SYMBOLS = 50257
MOST_PADDING = 1024  # a vocabulary that is larger by more symbols than this is not padded, but another one
END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # its names in tokenizer.json files
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

# ---- meta.pkl ----------------------------------------------------------------------------------------------


def _stand_in(module, name):
    """An empty class in place of one that a pickle names. Nothing is imported, and what the object held is dropped.

    It is a dict, so that an OrderedDict, a Counter or a defaultdict keeps its items.
    """
    nothing = {method: lambda self, *args, **keys: None for method in ("__init__", "__setstate__", "append", "extend")}
    return type(name, (dict,), {"__module__": module, "__hash__": object.__hash__, **nothing})


class _Unpickler(pickle.Unpickler):
    """Reads plain values and numpy's numbers, and makes stand-ins of all else, so that a pickle can't run code."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # protocol 2 writes a number's bytes by it
            return codecs.encode
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return np.int64(0).__reduce__()[0]  # the same function, under the name that this numpy has for it
        return _stand_in(module, name)


def load_meta(folder):
    """meta.pkl of a data set as a dict whose vocab_size is an int above zero; None if there is none.

    Training needs nothing else in it. Raises UsageError.
    """
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as f:
            meta = _Unpickler(f).load()
    except Exception as e:  # a damaged pickle can raise almost anything
        raise UsageError(f"{path} can't be read, it is damaged or no pickle ({e}): prepare the data again") from e
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if not isinstance(size, Integral) or size < 1:
        raise UsageError(f"{path} must hold a dict whose vocab_size is an int above 0, not {size!r}: write int(...)")
    return {**meta, "vocab_size": int(size)}


def differs(meta, vocab_size):
    """A warning (a list of one line) if a data set's meta.pkl has another vocabulary than the model; else []."""
    if meta is None or vocab_size in (meta["vocab_size"], meta.get("symbols")):  # with padding, and without
        return []
    return [
        f"warning: meta.pkl of the data names {meta['vocab_size']:,} symbols, and the model has a vocabulary of "
        f"{vocab_size:,}: to the model, these ids may stand for other symbols"
    ]


# ---- tokenizers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """One tokenizer of any library.

    name: for messages; the path of a tokenizer that is a file. symbols: ids are below this number. encode: str to list
    of int, special tokens included; a UsageError for a symbol that it lacks. encode_ordinary: the same for data, in
    which no text is a special token. decode: list of int to str; ids without a symbol, as in a padded vocabulary, are
    left out. end: the id of the end of a text, or None. by: the library's object, or (stoi, itos).
    """

    name: str
    symbols: int
    encode: Callable
    encode_ordinary: Callable
    decode: Callable
    end: int | None
    by: object


def codec_of(folder, vocab_size=None, most=math.inf):
    """The Codec of a data set's or of a model's folder; for None, GPT-2's BPE.

    It is read from a tokenizer.json or tokenizer.model, or from meta.pkl, which holds symbols or names an encoding.
    vocab_size: the model's, which must be that of the Codec or larger, by less than `most`; else a UsageError.
    """
    path = _file_in(folder) if folder else None
    meta = load_meta(folder) if folder and not path else None
    if path:
        codec = codec_named(path)
    elif meta is None:
        lacking = f": {os.path.join(folder, 'meta.pkl')} is not in this folder" if folder else ""
        _must_fit(GPT2, GPT2_SYMBOLS, vocab_size, MOST_PADDING, lacking)  # before tiktoken downloads its tables
        codec = codec_named("gpt2")
    elif isinstance(meta.get("tokenizer"), str) and not {"stoi", "itos"} & set(meta):
        codec = _of_tiktoken(meta["tokenizer"])
    else:
        codec = _of_symbols(folder, meta)
    _must_fit(codec.name, codec.symbols, vocab_size, most)
    return codec


def _must_fit(name, symbols, vocab_size, most, lacking=""):
    if vocab_size is not None and not symbols <= vocab_size < symbols + most:
        raise UsageError(
            f"the model has a vocabulary of {vocab_size:,}, and {name} has {symbols:,} symbols{lacking}; start in the "
            "folder whose data/ has the meta.pkl or the tokenizer that the model was trained with"
        )


def codec_named(name):
    """The Codec of a Hugging Face tokenizer.json, a SentencePiece .model, a folder with one, or one of tiktoken's."""
    if os.path.isdir(name):
        path = _file_in(name)
        if path is None:
            raise UsageError(f"the folder {name} has neither a tokenizer.json nor a tokenizer.model")
        name = path
    kind = os.path.splitext(name)[1]
    return {".json": _of_tokenizers, ".model": _of_sentencepiece}.get(kind, _of_tiktoken)(name)


def _file_in(folder):
    """The path of a tokenizer's file in a folder, or None."""
    paths = (os.path.join(folder, name) for name in TOKENIZER_FILES)
    return next(filter(os.path.isfile, paths), None)


def _of_tiktoken(name):
    with usage_errors(ImportError, prefix=f"{name} needs a package: pip install tiktoken. "):
        import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise UsageError(
            f"there is no tokenizer {name!r}: expected a tokenizer.json, a SentencePiece .model, or one of tiktoken's, "
            f"{', '.join(tiktoken.list_encoding_names())}"
        )
    try:
        bpe = tiktoken.get_encoding(name)  # downloads its tables once
    except Exception as e:  # requests' errors, which tiktoken passes on
        why = type(e).__name__
        what = f"GPT-2's BPE can't be fetched ({why})" if name == "gpt2" else f"{name} can't be fetched ({why})"
        raise UsageError(
            f"{what}: connect to the network once, or set TIKTOKEN_CACHE_DIR to a folder in which tiktoken has kept it"
        ) from e

    def bytes_of(i):
        try:
            return bpe.decode_single_token_bytes(i)
        except KeyError:
            return b""

    return Codec(
        name=GPT2 if name == "gpt2" else name,
        symbols=bpe.n_vocab,
        encode=lambda text: bpe.encode(text, allowed_special="all"),
        encode_ordinary=bpe.encode_ordinary,
        decode=lambda ids: b"".join(map(bytes_of, ids)).decode("utf-8", errors="replace"),
        end=bpe.eot_token if END_OF_TEXT in bpe.special_tokens_set else None,
        by=bpe,
    )


def _of_tokenizers(path):
    with usage_errors(ImportError, prefix=f"{path} needs a package: pip install tokenizers. "):
        from tokenizers import Tokenizer

    def encode_by(tokenizer, text):
        with usage_errors(Exception, prefix=f"the text has what {path} has no symbol for: "):
            return tokenizer.encode(text, add_special_tokens=False).ids

    with usage_errors(Exception, prefix=f"{path} can't be read, it is damaged or not a tokenizer: "):
        text = Path(path).read_text(encoding="utf-8")
        tokenizer, ordinary = Tokenizer.from_str(text), Tokenizer.from_str(text)
    for one in (tokenizer, ordinary):
        one.no_truncation()
        one.no_padding()
    ordinary.encode_special_tokens = True  # as ordinary text
    vocabulary = tokenizer.get_vocab()
    return Codec(
        name=path,
        symbols=max(vocabulary.values()) + 1,
        encode=lambda text: encode_by(tokenizer, text),
        encode_ordinary=lambda text: encode_by(ordinary, text),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        end=next((vocabulary[end] for end in ENDS if end in vocabulary), None),
        by=tokenizer,
    )


def _of_sentencepiece(path):
    with usage_errors(ImportError, prefix=f"{path} needs a package: pip install sentencepiece. "):
        from sentencepiece import SentencePieceProcessor
    with usage_errors(Exception, prefix=f"{path} can't be read, it is damaged or no SentencePiece model: "):
        model = SentencePieceProcessor(model_file=path)
    end, symbols = model.eos_id(), model.get_piece_size()
    end_text = model.id_to_piece(end) if end >= 0 else None  # SentencePiece neither encodes nor decodes it

    def encode(text):
        first, *others = map(model.encode, text.split(end_text) if end_text else [text])
        return [*first, *(i for ids in others for i in (end, *ids))]

    def decode(ids):
        texts = [[]]
        for i in ids:
            if i == end:
                texts.append([])
            elif i < symbols:
                texts[-1].append(i)
        return (end_text or "").join(map(model.decode, texts))

    return Codec(path, symbols, encode, model.encode, decode, end if end >= 0 else None, model)


def _of_symbols(folder, meta):
    """The Codec of stoi, {symbol: id}, and itos, {id: symbol} or a list. Either is made from the other.

    They may hold more, such as None for padding or an id that the model lacks. Those can't be drawn as text.
    """
    name, vocab_size = os.path.join(folder, "meta.pkl"), meta["vocab_size"]
    stoi, itos = (meta.get(table) or {} for table in ("stoi", "itos"))
    if not stoi and not itos:
        raise UsageError(f"{name} has neither stoi nor itos: training needs neither, but text does; add one of them")
    try:
        itos = itos if isinstance(itos, dict) else dict(enumerate(itos))
        itos = itos or {i: symbol for symbol, i in stoi.items()}
        itos = {index(i): s for i, s in itos.items() if isinstance(s, str) and 0 <= i < vocab_size}
        stoi = {s: index(i) for s, i in stoi.items() if s and isinstance(s, str) and 0 <= i < vocab_size}
        stoi = stoi or {s: i for i, s in itos.items() if s}
    except (TypeError, AttributeError):
        stoi = {}
    if not stoi:
        raise UsageError(
            f"{name}: stoi must give the id of each symbol, a whole number from 0 to vocab_size - 1, and itos the "
            "symbol of each id, a string: prepare the data again"
        )

    encode = partial(_encode, stoi=stoi, name=name)
    decode = lambda ids: "".join(itos.get(i, "") for i in ids)  # noqa: E731
    return Codec(name, vocab_size, encode, encode, decode, stoi.get(END_OF_TEXT), (stoi, itos))


def _encode(text, stoi, name):
    """The ids of a text: at each place the longest symbol that fits."""
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
        lacks = ", ".join(map(repr, sorted(unknown)[:20]))
        raise UsageError(f"the {len(stoi)} symbols of {name} lack {lacks}: use only {''.join(stoi)[:300]!r}")
    return ids
