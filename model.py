"""GPT-2's architecture, as nanoGPT spells it, in one file that needs torch alone.

It can be copied by itself into a nanoGPT checkout. Names of modules are those of GPT-2's weights
(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), so that checkpoints travel.

Shapes: B sequences, T tokens of each, C = n_embd, nh = n_head, hs = C // nh, V = vocab_size.
"""

import functools
import json
import math
import os
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

LOSS_CHUNK_BYTES = 128 * 2**20  # of logits in float32: what training holds of them at a time, see head_loss
LOSS_CHUNKS = 32  # at most: torch.compile unrolls them, and so many hold little of a batch already
ADDED_ROWS = 4096  # of a product that is added to a matrix of another dtype: what exists of it at a time
SOFTMAX_BYTES = 32 * 2**20  # of probabilities in float32: what eager training holds of them at a time
A100_FLOPS = 312e12  # dense bfloat16, NVIDIA A100 data sheet

PRETRAINED = {  # name on the Hugging Face hub: the sizes that OpenAI released
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


@dataclass
class GPTConfig:
    """Sizes of a GPT. Raises ValueError where they can't make a model."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64: faster matrix products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has; False is a little faster and no worse

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            # The two numbers of heads that come nearest and fit.
            small = [n for n in range(1, math.isqrt(self.n_embd) + 1) if self.n_embd % n == 0]
            fits = {*small, *(self.n_embd // n for n in small)}
            nearest = sorted(sorted(fits, key=lambda n: (abs(n - self.n_head), -n))[:2])
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: each head takes an equal "
                f"share; set n_head to {' or '.join(map(str, nearest))}, or n_embd to a multiple of {self.n_head}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def product_dtype(tensor):
    """The dtype in which matrix products with this tensor run: autocast's where that is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class KeyValueCache:
    """Keys and values of the positions that a model has seen, so that generating doesn't compute them again."""

    def __init__(self, config, batch_size, positions, device, dtype):
        """Room for so many positions."""
        shape = config.n_layer, 2, batch_size, config.n_head, positions, config.n_embd // config.n_head
        self.keys_values = torch.empty(shape, device=device, dtype=dtype)
        self.seen = 0  # positions that are filled


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cached=None, seen=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, nh, T, hs)
        causal = True
        if cached is not None:  # (2, B, nh, positions, hs), of which so many are seen
            cached[0, :, :, seen : seen + T] = k
            cached[1, :, :, seen : seen + T] = v
            k, v = cached[:, :, :, : seen + T].unbind(0)  # each (B, nh, seen + T, hs)
            if seen:
                causal = False  # T is 1, which may see all before it
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=causal
        )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cached=None, seen=0):
        x = x + self.attn(self.ln_1(x), cached, seen)
        x = x + self.mlp(self.ln_2(x))
        return x


@functools.cache
def cuda_adds_products(dtype):
    """Whether CUDA adds a product of matrices of this dtype to a float32 matrix, as torch can from 2.8 on."""
    a, total = torch.ones(16, 16, device="cuda", dtype=dtype), torch.ones(16, 16, device="cuda")
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return True


