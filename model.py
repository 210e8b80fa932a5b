"""GPT-2's architecture, as nanoGPT spells it, in one file that needs torch alone.

It can be copied by itself into a nanoGPT checkout. Names of modules are those of GPT-2's weights
(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), so that checkpoints travel.

Shapes: B sequences, T tokens of each, C = n_embd, nh = n_head, hs = C // nh, V = vocab_size.
"""

import functools
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

LOSS_CHUNK_BYTES = 128 * 2**20  # of logits in float32 that exist at a time in training, see head_loss
LOSS_CHUNKS = 32  # at most, as torch.compile unrolls the loop over them
ADDED_ROWS = 4096  # rows that exist at a time of a product that is added to a matrix of another dtype
SOFTMAX_BYTES = 32 * 2**20  # of probabilities in float32 that exist at a time in eager training
A100_FLOPS = 312e12  # dense bfloat16, NVIDIA A100 data sheet

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's, on the Hugging Face hub
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # kept transposed
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}  # for nn.GELU


@dataclass
class GPTConfig:
    """Sizes of a GPT. Raises ValueError if they are not possible."""

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
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
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


class KeyValueCache:
    """Keys and values of the positions that a model has seen, so that generating doesn't compute them again."""

    def __init__(self, config, batch_size, positions, device, dtype):
        shape = config.n_layer, 2, batch_size, config.n_head, positions, config.n_embd // config.n_head
        self.keys_values = torch.empty(shape, device=device, dtype=dtype)
        self.seen = 0  # positions that are filled

    def places(self, T):
        """The positions of the next T tokens, as an index."""
        return slice(self.seen, self.seen + T)

    def add(self, layer, k, v):
        """Keep the next tokens' keys and values. Returns all so far, and a mask if some of them don't count."""
        kept, end = self.keys_values[layer], self.seen + k.shape[2]  # (2, B, nh, positions, hs)
        kept[0, :, :, self.seen : end], kept[1, :, :, self.seen : end] = k, v
        return *kept[:, :, :, :end].unbind(0), None


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, nh, T, hs)
        k, v, mask = cache.add(layer, k, v) if cache else (k, v, None)  # k, v: (B, nh, seen + T, hs)
        causal = k.shape[2] == T  # else T is 1, and the token sees all before it
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


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

    def forward(self, x, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


def not_computed_here(theirs):
    """What a transformers config asks for and GPT doesn't compute, for a message; '' if nothing."""
    possible = {
        "model_type": ("gpt2",),
        "activation_function": tuple(ACTIVATIONS),
        "n_inner": (None, 4 * getattr(theirs, "n_embd", 0)),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    }
    for key, values in possible.items():
        if (found := getattr(theirs, key, None)) not in values:
            return f"{key} is {found!r}, and must be {' or '.join(map(repr, values))}"
    return ""


class GPT(nn.Module):
    """A decoder-only transformer whose output head shares the token embedding's weight."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.loss_chunk_mb = 0  # MiB of logits that exist at a time if they aren't returned; 0: LOSS_CHUNK_BYTES
        # Weights are drawn in this order: changing it changes the weights that a seed gives.
        parts = dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, bias=config.bias),
        )
        self.transformer = nn.ModuleDict(parts)
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
        """Number of parameters; non_embedding leaves out positions. Token embeddings count: they are the head."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def forward(self, idx, targets=None, return_logits=True, cache=None):
        """Predict the token after each of idx.

        idx: int64 (B, T), T at most block_size. targets: int64 (B, T), -1 where no loss is wanted, or None.
        Returns (logits, loss): with targets, logits (B, T, V) and the mean cross-entropy in nats; without, logits
        (B, 1, V) of the last position, and None. return_logits=False: (None, loss), in a fraction of the memory.
        cache: a KeyValueCache, to which idx is added. If it isn't empty, T must be 1.
        """
        T = idx.shape[1]
        seen = cache.seen if cache else 0
        if self.config.block_size < seen + T:
            raise ValueError(f"{seen + T} tokens are more than the model's block_size {self.config.block_size}")
        places = cache.places(T) if cache else slice(T)  # a slice is cheaper than looking positions up
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe.weight[places])  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer) if cache else block(x)
        x = self.transformer.ln_f(x)
        if cache:
            cache.seen += T
        if targets is None:
            return self.lm_head(x[:, -1:]), None  # (B, 1, V)
        if not return_logits:
            return None, head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.loss_chunk_mb * 2**20)
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def crop_block_size(self, block_size):
        """Shorten the longest sequence that the model takes, dropping the positions after it."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size can be cropped to at most {self.config.block_size}, not {block_size}")
        self.config.block_size = block_size
        # A copy: a slice would keep the whole table in memory and in every checkpoint.
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """GPT-2 with trained weights, read by transformers: one of PRETRAINED, or a folder of save_pretrained's.

        A folder's activation is kept. The names in PRETRAINED compute with the exact GELU as in nanoGPT, where OpenAI
        used its approximation by tanh. override_args: {'dropout': p} or nothing. Raises ValueError for what this GPT
        can't compute, ImportError without transformers, and what that raises for files that are missing or damaged.
        """
        if others := set(override_args or {}) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden in a pretrained model, not {sorted(others)}")
        if model_type not in PRETRAINED and not os.path.isdir(model_type):
            expected = f"expected {', '.join(PRETRAINED)}, or the path of a folder that holds a Hugging Face GPT-2"
            raise ValueError(f"no pretrained model '{model_type}': {expected}")
        try:
            from transformers import AutoConfig, GPT2LMHeadModel
        except ImportError as e:
            raise ImportError("pretrained weights are read by transformers: pip install transformers") from e
        print(f"loading weights from pretrained gpt: {model_type}")
        their_config = AutoConfig.from_pretrained(model_type)
        if differing := not_computed_here(their_config):
            raise ValueError(f"'{model_type}' is not a GPT-2 that model.py can compute: its {differing}")
        theirs, told = GPT2LMHeadModel.from_pretrained(model_type, output_loading_info=True)
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"'{model_type}' lacks {len(missing)} of GPT-2's weights: {', '.join(missing[:3])}, ...")
        if not torch.equal(theirs.lm_head.weight, theirs.transformer.wte.weight):
            raise ValueError(f"'{model_type}' has a head of its own, and here the head is the token embedding")
        sizes = {name: getattr(their_config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        model = cls(GPTConfig(block_size=their_config.n_positions, **sizes, bias=True, **(override_args or {})))
        weights = theirs.state_dict()
        del theirs  # so that each weight is freed as soon as it is copied
        for name, ours in model.state_dict().items():
            weight = weights.pop(name)
            ours.copy_(weight.t() if name.endswith(CONV1D) else weight)
        if model_type not in PRETRAINED:
            for block in model.transformer.h:
                block.mlp.gelu.approximate = ACTIVATIONS[their_config.activation_function]
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in two groups: tensors of two or more dimensions decay, biases and norms don't."""
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

        fwdbwd_per_iter: sequences of block_size tokens in dt seconds. Counted as in appendix B of PaLM's paper
        (arXiv:2204.02311): 6 FLOP a parameter and token, and attention.
        """
        c = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        return flops_per_token * c.block_size * fwdbwd_per_iter / dt / A100_FLOPS

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, on_token=lambda tokens: None):
        """Continue idx, int64 (B, T), by max_new_tokens sampled tokens; returns (B, T + max_new_tokens).

        temperature above 0 divides the logits; top_k keeps only the k likeliest tokens. on_token is called with each
        new token of the sequences, int64 (B, 1), and may return True to stop. Call model.eval() first. The model sees
        only the last block_size tokens. Beyond that, each new token shifts all positions: all are computed again.
        """
        block_size = self.config.block_size
        positions = min(block_size, idx.shape[1] + max_new_tokens)
        cache = KeyValueCache(self.config, len(idx), positions, idx.device, product_dtype(self.transformer.wte.weight))
        for _ in range(max_new_tokens):
            fits = idx.shape[1] <= block_size
            logits, _ = self(idx[:, cache.seen :], cache=cache) if fits else self(idx[:, -block_size:])
            logits = logits[:, -1, :] / temperature  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            drawn = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, drawn), dim=1)
            if on_token(drawn):
                break
        return idx


# ---- the loss without logits -------------------------------------------------------------------------------


def product_dtype(tensor):
    """The dtype in which matrix products with this tensor run: autocast's where that is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


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

    An operator of its own, because torch.compile would keep all chunks' products and add them at the end.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and cuda_adds_products(a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for rows, of_rows in zip(total.split(ADDED_ROWS), a.split(ADDED_ROWS), strict=True):
            rows += of_rows @ b


