"""A trained GPT as a folder that transformers opens without this project: its GPT-2, a tokenizer, a model card."""

import itertools
import json
import os

import torch

from nanofit.codec import END_OF_TEXT, codec_of, gpt2_bpe, load_meta, symbols_of
from nanofit.errors import UsageError, first_line, usage_errors
from nanofit.files import whole_or_not_at_all
from nanofit.tools.weights import activation_of, figures_of

# GPT-2 was released with Conv1D layers, which keep their weights transposed.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CAUSAL_MASK = ".attn.bias"  # which nanoGPT's checkpoints list among the weights where torch was old
MOST_PADDING = 1024  # a vocabulary that is larger by so many symbols is not padded, it is another one
CLOSE = 1e-4  # logits that differ by less, beside the largest of them, differ by rounding
NOT_FOR_OTHERS = ("out_dir", "device", "backend", "init_from")  # keys that tell of the machine that trained


def require_transformers():
    """The module, or a UsageError that tells how to get it."""
    with usage_errors(ImportError, prefix="Hugging Face folders need transformers: pip install transformers. "):
        import transformers
    return transformers


# ---- symbols -----------------------------------------------------------------------------------------------


def tokenizer_of(data_dir):
    """The symbols of codec_of(data_dir) as a tokenizers.Tokenizer: a data set's characters, or GPT-2's BPE."""
    meta = load_meta(data_dir) if data_dir else None
    if meta is None:
        return _bpe_tokenizer()
    stoi, itos = symbols_of(data_dir)
    if {symbol: i for i, symbol in itos.items()} != stoi:
        raise UsageError(
            f"{data_dir}/meta.pkl: stoi and itos are not each other's inverse, which no tokenizer can express: "
            "prepare the data again"
        )
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(stoi, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # each character
    tokenizer.decoder = decoders.Fuse()  # without spaces between them
    return tokenizer


def _bpe_tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    bpe = gpt2_bpe()
    ranks = {bpe.decode_single_token_bytes(i): i for i in range(bpe.n_vocab) if i != bpe.eot_token}
    # tokenizers spells bytes in letters: those that can't be printed, in order, by the ones from chr(256) on.
    others = iter(range(256, 512))
    letter = {b: chr(b) if chr(b).isprintable() and b != ord(" ") else chr(next(others)) for b in range(256)}

    def spelled(token):
        return "".join(map(letter.get, token))

    merges = [tuple(map(spelled, _parts(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    tokenizer = Tokenizer(models.BPE({spelled(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return tokenizer


def _parts(token, ranks):
    """The two tokens that a token of GPT-2's BPE is merged from: its bytes, merged by rank until two are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def codec_of_folder(folder, vocab_size=None):
    """(encode, decode, name) by a Hugging Face folder's tokenizer.json, as codec_of; GPT-2's BPE where it has none."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        return codec_of(None, vocab_size)
    with usage_errors(ImportError, prefix=f"{path} needs a package: pip install tokenizers. "):
        from tokenizers import Tokenizer
    with usage_errors(Exception, prefix=f"{path} can't be read, it is damaged or not a tokenizer: "):
        tokenizer = Tokenizer.from_file(path)

    def encode(text):
        with usage_errors(Exception, prefix=f"the prompt has what {path} has no symbol for: "):
            return tokenizer.encode(text, add_special_tokens=False).ids

    return encode, lambda ids: tokenizer.decode(ids, skip_special_tokens=False), path


# ---- weights -----------------------------------------------------------------------------------------------


def gpt2_weights(model, vocab_size):
    """(weights, tied): a model's weights as transformers' GPT-2 names and shapes them, cut to so many symbols.

    tied: whether the head is the token embedding. Biases are zeros where the model has none.

    Raises UsageError where the weights are not of GPT-2's shape.
    """
    c = model.config
    T, C, V = c.block_size, c.n_embd, c.vocab_size
    block = {
        "ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
        "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C),
    }  # fmt: skip
    shapes = {f"h.{i}.{name}": shape for i in range(c.n_layer) for name, shape in block.items()}
    shapes = {"wte": (V, C), "wpe": (T, C), **shapes, "ln_f": (C,)}
    ours = {name.removeprefix("transformer."): w for name, w in model.state_dict().items()}
    ours = {name: w for name, w in ours.items() if not name.endswith(CAUSAL_MASK)}
    head = ours.pop("lm_head.weight", None)
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = _taken(ours, f"{name}.weight", shape)
        if name not in ("wte", "wpe"):
            has_bias = f"{name}.bias" in ours
            weights[f"{name}.bias"] = _taken(ours, f"{name}.bias", shape[:1]) if has_bias else torch.zeros(shape[0])
    if ours:
        raise _not_gpt2(f"it has {len(ours)} weights that GPT-2 hasn't: {', '.join(list(ours)[:3])}, ...")
    tied = head is None or torch.equal(head, weights["wte.weight"])
    if not tied:
        weights["lm_head.weight"] = head
    for name, w in weights.items():
        if name in ("wte.weight", "lm_head.weight"):
            w = w[:vocab_size]
        weights[name] = (w.t() if name.endswith(CONV1D) else w).detach().float().contiguous()
    prefixed = {name if name.startswith("lm_head") else f"transformer.{name}": w for name, w in weights.items()}
    return prefixed, tied


def _taken(weights, name, shape):
    if name not in weights:
        raise _not_gpt2(f"it has no {name}")
    if weights[name].shape != shape:
        raise _not_gpt2(f"its {name} has the shape {tuple(weights[name].shape)}, and GPT-2's would have {shape}")
    return weights.pop(name)


def _not_gpt2(what):
    return UsageError(f"this model is no GPT-2, and transformers' GPT-2 can't express it: {what}")


def check_vocabulary(model, tokenizer, data_dir):
    """The number of the tokenizer's symbols; a UsageError where they are not the model's, with padding or without."""
    symbols = max(tokenizer.get_vocab().values()) + 1
    if not symbols <= model.config.vocab_size < symbols + MOST_PADDING:
        path = os.path.join(data_dir or "data/...", "meta.pkl")
        source = path if os.path.exists(path) else f"GPT-2's BPE, which is taken where there is no {path},"
        raise UsageError(
            f"the model has a vocabulary of {model.config.vocab_size} and {source} has {symbols} symbols: bring the "
            "meta.pkl of the data set that the model was trained with"
        )
    return symbols


# ---- the folder --------------------------------------------------------------------------------------------


def export(model, saved, folder, title, data_dir, keep_padding):
    """Write a model to a new folder for transformers, read it back, and compare the two.

    saved: its checkpoint, for the figures of the model card. title: what the card calls it. data_dir: the data set that
    it was trained with, for its symbols; None for GPT-2's BPE. Returns the largest difference of a logit. It takes the
    memory of three models. Raises UsageError where transformers' GPT-2 can't express the model.
    """
    require_transformers()
    import safetensors.torch

    tokenizer = tokenizer_of(data_dir)
    symbols = check_vocabulary(model, tokenizer, data_dir)
    vocab_size = model.config.vocab_size if keep_padding else symbols
    weights, tied = gpt2_weights(model, vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = {"bos_token_id": end, "eos_token_id": end}
    special = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")} if end is not None else {}
    c = model.config
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": activation_of(model) or "gelu",
        "vocab_size": vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), getattr(c, "dropout", 0.0)),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        **ids,
    }
    jsons = {
        "config.json": config,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": c.block_size,
            "clean_up_tokenization_spaces": False,
            **special,
        },
        # As sample.py draws, until there are as many tokens as the model has positions.
        "generation_config.json": {
            "do_sample": True, "temperature": 0.8, "top_k": 200, "max_length": c.block_size, **ids,
        },
    }  # fmt: skip
    texts = {file: json.dumps(value, indent=2) + "\n" for file, value in jsons.items()}
    texts["tokenizer.json"] = tokenizer.to_str(pretty=True)
    texts["README.md"] = model_card(
        model, saved, title, prompt=tokenizer.decode([0]) if end is None else "Once upon a time"
    )
    with whole_or_not_at_all(folder) as part:
        os.mkdir(part)
        for file, text in texts.items():
            with open(os.path.join(part, file), "w", encoding="utf-8") as f:
                f.write(text)
        with usage_errors(safetensors.SafetensorError, prefix=f"{folder} can't be written: "):
            safetensors.torch.save_file(weights, os.path.join(part, "model.safetensors"), {"format": "pt"})
        weights = None  # before there is another model
        return compare(model, part)


@torch.no_grad()
def compare(model, folder):
    """The largest difference between a logit of model and of what transformers makes of folder, over block_size tokens.

    Raises UsageError where it is more than rounding.
    """
    transformers = require_transformers()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    V, T = theirs.config.vocab_size, theirs.config.n_positions
    idx = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
    expected = model.eval()(idx, idx)[0][..., :V].float()  # (1, T, V)
    difference = (theirs(idx).logits - expected).abs().max().item()
    if not difference <= CLOSE * max(1.0, expected.abs().max().item()):
        raise _not_gpt2(f"with GPT-2's weights it computes something else (logits differ by {difference:.2g})")
    return difference


def model_card(model, saved, title, prompt):
    """README.md of the folder: how to use it, and the figures of the run."""
    c, config, figures = model.config, saved.get("config", {}), figures_of(saved)
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "layers, heads, width": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
        "positions": f"{c.block_size:,}",
        "data set": config.get("dataset", "not recorded"),
        "iteration": f"{figures['iter_num']:,}" if "iter_num" in figures else "not recorded",
        "validation loss": f"{figures['best_val_loss']:.4f}" if "best_val_loss" in figures else "not recorded",
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    shown = {k: v for k, v in config.items() if k not in NOT_FOR_OTHERS and not k.startswith("wandb")}
    keys = "\n".join(f"{key} = {value!r}" for key, value in shown.items())
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
    except Exception as e:  # its own errors, and those of the HTTP library that it uses
        raise UsageError(
            f"push_to={name!r} failed ({first_line(e)}): expected 'user/name' on the Hugging Face hub, and a token "
            "that may write there: hf auth login"
        ) from e
    return url