@torch.library.custom_op("nanofit::add_product", mutates_args={"total"})
def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, without a second tensor of total's size.

    torch.compile doesn't look into it: it would add all chunks' products at the end, and keep them until then.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and cuda_adds_products(a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for rows, of_rows in zip(total.split(ADDED_ROWS), a.split(ADDED_ROWS), strict=True):
            rows += of_rows @ b


def softmax_less_one_hot(logits, target, exact, lift, with_gradients):
    """What a chunk's loss and gradients are made of.

    logits: (rows, V), which may be overwritten. target: int64 (rows, 1). Returns the targets' log-probabilities in
    the dtype exact, (rows, 1), and lift * (softmax - one-hot) in the logits' dtype, (rows, V), if with_gradients.
    """
    if torch.compiler.is_compiling():  # one kernel reads the logits, one more reads them and writes the gradient
        x = logits.to(exact)
        is_target = torch.arange(x.shape[1], device=x.device) == target  # (rows, V)
        log_sum = x.logsumexp(-1, keepdim=True)
        log_p = torch.where(is_target, x, 0.0).sum(-1, keepdim=True) - log_sum
        return log_p, (lift * (torch.exp(x - log_sum) - is_target.to(exact))).to(logits.dtype)
    rows = max(1, SOFTMAX_BYTES // (4 * logits.shape[1]))
    found = []
    for part, at in zip(logits.split(rows), target.split(rows), strict=True):
        log_p = torch.log_softmax(part, dim=-1, dtype=exact)
        found.append(log_p.gather(1, at))
        if with_gradients:
            if lift != 1.0:
                log_p += math.log(lift)
            torch.exp(log_p, out=part)
            part.scatter_(1, at, (lift * torch.expm1(found[-1])).to(part.dtype))
        del log_p  # before there is the next
    return torch.cat(found), logits


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the logits h @ weight.T, of which only a chunk of rows exists at a time.

    A chunk's gradients are computed at once, while its logits are there, and take their place: three matrix products
    in all, as without chunks, and nothing is computed twice. The backward pass only scales them. Use head_loss.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, rows, dtype, with_gradients):
        exact = torch.promote_types(dtype, torch.float32)
        # float16 would lose most of softmax: it is as small as 1/V. So that is lifted, and h lowered, by powers of two,
        # which cost no precision, as far as a sum over a chunk's rows can't overflow.
        lift, lower = 1.0, 1.0
        if dtype == torch.float16:
            lift, lower = 2.0 ** min(10, 17 - math.ceil(math.log2(rows))), 2.0**-7
        counts = (targets != -1).unsqueeze(1)  # (N, 1)
        target = targets.clamp(min=0).unsqueeze(1)  # (N, 1)
        x = torch.where(counts, h.to(dtype), 0.0)  # (N, C)
        w = weight.to(dtype)  # (V, C)
        log_p, grad_h, grad_weight = [], [], None  # the lists by chunks
        for start in range(0, len(h), rows):
            chunk = slice(start, start + rows)
            logits = x[chunk] @ w.t()  # (rows, V)
            of_chunk, g = softmax_less_one_hot(logits, target[chunk], exact, lift, with_gradients)
            log_p.append(of_chunk)
            if with_gradients:
                grad_h.append(g @ w)
                lowered = x[chunk] if lower == 1.0 else x[chunk] * lower
                if grad_weight is not None:
                    add_product(grad_weight, g.t(), lowered)
                else:
                    grad_weight = g.t() @ lowered  # (V, C)
                    if rows < len(h):
                        grad_weight = grad_weight.to(exact)  # others will be added
            del logits, g  # before there are the next
        count = counts.sum()
        if with_gradients:
            ctx.save_for_backward(torch.cat(grad_h), grad_weight, counts, count)
            ctx.lift, ctx.lower, ctx.dtypes = lift, lower, (h.dtype, weight.dtype)
        # nan where nothing counts, as F.cross_entropy: 0 / 0
        return (torch.where(counts, torch.cat(log_p), 0.0) / -count).sum()

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_weight, counts, count = ctx.saved_tensors
        scale = torch.where(count > 0, grad / count, 0.0) / ctx.lift
        h_dtype, weight_dtype = ctx.dtypes
        grad_h = grad_h.to(scale.dtype) * torch.where(counts, scale, 0.0)
        # In place where nothing is converted: torch refuses a second backward pass, which would find it changed.
        grad_weight = grad_weight.to(scale.dtype).mul_(scale / ctx.lower)
        return grad_h.to(h_dtype), grad_weight.to(weight_dtype), *[None] * 4


def head_loss(h, weight, targets, chunk_bytes=None):
    """Mean cross-entropy in nats of predicting targets from h by a linear head, without holding the logits.

    h: (N, C). weight: (V, C). targets: int64 (N,), -1 where no loss is wanted. A scalar in float32 or better. Under
    autocast, products run in its dtype. chunk_bytes (0 or None: LOSS_CHUNK_BYTES): of logits, were they float32, that
    may exist at a time; where that is less, 1/LOSS_CHUNKS of all. The more, the faster.
    """
    logits_bytes = 4 * len(h) * len(weight)
    chunks = min(LOSS_CHUNKS, math.ceil(logits_bytes / (chunk_bytes or LOSS_CHUNK_BYTES)))
    rows = math.ceil(len(h) / chunks)
    if rows > 128:
        rows = math.ceil(rows / 128) * 128  # whole tiles of a matrix product
    with_gradients = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return HeadLoss.apply(h, weight, targets, rows, product_dtype(h), with_gradients)


class GPT(nn.Module):
    """A decoder-only transformer whose output head shares the token embedding's weight."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.loss_chunk_mb = 0  # MiB of logits that exist at a time where they aren't returned; 0: LOSS_CHUNK_BYTES
        # The order in which modules are made and initialised is the order in which random numbers are
        # drawn: changing it changes the weights that a seed stands for.
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: Press & Wolf 2017, arXiv:1608.05859

        self.apply(self._init_weights)
        # GPT-2 scales what enters the residual stream, so that its variance doesn't grow with depth.
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        print(f"number of parameters: {self.get_num_params() / 1e6:.2f}M")

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding leaves out the position embedding.

        The token embedding always counts: it is the head's weight as well.
        """
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def forward(self, idx, targets=None, return_logits=True, cache=None):
        """Predict the token after each of idx.

        idx: int64 (B, T), T at most block_size. targets: int64 (B, T), -1 where no loss is wanted, or None.
        Returns (logits, loss): with targets, logits (B, T, V) and the mean cross-entropy in nats;
        without, logits (B, 1, V) of the last position alone, and None. return_logits=False: (None, loss), in a
        fraction of the memory. cache: a KeyValueCache; idx goes on from what it holds (one token at a time, or it is
        empty), and is added to it.
        """
        T = idx.shape[1]
        seen = cache.seen if cache else 0
        if self.config.block_size < seen + T:
            raise ValueError(
                f"a sequence of {seen + T} tokens is longer than the model's block_size {self.config.block_size}"
            )
        positions = self.transformer.wpe.weight[seen : seen + T]  # (T, C): a slice is cheaper than looking them up
        x = self.transformer.drop(self.transformer.wte(idx) + positions)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache.keys_values[i] if cache else None, seen)
        x = self.transformer.ln_f(x)
        if cache:
            cache.seen += T

        if targets is None:
            return self.lm_head(x[:, [-1], :]), None  # (B, 1, V)
        if not return_logits:
            chunk_bytes = self.loss_chunk_mb * 2**20
            return None, head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), chunk_bytes)
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def crop_block_size(self, block_size):
        """Shorten the longest sequence that the model takes, dropping the positions behind it."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size can be cropped to at most {self.config.block_size}, not {block_size}")
        self.config.block_size = block_size
        # A copy: a slice would keep the whole table alive, and in every checkpoint.
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """GPT-2 with weights that Hugging Face keeps; one tensor of them is in memory beside the model's own.

        model_type: a folder with the config.json and the weights of a GPT-2; or 'gpt2', 'gpt2-medium', 'gpt2-large',
        'gpt2-xl', which come from the hub once. A folder's activation is respected. The four names compute with the
        exact GELU as in nanoGPT, where OpenAI used its approximation by tanh. override_args: {'dropout': p} or nothing.
        Raises ValueError for what is not a GPT-2 or is damaged, OSError where a file can't be had, ImportError
        without safetensors.
        """
        override_args = override_args or {}
        if set(override_args) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden in a pretrained model, not {sorted(override_args)}")
        if model_type not in PRETRAINED and not os.path.isdir(model_type):
            raise ValueError(
                f"no pretrained model '{model_type}': expected one of {', '.join(PRETRAINED)}, or the path of "
                "a folder that holds a Hugging Face GPT-2"
            )
        print(f"loading weights from pretrained gpt: {model_type}")
        folder = _fetch(model_type) if model_type in PRETRAINED else model_type
        sizes, approximate = _read_config(os.path.join(folder, "config.json"))
        files = _weight_files(folder)
        _check_size(folder, sizes, files)
        model = cls(GPTConfig(**sizes, bias=True, **override_args))
        _copy_weights(model, folder, files)
        if model_type not in PRETRAINED:
            for block in model.transformer.h:
                block.mlp.gelu.approximate = approximate
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in two groups: tensors of two or more dimensions decay, biases and norms don't.

        device_type: 'cuda', 'cpu' or 'mps'.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        decay = [p for p in params if p.dim() >= 2]
        rest = [p for p in params if p.dim() < 2]
        print(f"num decayed parameter tensors: {len(decay)}, with {sum(p.numel() for p in decay):,} parameters")
        print(f"num non-decayed parameter tensors: {len(rest)}, with {sum(p.numel() for p in rest):,} parameters")
        groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        fused = device_type in ("cuda", "cpu")  # one pass over weights and state instead of a dozen
        print(f"using fused AdamW: {fused}")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOP/s utilisation: the model's arithmetic as a share of what an A100 can do.

        fwdbwd_per_iter: sequences of block_size tokens in dt seconds. Counted as in PaLM's appendix B
        (Chowdhery et al. 2022, arXiv:2204.02311): 6 FLOP a parameter and token, and attention.
        """
        c = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        return flops_per_token * c.block_size * fwdbwd_per_iter / dt / A100_FLOPS

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, on_token=lambda tokens: None):
        """Continue idx, int64 (B, T), by max_new_tokens sampled tokens; returns (B, T + max_new_tokens).

        temperature above 0 divides the logits; top_k keeps only the k likeliest tokens. on_token is given each new
        token of the sequences, int64 (B, 1), as soon as it is drawn. Call model.eval() first. Only the last
        block_size tokens are seen. Up to block_size, each token is computed once; beyond it all of them take new
        positions with each new token, and are computed again.
        """
        block_size = self.config.block_size
        positions = min(block_size, idx.shape[1] + max_new_tokens)
        dtype = product_dtype(self.transformer.wte.weight)
        cache = KeyValueCache(self.config, idx.shape[0], positions, idx.device, dtype)
        for _ in range(max_new_tokens):
            if idx.shape[1] > block_size:
                logits, _ = self(idx[:, -block_size:])
            else:
                logits, _ = self(idx[:, cache.seen :], cache=cache)
            logits = logits[:, -1, :] / temperature  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            probs = F.softmax(logits, dim=-1)
            drawn = torch.multinomial(probs, num_samples=1)  # (B, 1)
            on_token(drawn)
            idx = torch.cat((idx, drawn), dim=1)
        return idx


