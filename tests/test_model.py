"""model.py by itself: interface, weights, pretrained models, errors."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from torch.nn import functional as F

from model import GPT, GPTConfig


def toy(**changes):
    return GPT(GPTConfig(**{**dict(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32), **changes}))


def test_same_logits_as_hugging_face(hugging_face_gpt2):
    folder, theirs = hugging_face_gpt2
    ours = GPT.from_pretrained(folder, dict(dropout=0.1)).eval()
    assert ours.config.dropout == 0.1
    assert ours.config.bias
    idx = torch.randint(257, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


def test_pretrained_models_that_are_not_to_be_had(hugging_face_gpt2, tmp_path):
    with pytest.raises(ValueError, match="no pretrained model 'gpt3'.*gpt2-xl"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ValueError, match="only dropout can be overridden.*bias"):
        GPT.from_pretrained(hugging_face_gpt2[0], dict(bias=False))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="the weights of '.*empty' can't be had"):
        GPT.from_pretrained(str(tmp_path / "empty"))


def test_a_missing_transformers_is_a_sentence(hugging_face_gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        GPT.from_pretrained(hugging_face_gpt2[0])


def test_weights_are_drawn_from_the_distributions_of_gpt2():
    torch.manual_seed(0)
    model = toy(n_layer=8, n_embd=128, bias=True)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_the_embedding_and_the_head_are_one_and_both_are_saved():
    model = toy()
    assert model.transformer.wte.weight is model.lm_head.weight
    assert {"transformer.wte.weight", "lm_head.weight", "transformer.h.1.attn.c_attn.weight"} <= set(model.state_dict())
    assert model.get_num_params() == model.get_num_params(non_embedding=False) - 16 * 32


def test_ignored_targets_count_for_nothing():
    model = toy().eval()
    idx = torch.randint(65, (2, 8))
    targets = torch.randint(65, (2, 8))
    targets[:, ::2] = -1
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits[:, 1::2].reshape(-1, 65), targets[:, 1::2].reshape(-1))
    torch.testing.assert_close(loss, expected)


def test_without_targets_only_the_last_position_is_predicted():
    model = toy().eval()
    idx = torch.randint(65, (2, 8))
    logits, loss = model(idx)
    assert logits.shape == (2, 1, 65)
    assert loss is None
    torch.testing.assert_close(logits[:, 0], model(idx, idx)[0][:, -1])


def test_a_position_sees_nothing_behind_it():
    model = toy().eval()
    a = torch.randint(65, (1, 16))
    b = a.clone()
    b[0, 10:] = (b[0, 10:] + 1) % 65
    la, lb = model(a, a)[0], model(b, b)[0]
    torch.testing.assert_close(la[:, :10], lb[:, :10])
    assert not torch.allclose(la[:, 10:], lb[:, 10:])


def test_generating_beyond_the_block_size():
    model = toy().eval()
    torch.manual_seed(1)
    out = model.generate(torch.zeros((2, 3), dtype=torch.long), 30, top_k=1)
    assert out.shape == (2, 33)
    # The likeliest token each time: every row is the same, and what the last window predicts comes next.
    assert (out[0] == out[1]).all()
    assert model(out[:, -17:-1])[0].argmax(-1)[0, 0] == out[0, -1]


def test_cropping_keeps_the_first_positions():
    model = toy().eval()
    idx = torch.randint(65, (1, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert model.transformer.wpe.weight.shape == (8, 32)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(ValueError, match="at most 8, not 16"):
        model.crop_block_size(16)


def test_what_decays_and_what_does_not():
    model = toy(bias=True)
    decay, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert {p.dim() for p in decay["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    assert sum(p.numel() for g in (decay, rest) for p in g["params"]) == model.get_num_params(False)


def test_mfu_is_the_share_of_the_peak():
    model = toy()
    flops_per_token = 6 * model.get_num_params() + 12 * 2 * 32 * 16
    assert model.estimate_mfu(4, 0.5, peak_flops=1e9) == pytest.approx(flops_per_token * 16 * 4 / 0.5 / 1e9)
    assert model.estimate_mfu(4, 0.5) == pytest.approx(flops_per_token * 16 * 4 / 0.5 / 312e12)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(n_embd=32, n_head=5), r"n_embd=32 is not divisible by n_head=5.*set n_head to 4 or 8"),
        (dict(n_layer=0), "n_layer must be at least 1, not 0"),
        (dict(dropout=1.0), "dropout must be at least 0 and below 1, not 1.0"),
    ],
)
def test_impossible_sizes(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        toy(**changes)


def test_a_sequence_longer_than_the_block():
    with pytest.raises(ValueError, match="17 tokens is longer than the model's block_size 16"):
        toy()(torch.zeros((1, 17), dtype=torch.long))


ALONE = """
from model import GPTConfig, GPT, LayerNorm, CausalSelfAttention, MLP, Block
import torch
args = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=32, dropout=0.0)
model = GPT(GPTConfig(**args))
opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
x = torch.randint(32, (2, 8))
logits, loss = model(x, x)
loss.backward()
opt.step()
model.crop_block_size(4)
print(logits.shape, model.estimate_mfu(2 * 1, 0.1) > 0, model.generate(x[:, :2], 3, temperature=0.8, top_k=5).shape)
print('configurator' in __import__('sys').modules)
"""


def test_alone_in_a_folder_it_serves_nanogpts_calls(tmp_path):
    """Nothing of the project beside it, each call as nanoGPT's own scripts make it."""
    shutil.copy(ROOT / "model.py", tmp_path)
    (tmp_path / "use.py").write_text(ALONE)
    done = subprocess.run(
        [sys.executable, "use.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH=""),
        check=True,
    )
    assert done.stdout.splitlines()[-2:] == ["torch.Size([2, 8, 32]) True torch.Size([2, 5])", "False"]
