"""One optimizer step, and the guard around torch.compile."""

from contextlib import nullcontext

import pytest
import tiny
import torch

from model import GPT, GPTConfig
from nanofit.compiling import dry_step, try_compile
from nanofit.step import evaluate, mean_losses, train_step

CPU = torch.device("cpu")


class Listed:
    """Batches from a list."""

    def __init__(self, *batches, micro_steps=1):
        self.batches, self.micro_steps = list(batches), micro_steps
        self.generator = torch.Generator()

    @property
    def current(self):
        return self.batches[0]

    def advance(self):
        self.batches.append(self.batches.pop(0))

    def evaluation(self, split, count, rank=0, ranks=1, even=False):
        yield from ([batch] for batch in self.batches[:count])


def toy(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16, bias=False))


def batch(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(65, (rows, 8), generator=g), torch.randint(65, (rows, 8), generator=g)


def one_step(model, batches, grad_clip=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return train_step(model, optimizer, scaler, batches, nullcontext(), grad_clip)


@pytest.mark.parametrize("grad_clip", [0.0, 0.01, 1e9])
def test_micro_steps_are_one_step_over_the_whole_batch(grad_clip):
    x, y = batch(6)
    whole, cut = toy(), toy()
    loss = one_step(whole, Listed((x, y)), grad_clip)
    pieces = zip(x.split(2), y.split(2), strict=True)
    mean = one_step(cut, Listed(*pieces, micro_steps=3), grad_clip)
    torch.testing.assert_close(mean, loss)
    for (name, a), b in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_an_evaluation_is_a_mean_without_dropout_and_leaves_training_on():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16, dropout=0.5)).train()
    batches = Listed(batch(2, seed=1), batch(2, seed=2))
    first, second = (mean_losses(evaluate(model, batches, 2, nullcontext())) for _ in range(2))
    assert first == second
    assert model.training
    with torch.no_grad():
        model.eval()
        assert first["val"] == pytest.approx(sum(model(*b)[1].item() for b in batches.batches) / 2, abs=1e-6)


def test_a_model_that_fails_to_compile_goes_on_in_training_mode():
    model = toy().train()
    assert try_compile(model, lambda compiled: model.eval() / 0, CPU)[0] is model
    assert model.training


def test_out_of_memory_is_no_failure_of_the_compiler():
    def trial(compiled):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        try_compile(toy(), trial, CPU)


def test_a_trial_of_the_compiler_is_all_that_training_asks_and_leaves_the_model_as_it_was():
    model, calls = toy().train(), []
    before = [p.clone() for p in model.parameters()]
    model.register_forward_pre_hook(lambda model, args: calls.append((model.training, torch.is_grad_enabled())))
    dry_step(model, batch(2), nullcontext())
    assert calls == [(True, True), (True, True), (False, False)], "two micro-steps and an evaluation"
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_check_ends_an_evaluation_and_leaves_training_on():
    def stop():
        raise KeyboardInterrupt

    model = toy().train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, Listed(batch(2)), 1, nullcontext(), check=stop)
    assert model.training


def test_losses_are_summed_in_float32_whatever_the_model_computes_in():
    model = tiny.made("bfloat16")[0]
    batches = Listed(*(batch(2, seed=s) for s in range(3)), micro_steps=3)
    with torch.no_grad():
        expected = sum(model(*one)[1].double().item() for one in batches.batches) / 3
    for found in (mean_losses(evaluate(model, batches, 3, nullcontext()))["val"], one_step(model, batches).item()):
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_weight_that_the_optimizer_lacks_keeps_no_gradient():
    model = toy()
    optimizer = torch.optim.SGD(model.transformer.h.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train_step(model, optimizer, scaler, Listed(batch(2)), nullcontext(), 1.0)
    assert all(p.grad is None for p in model.parameters())