# ---- Hugging Face's folders, for GPT.from_pretrained -------------------------------------------------------

# GPT-2 was released with Conv1D layers, which keep their weights transposed.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CAUSAL_MASK = (".attn.bias", ".attn.masked_bias")  # which some versions list among the weights
ACTIVATIONS = {  # by the names of transformers: what nn.GELU calls them
    "gelu": "none", "gelu_python": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh",
}  # fmt: skip
WEIGHTS = "model.safetensors", "pytorch_model.bin"


def _fetch(name):
    """The folder that holds one of OpenAI's models, downloaded unless it has been."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ImportError(f"'{name}' is fetched by huggingface_hub: pip install huggingface_hub safetensors") from e
    try:
        return snapshot_download(name, allow_patterns=["config.json", WEIGHTS[0]])
    except Exception as e:  # its own errors, and those of the HTTP library that it uses
        first_line = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise OSError(
            f"the weights of '{name}' can't be had ({first_line}): they come from the Hugging Face hub once; without "
            "a network, name a folder that holds them"
        ) from e


def _read_json(path):
    """The dict in a file."""
    if not os.path.isfile(path):
        raise OSError(f"there is no {path}: expected a folder that holds a Hugging Face GPT-2")
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: it can't be read as JSON ({e})") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: expected a dict of keys")
    return value


def _read_config(path):
    """(sizes for GPTConfig, what nn.GELU calls the activation) of a config.json, if GPT can compute what it says."""
    theirs = _read_json(path)
    sizes = {}
    for ours, key in [("block_size", "n_positions"), *((k, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd"))]:
        sizes[ours] = theirs.get(key)
        if type(sizes[ours]) is not int or not 1 <= sizes[ours] < 2**31:
            raise ValueError(f"{path}: {key} must be a whole number from 1 to 2**31, as in every GPT-2")
    possible = {  # the first is what transformers takes where a key isn't there
        "activation_function": ("gelu_new", *ACTIVATIONS),
        "n_inner": (None, 4 * sizes["n_embd"]),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    if theirs.get("model_type") != "gpt2":
        raise ValueError(f"{path}: only a GPT-2 can be read, and its model_type is not 'gpt2'")
    if sizes["n_embd"] % sizes["n_head"]:
        raise ValueError(f"{path}: n_embd={sizes['n_embd']} is not divisible by n_head={sizes['n_head']}")
    for key, values in possible.items():
        if theirs.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key} must be {' or '.join(map(repr, dict.fromkeys(values)))} in a GPT-2")
    return sizes, ACTIVATIONS[theirs.get("activation_function", "gelu_new")]


def _weight_files(folder):
    """The paths of a folder's weights: one file, or the shards that an index lists."""
    for name in WEIGHTS:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return [path]
        index = path + ".index.json"
        if os.path.isfile(index):
            places = _read_json(index).get("weight_map")
            shards = set(places.values()) if isinstance(places, dict) and all(map(_is_name, places.values())) else ()
            if not shards:
                raise ValueError(f"{index} is damaged: weight_map must give the file in this folder for each weight")
            paths = [os.path.join(folder, shard) for shard in sorted(shards)]
            if missing := [path for path in paths if not os.path.isfile(path)]:
                raise OSError(f"there is no {missing[0]}, which {index} lists: copy the folder again")
            return paths
    raise OSError(f"{folder} has no weights: expected {' or '.join(WEIGHTS)} in it, or their shards with an index")


