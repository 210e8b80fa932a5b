"""Gradients of several ranks: how they travel, and what a rank that fails leaves the others."""

import pytest
import torch

from model import GPT, GPTConfig
from nanofit import gradients
from nanofit.ranks import World


@pytest.fixture
def two_ranks(monkeypatch):
    """One process that takes itself for two ranks which compute the same: what is sent, in order."""
    sent = []

    class Sent:
        def wait(self):
            pass

    def all_reduce(flat, how, async_op):
        sent.append(flat)
        flat.mul_(2)
        return Sent()

    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return sent


def toy():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=3, n_head=2, n_embd=16))


def backward(model, seed):
    x = torch.randint(65, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(x, x, return_logits=False)[1].backward()


@pytest.mark.parametrize("passes", [1, 3])
def test_averaged_gradients_are_those_of_one_process_in_memory_of_their_own(monkeypatch, two_ranks, passes):
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 5000)
    alone, ours = toy(), toy()
    averaged = gradients.AveragedGradients(ours, World(size=2))
    for _ in range(2):  # iterations
        alone.zero_grad()
        two_ranks.clear()
        averaged.begin(passes)
        for seed in range(passes):
            backward(alone, seed)
            if seed == passes - 1:
                averaged.last()
            before = len(two_ranks)
            backward(ours, seed)
            left = len(two_ranks) - before
            assert bool(left) == (seed == passes - 1), "buckets leave during the last pass"
        averaged.end()
        assert len({flat.data_ptr() for flat in two_ranks}) == len(two_ranks) > 3
        for (name, a), b in zip(alone.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0, msg=name)
            assert any(b.grad.untyped_storage().data_ptr() == flat.data_ptr() for flat in two_ranks), "a view"
        for p in ours.parameters():
            p.grad = None


def test_a_rank_that_failed_sends_as_many_messages_in_the_same_order(monkeypatch, two_ranks):
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 5000)
    averaged = gradients.AveragedGradients(toy(), World(size=2))
    for begun in (0, 1, 2):  # nothing; a pass that isn't the last; half of the last
        averaged.begin(2)
        if begun:
            backward(averaged.model, 0)
        if begun == 2:
            averaged.last()
            block = averaged.model.transformer.h[1]
            stop = block.register_full_backward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                backward(averaged.model, 1)
            stop.remove()
        averaged.end()
    messages = [flat.data_ptr() for flat in two_ranks]
    third = len(messages) // 3
    assert messages[:third] == messages[third : 2 * third] == messages[2 * third :]


@pytest.mark.parametrize("passes", [1, 3])
def test_a_parameter_without_use_gets_no_gradient(two_ranks, passes):
    model = toy()
    model.more = torch.nn.Parameter(torch.ones(3))
    averaged = gradients.AveragedGradients(model, World(size=2))
    averaged.begin(passes)
    for seed in range(passes):
        if seed == passes - 1:
            averaged.last()
        backward(model, seed)
    averaged.end()
    assert model.more.grad is None, "as in one process"
    assert model.lm_head.weight.grad is not None


def test_gradients_that_cuda_graphs_begin_as_zeros_are_none_where_no_pass_used_them():
    model = toy()
    model.more, model.runs_in_cuda_graphs = torch.nn.Parameter(torch.ones(3)), True
    own = gradients.Gradients(model)
    own.begin(2)
    assert model.more.grad is not None
    backward(model, 0)
    own.end()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["more"]
