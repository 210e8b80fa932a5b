"""sample.py and bench.py as their users meet them."""

import json
import pickle
import re

import pytest
import torch
from conftest import flags, run_script, train

from model import GPT, GPTConfig
from nanofit import checkpoint as checkpoints
from nanofit import machine
from nanofit.codec import codec_of
from nanofit.errors import UsageError


def sample(**keys):
    return run_script("sample.py", *flags(**{"device": "cpu", **keys})).text


def drawn(batches, start="A", seed=7):
    """The texts of GPT.generate for the checkpoint in out: nanoGPT seeds, builds the model, which draws, samples."""
    saved = checkpoints.load("out")
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    codec = codec_of("data/markov")
    encode, decode = codec.encode, codec.decode
    prompts = [torch.tensor([encode(start)] * rows) for rows in batches]
    samples = [row for prompt in prompts for row in model.eval().generate(prompt, 30, temperature=0.9, top_k=5)]
    return [decode(tokens.tolist()) for tokens in samples]


def printed(num_samples, **keys):
    """The texts that sample.py prints for the same keys."""
    text = sample(seed=7, start="A", num_samples=num_samples, max_new_tokens=30, temperature=0.9, top_k=5, **keys)
    *texts, rest = text.split("symbols: data/markov/meta.pkl\n")[1].split("\n---------------\n")
    assert rest == ""
    return texts


def test_several_samples_are_drawn_in_one_batch():
    train(max_iters=10)
    assert printed(1) == drawn([1]), "nanoGPT's for a seed"
    texts = printed(4)
    assert texts == drawn([4])
    assert len(set(texts)) == 4


def unknown(device):
    raise UsageError("no /proc")


@pytest.mark.parametrize(
    ("free_memory_bytes", "batches"),
    [(unknown, [1] * 5), (lambda device: 550_000, [2, 2, 1])],  # a sample takes 128,536
    ids=["unknown", "two"],
)
def test_samples_that_memory_can_not_hold_together_are_drawn_in_turn(monkeypatch, free_memory_bytes, batches):
    train(max_iters=10)
    monkeypatch.setattr(machine, "free_memory_bytes", free_memory_bytes)
    assert printed(5) == drawn(batches)


@pytest.mark.parametrize("nothing", ["missing", None], ids=str)
def test_a_checkpoint_that_was_stripped_for_sharing_samples(nothing):
    train(max_iters=10)
    before = printed(1)
    saved = torch.load("out/ckpt.pt")
    for entry in ("optimizer", "scaler", "rng", "iter_num", "best_val_loss", "split"):
        if nothing == "missing":
            del saved[entry]
        else:
            saved[entry] = nothing
    torch.save(saved, "out/ckpt.pt")
    assert printed(1) == before
    assert len(before[0]) == 31


def test_a_brought_generate_gets_one_sequence_at_a_time(monkeypatch):
    train(max_iters=1)
    seen, ours = [], GPT.generate

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        seen.append(tuple(idx.shape))
        return ours(self, idx, max_new_tokens, temperature=temperature, top_k=top_k)

    monkeypatch.setattr(GPT, "generate", generate)
    assert sample(num_samples=3, max_new_tokens=4, start="AB").count("---------------") == 3
    assert seen == [(1, 2)] * 3


def test_ids_that_stand_for_nothing_are_counted(workplace):
    train(max_iters=1)
    (workplace / "data" / "markov" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65, "stoi": {"A": 7}}))
    text = sample(num_samples=2, max_new_tokens=50, start="A", temperature=5.0)
    left_out, of = re.search(r"warning: (\d+) of (\d+) tokens stand for nothing in data/markov/meta.pkl", text).groups()
    assert int(of) == 100
    samples = re.findall(r"^(A+)\n-{15}$", text, re.M)
    assert int(left_out) == 100 - (len("".join(samples)) - 2)


BENCH = dict(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, compile=False, device="cpu")


def test_bench_ends_with_nanogpts_line():
    text = run_script("bench.py", *flags(**BENCH, real_data=False)).text
    assert re.fullmatch(r"time per iteration: \d+\.\d{4}ms, MFU: \d+\.\d\d%", text.splitlines()[-1])
    assert len(re.findall(r"^\d+/20 loss: \d+\.\d{4}$", text, re.M)) == 20
    assert re.search(r"^[\d,]+ tokens per second$", text, re.M)


def test_bench_writes_a_profile(workplace):
    run_script("bench.py", *flags(**BENCH, real_data=False, profile=True))
    [trace] = (workplace / "bench_log").glob("*.json*")
    assert json.loads(trace.read_text())["traceEvents"]