def _is_name(value):
    return isinstance(value, str) and value == os.path.basename(value) and value.endswith((".safetensors", ".bin"))


def _check_size(folder, sizes, files):
    """Raise ValueError for sizes that the files can't hold, before memory is taken for them."""
    width = sizes["n_embd"]
    weights = (sizes["vocab_size"] + sizes["block_size"]) * width + 12 * sizes["n_layer"] * width**2
    held = sum(map(os.path.getsize, files)) // 2  # two bytes each, or more
    if weights > held:
        raise ValueError(
            f"{os.path.join(folder, 'config.json')} describes a model of {weights:,} weights, and the files beside it "
            f"hold at most {held:,}: one of them is damaged"
        )


def _tensors(path):
    """(name, tensor) for each of the weights in a file, of which nothing can run."""
    try:
        if path.endswith(".bin"):
            # The oldest format can't be mapped, and is read whole.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            yield from tensors.items()
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, "pt") as file:  # anew, because what was read of an open file stays in memory
                tensor = file.get_tensor(name)
            yield name, tensor
    except ImportError as e:
        raise ImportError("these weights are read by safetensors: pip install safetensors") from e
    except Exception as e:  # zip, pickle and safetensors each have their own way to say that a file is damaged
        first_line = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} can't be read, it is damaged or not a file of weights ({first_line})") from e