def softmax_less_one_hot(logits, target, exact, lift, with_gradients):
    """(log-probabilities of the targets in the dtype exact, (rows, 1); lift * (softmax - one-hot), (rows, V)).

    logits: (rows, V), which may be overwritten. target: int64 (rows, 1). The second is in the logits' dtype, and
    without meaning unless with_gradients.
    """
    if torch.compiler.is_compiling():  # one kernel reads the logits; a second reads them and writes the gradient
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
        del log_p  # before the next one is made
    return torch.cat(found), logits


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the logits h @ weight.T, of which only a chunk of rows exists at a time. Use head_loss.

    A chunk's gradients are computed in the forward pass and overwrite its logits. So there are three matrix products,
    as without chunks, and nothing is computed twice. The backward pass only scales the gradients.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, rows, dtype, with_gradients):
        exact = torch.promote_types(dtype, torch.float32)
        # In float16, most of softmax would underflow: it is about 1/V. So it is multiplied, and h divided, by powers of
        # two, which cost no precision; `lift` is small enough that a sum over a chunk's rows can't overflow.
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
            del logits, g  # before the next ones are made
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
        grad_h = grad_h.to(scale.dtype) * torch.where(counts, scale, 0.0)
        # In place if the dtype stays: torch refuses a second backward pass, so nobody reads it again.
        grad_weight = grad_weight.to(scale.dtype).mul_(scale / ctx.lower)
        return grad_h.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), *[None] * 4


def head_loss(h, weight, targets, chunk_bytes=None):
    """Mean cross-entropy in nats of predicting targets from h by a linear head, without holding the logits.

    h: (N, C). weight: (V, C). targets: int64 (N,), -1 where no loss is wanted. A scalar in float32 or better. Under
    autocast, products run in its dtype. chunk_bytes (0 or None: LOSS_CHUNK_BYTES): of logits, counted as float32, that
    may exist at a time, but at least 1/LOSS_CHUNKS of all. Larger is faster.
    """
    logits_bytes = 4 * len(h) * len(weight)
    chunks = min(LOSS_CHUNKS, math.ceil(logits_bytes / (chunk_bytes or LOSS_CHUNK_BYTES)))
    rows = math.ceil(len(h) / chunks)
    if rows > 128:
        rows = math.ceil(rows / 128) * 128  # whole tiles of a matrix product
    with_gradients = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return HeadLoss.apply(h, weight, targets, rows, product_dtype(h), with_gradients)
