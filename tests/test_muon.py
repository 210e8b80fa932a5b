"""optimizer='muon': which weights it moves, and that a run with it is a run like any other."""

import pytest
import torch
from conftest import train, train_on_ranks

from model import GPT, GPTConfig
from nanofit import models, optimizers
from nanofit.autofit.plan import Job
from nanofit.autofit.simulate import simulate
from nanofit.errors import UsageError

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=65, dropout=0.0, bias=True)
TINY = dict(n_layer=1, n_embd=32, block_size=16, batch_size=4, eval_interval=5, eval_iters=2, optimizer="muon")


@needs_muon
def test_matrices_of_blocks_are_muons_and_the_rest_adamws():
    model = models.build(GPT, GPTConfig, SIZES)
    optimizer = optimizers.make_optimizer(model, "float32", 0.1, 1e-2, (0.9, 0.95), torch.device("cpu"), "muon")
    muon, adamw = ({p for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    names = {name for name, p in model.named_parameters() if p in muon}
    assert names == {n for n, p in model.named_parameters() if n.startswith("transformer.h.") and p.dim() == 2}
    assert adamw == set(model.parameters()) - muon
    assert {g["weight_decay"] for g in optimizer.param_groups if g["params"][0].dim() == 1} == {0.0}
    optimizers.set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.25}


@needs_muon
def test_a_run_learns_and_goes_on_bit_for_bit_without_naming_it_again():
    whole = train(**TINY, max_iters=20, out_dir="whole")
    assert whole.eval_loss[20][1] < whole.eval_loss[0][1]
    train(**TINY, max_iters=10)
    named = {key: value for key, value in TINY.items() if key != "optimizer"}
    rest = train(**named, max_iters=20, init_from="resume")
    assert rest.iter_loss == {i: loss for i, loss in whole.iter_loss.items() if i >= 10}
    with pytest.raises(UsageError, match="optimizer='adamw' can't go on with the state of 'muon'"):
        train(**{**TINY, "optimizer": "adamw"}, init_from="resume")


@needs_muon
def test_a_plan_counts_one_moment_for_what_muon_moves():
    job = dict(
        source=models.source_of(GPT, GPTConfig), model_args={**SIZES, "n_embd": 64}, device="cuda", dtype="bfloat16",
        grad_clip=1.0, memory_limit_gb=12.0, simulate=True,
    )  # fmt: skip
    adamw, muon = (simulate(Job(**job, optimizer=name)).parts for name in ("adamw", "muon"))
    assert muon["weights"] == adamw["weights"]
    assert 0.5 * adamw["optimizer state"] < muon["optimizer state"] < 0.8 * adamw["optimizer state"]


def test_a_torch_without_muon_is_a_sentence(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UsageError, match="optimizer='muon' needs torch 2.9 or newer, not "):
        train(**TINY)


@pytest.mark.proof
@needs_muon
@pytest.mark.parametrize("shard", [False, True])
def test_ranks_learn_what_one_process_learns(shard):
    keys = {**TINY, "gradient_accumulation_steps": 2, "max_iters": 5}
    alone = train(**keys, out_dir="alone")
    run, *_ = train_on_ranks(2, **keys, shard=shard)
    assert run.iter_loss == pytest.approx(alone.iter_loss, abs=2e-3)  # it multiplies in bfloat16
    rest, *_ = train_on_ranks(2, **{**keys, "max_iters": 6}, init_from="resume", shard=shard)
    assert list(rest.iter_loss) == [5, 6]