@torch.no_grad()
def _copy_weights(model, folder, files):
    """Fill a model with the weights of a Hugging Face GPT-2, each of them exactly once."""
    left = model.state_dict()
    embedding, head = left.pop("lm_head.weight"), None  # which is the token embedding as well
    for path in files:
        for name, tensor in _tensors(path):
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{path} is damaged or not a file of weights: expected tensors by name")
            if name.endswith(CAUSAL_MASK):
                continue
            if name == "lm_head.weight":
                head = tensor
                continue
            name = "transformer." + name.removeprefix("transformer.")  # a model saved without its head has none
            if name not in left:
                raise ValueError(f"{path}: GPT-2 has no weight {name}, or it is there twice")
            if tensor.dim() == 2 and name.endswith(CONV1D):
                tensor = tensor.t()
            ours = left.pop(name)
            if tensor.shape != ours.shape or not tensor.is_floating_point():
                expected = f"expected floating point numbers of shape {tuple(ours.shape)}"
                raise ValueError(f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, {expected}")
            ours.copy_(tensor)
    if left:
        raise ValueError(f"{folder} lacks {len(left)} of GPT-2's weights: {', '.join(list(left)[:3])}, ...")
    if head is not None and not torch.equal(head.to(embedding), embedding):
        raise ValueError(f"{folder} has a head (lm_head.weight) of its own, and GPT-2's is its token embedding")
