"""Export a trained GPT as a folder for transformers: its GPT-2, a tokenizer, a model card."""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import shutil
from pathlib import Path

import torch

from nanofit.codec import MOST_PADDING, TOKENIZER_FILES, codec_of
from nanofit.errors import UsageError, first_line, usage_errors
from nanofit.files import whole_or_not_at_all
from nanofit.models import activation_of

PROBE = "Hello  world's 12345 (x)=y;//\n\n\tÀÉé 日本語 🙂\r\n  YOU'LL end \n "  # every rule of the patterns cuts it
CLOSE = 1e-4  # largest difference of logits, relative to the largest logit, that is rounding
NOT_GPT2 = "this model is no GPT-2, and transformers' GPT-2 can't express it: "


# ---- symbols -----------------------------------------------------------------------------------------------


def tokenizer_of(codec):
    """The tokenizers.Tokenizer for a Codec that isn't a file. UsageError if that library can't express it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if isinstance(codec.by, tuple):
        stoi, itos = codec.by
        if {symbol: i for i, symbol in itos.items()} != stoi:
            raise UsageError(
                f"{codec.name}: stoi and itos are not each other's inverse, which no tokenizer can express: prepare "
                "the data again"
            )
        longest_first = sorted((symbol for symbol in stoi if len(symbol) > 1), key=len, reverse=True)
        tokenizer = Tokenizer(models.WordLevel(stoi, unk_token=""))
        symbols = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(symbols), "isolated")
        tokenizer.decoder = decoders.Fuse()  # without spaces between symbols
        return tokenizer
    bpe = codec.by
    special = {text: bpe.encode_single_token(text) for text in bpe.special_tokens_set}
    vocabulary, merges = _vocabulary_and_merges(bpe)
    tokenizer = Tokenizer(models.BPE({**vocabulary, **special}, merges, ignore_merges=True))
    # {1,3}+ is a possessive quantifier to tiktoken, and two quantifiers to this library.
    pattern = Regex(re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", bpe._pat_str))
    by_words, by_bytes = pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_words, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in sorted(special, key=special.get)])
    if tokenizer.encode(PROBE).ids != codec.encode_ordinary(PROBE):
        raise UsageError(f"tokenizers, Hugging Face's library, can't express {codec.name}: it cuts words otherwise")
    return tokenizer


def _vocabulary_and_merges(bpe):
    """({token: id}, merges) of a tiktoken.Encoding for the tokenizers library. tiktoken keeps only the ranks."""
    ranks = {token: bpe.encode_single_token(token) for token in bpe.token_byte_values()}
    # tokenizers writes bytes as letters; for those that can't be printed, it uses chr(256) and the following ones.
    others = iter(range(256, 512))
    letter = {b: chr(b) if chr(b).isprintable() and b != ord(" ") else chr(next(others)) for b in range(256)}
    spelled = {token: "".join(map(letter.get, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # merge by rank until two parts are left: those the token is merged from
            pairs = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
            if (rank := min(pairs)) == math.inf:
                break
            i = pairs.index(rank)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    return {spelled[token]: rank for token, rank in ranks.items()}, merges


def ends_of(folder, decode):
    """The texts of the tokens that end a text, by a Hugging Face folder's generation_config.json."""
    from transformers import GenerationConfig

    if not os.path.isfile(os.path.join(folder, "generation_config.json")):
        return []
    ids = GenerationConfig.from_pretrained(folder).eos_token_id
    return [text for i in (ids if isinstance(ids, list) else [ids]) if i is not None and (text := decode([i]))]


def write_tokenizer(codec, folder, block_size):
    """Write a Codec's tokenizer to a folder for transformers: its own file, or a new tokenizer.json."""
    kept = os.path.join(folder, "tokenizer" + os.path.splitext(codec.name)[1])
    if os.path.basename(kept) in TOKENIZER_FILES:
        shutil.copyfile(codec.name, kept)
    else:
        text = tokenizer_of(codec).to_str(pretty=True)
        Path(folder, "tokenizer.json").write_text(text, encoding="utf-8")
    if kept.endswith(".model"):
        print("tokenizer.model is copied: sample.py reads it; to transformers, name the class that it was made for")
        return
    end = codec.decode([codec.end]) if codec.end is not None else None
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        **({f"{kind}_token": end for kind in ("bos", "eos", "unk")} if end else {}),
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


# ---- the folder --------------------------------------------------------------------------------------------


