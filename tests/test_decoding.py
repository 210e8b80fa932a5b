import contextlib

import pytest
import torch

from model import GPT, GPTConfig
from nanofit import decoding
from nanofit.decoding import FixedCache, Graphed

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.numbers])


class Recorded:
    """In place of torch.cuda.CUDAGraph on a CPU: what was captured is computed anew."""

    made = 0

    def __init__(self):
        Recorded.made += 1

    def replay(self):
        Recorded.of.fixed.seen = 0
        Recorded.of.logits.copy_(Recorded.of.model(Recorded.of.token, cache=Recorded.of.fixed)[0])


@pytest.fixture(params=["cpu", GPU])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
        monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    Recorded.made = 0
    return request.param


@torch.no_grad()
def tokens(device, prompt, new, rows=2, graphed=True):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)).eval().to(device)
    by = Recorded.of = Graphed(model) if graphed else model
    torch.manual_seed(2)
    return GPT.generate(by, torch.randint(65, (rows, prompt), device=device), new, 0.9, 20).tolist()


@pytest.mark.parametrize(("prompt", "new"), [(1, 15), (5, 40), (16, 3), (30, 4)])
def test_a_graph_changes_no_token(device, prompt, new):
    assert tokens(device, prompt, new) == tokens(device, prompt, new, graphed=False)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_one_graph_for_all_tokens_and_none_for_many_sequences(device):
    tokens(device, 5, 8)
    tokens(device, 5, 8, rows=decoding.MOST_ROWS + 1)
    assert Recorded.made == 1


def test_a_graph_that_computes_something_else_is_not_used(device, monkeypatch, capsys):
    monkeypatch.setattr(FixedCache, "add", lambda self, layer, k, v: (k, v, None))
    assert tokens(device, 5, 8) == tokens(device, 5, 8, graphed=False)
    assert "without a CUDA graph (its logits" in capsys.readouterr().out


def test_a_graph_that_cannot_be_captured_is_not_used(device, monkeypatch, capsys):
    def fails(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    assert tokens(device, 5, 8) == tokens(device, 5, 8, graphed=False)
    assert "without a CUDA graph (operation not permitted" in capsys.readouterr().out


@pytest.mark.gpu
@torch.no_grad()
def test_drawing_a_token_never_waits_for_the_gpu():
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)).eval().to("cuda")
    by, prompt = Graphed(model), torch.zeros((1, 5), dtype=torch.long, device="cuda")
    GPT.generate(by, prompt, 2, 0.9, 20)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            prompt[:, [-1]]  # a list as an index is copied from the host
        assert GPT.generate(model, prompt, 5, 0.9, 20).shape == (1, 10)
        logits, _ = model(by.token, cache=by.fixed)  # what is captured, where waiting is an error
        assert logits.shape == (1, 1, 65)
    finally:
        torch.cuda.set_sync_debug_mode(before)
