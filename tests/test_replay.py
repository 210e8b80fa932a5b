"""A second, independent trainer in float64, by CONTRACT's rules alone, against what train.py tells and saves.

Nothing here uses nanofit or model.py. In float32, train.py's losses are rounded to 5e-7 and its weights wander as AdamW
divides small gradients by their own size, so both train in float64: what is left is the order of sums.
"""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import RANK, train_on_ranks
from torch.nn import functional as F

WITHIN = 1e-6
KEYS = dict(
    n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, gradient_accumulation_steps=1, max_iters=30,
    eval_interval=10, eval_iters=3, learning_rate=3e-3, min_lr=3e-4, warmup_iters=5, lr_decay_iters=25,
    weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=0.7,
)  # fmt: skip


PARTS = (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1))  # widths, over C


class Replay:
    """A whole run: .figures {(iteration, name): value} and .weights {name: tensor}."""

    def __init__(self, keys):
        self.k = keys
        self.tokens = {s: np.fromfile(f"data/markov/{s}.bin", "<u2").astype(np.int64) for s in ("train", "val")}
        torch.manual_seed(1337)
        self.draw_weights(vocab_size=65)
        self.generator = torch.Generator()
        self.generator.set_state(torch.get_rng_state())
        self.figures = {}
        self.first = {name: torch.zeros_like(w) for name, w in self.weights.items()}  # AdamW's moments
        self.second = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.run()

    def draw_weights(self, vocab_size):
        """In nanoGPT's order: what layers draw as they are made, then normal numbers over all, then projections."""
        C, kinds = self.k["n_embd"], {}
        for name, make in (
            ("transformer.wte", partial(nn.Embedding, vocab_size, C)),
            ("transformer.wpe", partial(nn.Embedding, self.k["block_size"], C)),
            *(
                (f"transformer.h.{i}.{part}", partial(nn.Linear, a * C, b * C, bias=False))
                for i in range(self.k["n_layer"])
                for part, a, b in (
                    ("attn.c_attn", 1, 3),
                    ("attn.c_proj", 1, 1),
                    ("mlp.c_fc", 1, 4),
                    ("mlp.c_proj", 4, 1),
                )
            ),
            ("lm_head", partial(nn.Linear, C, vocab_size, bias=False)),
        ):
            kinds[f"{name}.weight"] = make().weight.detach()
        kinds["transformer.wte.weight"] = kinds["lm_head.weight"]  # tied
        for w in kinds.values():
            w.normal_(std=0.02)
        for name, w in kinds.items():
            if name.endswith("c_proj.weight"):
                w.normal_(std=0.02 / math.sqrt(2 * self.k["n_layer"]))
        del kinds["lm_head.weight"]
        norms = [f"transformer.h.{i}.ln_{n}.weight" for i in range(self.k["n_layer"]) for n in (1, 2)]
        kinds |= {name: torch.ones(C) for name in (*norms, "transformer.ln_f.weight")}
        self.weights = {name: w.double().requires_grad_() for name, w in kinds.items()}

    def batch(self, split):
        starts = torch.randint(
            len(self.tokens[split]) - self.k["block_size"], (self.k["batch_size"],), generator=self.generator
        )
        rows = np.stack([self.tokens[split][i : i + self.k["block_size"] + 1] for i in starts.tolist()])
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])

    def loss(self, x, y):
        w, C, heads = self.weights, self.k["n_embd"], self.k["n_head"]
        B, T = x.shape
        mask = torch.full((T, T), -math.inf).triu(1)
        norm = lambda h, name: F.layer_norm(h, (C,), w[f"{name}.weight"], eps=1e-5)  # noqa: E731
        h = w["transformer.wte.weight"][x] + w["transformer.wpe.weight"][:T]
        for i in range(self.k["n_layer"]):
            at = f"transformer.h.{i}"
            q, k, v = (norm(h, f"{at}.ln_1") @ w[f"{at}.attn.c_attn.weight"].T).view(B, T, 3, heads, -1).unbind(2)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(C // heads) + mask
            mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, T, C)
            h = h + mixed @ w[f"{at}.attn.c_proj.weight"].T
            wide = norm(h, f"{at}.ln_2") @ w[f"{at}.mlp.c_fc.weight"].T
            wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
            h = h + wide @ w[f"{at}.mlp.c_proj.weight"].T
        logits = norm(h, "transformer.ln_f") @ w["transformer.wte.weight"].T
        return (logits.logsumexp(-1) - logits.gather(-1, y[..., None])[..., 0]).mean()

    def rate(self, it):
        high, low, warm, end = (self.k[n] for n in ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters"))
        if it < warm:
            return high * (it + 1) / (warm + 1)
        return low + (high - low) * (1 + math.cos(math.pi * min(1, (it - warm) / (end - warm)))) / 2

    def run(self):
        current, several = self.batch("train"), self.k["gradient_accumulation_steps"]
        for it in range(self.k["max_iters"] + 1):
            if it % self.k["eval_interval"] == 0:
                for split in ("train", "val"):
                    with torch.no_grad():
                        found = [self.loss(*self.batch(split)).item() for _ in range(self.k["eval_iters"])]
                    self.figures[it, f"{split}_loss"] = sum(found) / len(found)
                if it == self.k["max_iters"]:
                    self.saved = {name: w.detach().clone() for name, w in self.weights.items()}
            gradients, total = {name: torch.zeros_like(w) for name, w in self.weights.items()}, 0.0
            for _ in range(several):
                loss = self.loss(*current) / several
                total += loss.item()
                for g, more in zip(
                    gradients.values(), torch.autograd.grad(loss, list(self.weights.values())), strict=True
                ):
                    g += more
                current = self.batch("train")
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
            self.figures |= {(it, "loss"): total, (it, "grad_norm"): norm}
            self.adamw(it, {name: g * min(1, self.k["grad_clip"] / (norm + 1e-6)) for name, g in gradients.items()})

    @torch.no_grad()
    def adamw(self, it, gradients):
        b1, b2, lr = self.k["beta1"], self.k["beta2"], self.rate(it)
        for name, g in gradients.items():
            w, m, v = self.weights[name], self.first[name], self.second[name]
            w *= 1 - lr * self.k["weight_decay"] * (w.dim() >= 2)
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            w -= lr * m / (1 - b1 ** (it + 1)) / ((v / (1 - b2 ** (it + 1))).sqrt() + 1e-8)


# ---- train.py, in float64 ----------------------------------------------------------------------------------

IN_FLOAT64 = """
import runpy, sys
import torch
from nanofit.batches import Batches

torch.set_default_dtype(torch.float64)
made = Batches.__init__
def cut(self, *arguments, **options):
    made(self, *arguments, **{{**options, **{cut}}})
Batches.__init__ = cut
sys.argv[0] = {rank!r}
runpy.run_path({rank!r}, run_name="__main__")
"""


def train(ranks=1, micro_batch_size=0, **keys):
    cut = dict(micro_batch_size=micro_batch_size) if micro_batch_size else {}
    Path("doubled.py").write_text(IN_FLOAT64.format(rank=str(RANK), cut=cut))
    return train_on_ranks(ranks, script="doubled.py", **{**KEYS, "bias": False, "dtype": "float32", **keys})


def assert_is(replay):
    with open("out/metrics.jsonl") as file:
        told = {(r["iter"], name): r[name] for r in map(json.loads, file) if "iter" in r for name in r}
    for key, value in replay.figures.items():
        assert told[key] == pytest.approx(value, abs=WITHIN), key
    saved = torch.load("out/ckpt.pt", weights_only=True)["model"]
    for name, w in replay.saved.items():
        torch.testing.assert_close(saved[name].double(), w, rtol=0, atol=WITHIN, msg=name)


@pytest.fixture
def replay():
    """A Replay of KEYS with others' values, whose numbers are drawn in float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield lambda **keys: Replay({**KEYS, **keys})
    torch.set_default_dtype(before)


ACCUMULATED = dict(gradient_accumulation_steps=6)
WAYS = {
    "plain": dict(),
    "accumulated": ACCUMULATED,
    "cut": dict(**ACCUMULATED, micro_batch_size=2),
    "joined": dict(**ACCUMULATED, micro_batch_size=12),
    "recompute": dict(**ACCUMULATED, recompute=True),
    "ranks": dict(**ACCUMULATED, ranks=2),
    "joined ranks": dict(**ACCUMULATED, ranks=2, micro_batch_size=12),
    "sharded": dict(**ACCUMULATED, ranks=3, shard=True),
}


@pytest.mark.proof
@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_what_the_rules_say(replay, way):
    train(**WAYS[way])
    assert_is(replay(gradient_accumulation_steps=WAYS[way].get("gradient_accumulation_steps", 1)))


@pytest.mark.proof
def test_a_run_that_resumes_through_all_ways_is_what_the_rules_say(replay):
    until = [4, 9, 13, 17, 20, 25, 30]
    for way, last in zip(list(WAYS)[1:], until, strict=True):
        train(**{"recompute": False, "shard": False, **WAYS[way]}, max_iters=last, init_from="auto")
    assert_is(replay(**ACCUMULATED))