def as_gpt2(model, vocab_size, end):
    """transformers' GPT-2 with a model's weights, cut to vocab_size symbols. end: the id of the end of a text, or None.

    Missing biases become zeros. Raises UsageError if the weights don't have GPT-2's shapes.
    """
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    weights = {name: w for name, w in model.state_dict().items() if not name.endswith(".attn.bias")}  # a causal mask
    for name in weights.keys() & {"transformer.wte.weight", "lm_head.weight"}:
        weights[name] = weights[name][:vocab_size]
    table, c = weights.get("transformer.wte.weight"), model.config
    head = weights.setdefault("lm_head.weight", table)
    ids = {"bos_token_id": end, "eos_token_id": end}
    config = GPT2Config(
        activation_function=activation_of(model) or "gelu",
        vocab_size=vocab_size,
        n_positions=c.block_size,
        n_ctx=c.block_size,  # for llama.cpp
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), getattr(c, "dropout", 0.0)),
        tie_word_embeddings=table is None or torch.equal(head, table),
        **ids,
    )
    theirs = GPT2LMHeadModel(config)
    # As sample.py draws, up to as many tokens as the model has positions.
    theirs.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=200, max_length=c.block_size, **ids
    )
    for name, part in theirs.named_modules():
        if isinstance(part, Conv1D) and f"{name}.weight" in weights:
            weights[f"{name}.weight"] = weights[f"{name}.weight"].t()  # Conv1D keeps it transposed
    zeros = {name: torch.zeros_like(w) for name, w in theirs.state_dict().items() if name.endswith(".bias")}
    try:
        theirs.load_state_dict({**zeros, **weights})
    except RuntimeError as e:  # torch lists everything that differs, one line each
        raise UsageError(NOT_GPT2 + str(e).splitlines()[1:][0].strip()[:200]) from e
    return theirs.eval()


@contextlib.contextmanager
def without_warnings():
    """Leave out what libraries warn of: transformers imports others, such as torchao, which tell what they lack."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@without_warnings()
def export(model, saved, folder, title, data_dir, keep_padding):
    """Write a model to a new folder for transformers, read it back, and compare the two.

    saved: its checkpoint, for the model card. title: the card's title. data_dir: the data set with its tokenizer; None
    for GPT-2's BPE. Returns the largest difference of a logit. It takes the memory of three models. Raises UsageError
    if transformers' GPT-2 can't express the model.
    """
    with usage_errors(ImportError, prefix="Hugging Face folders need transformers: pip install transformers. "):
        import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    codec = codec_of(data_dir, model.config.vocab_size, MOST_PADDING)
    prompt = codec.decode([0]) if isinstance(codec.by, tuple) else "Once upon a time"
    with whole_or_not_at_all(folder) as part:
        os.mkdir(part)
        write_tokenizer(codec, part, model.config.block_size)
        # In the folder itself: safetensors needs a UTF-8 path.
        with contextlib.chdir(part), usage_errors(SafetensorError, prefix=f"{folder} can't be written: "):
            Path("README.md").write_text(model_card(model, saved, title, prompt), encoding="utf-8", errors="replace")
            vocab_size = model.config.vocab_size if keep_padding else codec.symbols
            as_gpt2(model, vocab_size, codec.end).save_pretrained(".")
            return compare(model, transformers.AutoModelForCausalLM.from_pretrained(".").eval())


@torch.no_grad()
def compare(model, theirs):
    """The largest difference between a model's logits and those of transformers', over block_size tokens.

    Raises UsageError if it is more than rounding.
    """
    V, T = theirs.config.vocab_size, theirs.config.n_positions
    idx = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
    expected = model.eval()(idx, idx)[0][..., :V].float()  # (1, T, V)
    difference = (theirs(idx).logits - expected).abs().max().item()
    if not difference <= CLOSE * max(1.0, expected.abs().max().item()):
        raise UsageError(
            f"{NOT_GPT2}with GPT-2's weights it computes something else (logits differ by {difference:.2g})"
        )
    return difference


def model_card(model, saved, title, prompt):
    """The folder's README.md: how to use the model, and the figures of the run."""
    c, config, loss = model.config, saved["config"], saved.get("best_val_loss", 1e9)
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "layers, heads, width": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
        "positions": f"{c.block_size:,}",
        "data set": config.get("dataset", "not recorded"),
        "iteration": saved.get("iter_num", "not recorded"),
        "validation loss": f"{loss:.4f}" if loss < 1e9 else "not recorded",  # 1e9: none yet
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    keys = "\n".join(f"{key} = {value!r}" for key, value in config.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, nanogpt]
---

# {title}

A GPT-2 that was trained from nanoGPT's recipe.

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{title}")
print(generate({prompt!r})[0]["generated_text"])
```

| | |
|---|---|
{table}

The run's configuration:

```python
{keys}
```
"""


def push(folder, name):
    """Upload a folder to the Hugging Face hub as the model 'user/name'; returns its address."""
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="A GPT-2")
    except Exception as e:  # the hub's own errors, and those of its HTTP library
        raise UsageError(
            f"push_to={name!r} failed ({first_line(e)}): expected 'user/name' on the Hugging Face hub, and a token "
            "that may write there: hf auth login"
        ) from e
    return url
