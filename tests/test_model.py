"""model.py by itself: interface, weights, pretrained models, errors."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import model as model_module
from model import GPT, GPTConfig, head_loss


def toy(**changes):
    return GPT(GPTConfig(**{**dict(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32), **changes}))


# ---- pretrained models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    """transformers' GPT-2 with weights so large that each of its two GELUs gives other logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=67, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


@torch.no_grad()
def differences(ours, theirs):
    """The largest difference of a logit, for prompts of all lengths that the model takes."""
    idx = torch.randint(theirs.config.vocab_size, (3, ours.config.block_size))
    prompts = [idx[:, : t + 1] for t in range(idx.shape[1])]
    return max((ours(x)[0][:, 0] - theirs(x).logits[:, -1]).abs().max() for x in prompts)


def saved_whole(theirs):
    theirs.save_pretrained("hf")


def saved_without_head(theirs):
    theirs.transformer.save_pretrained("hf")
    assert "transformer.wte.weight" not in load_file("hf/model.safetensors")


def change(path="hf/config.json", **keys):
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | keys))


@pytest.mark.parametrize("save", [saved_whole, saved_without_head])
def test_same_logits_as_hugging_face(theirs, save):
    save(theirs)
    ours = GPT.from_pretrained("hf", dict(dropout=0.1)).eval()
    assert (ours.config.dropout, ours.config.bias) == (0.1, True)
    assert differences(ours, theirs) < 1e-4


@pytest.mark.parametrize(("name", "approximate"), [("gelu", "none"), ("gelu_new", "tanh")])
def test_the_activation_is_the_one_that_the_folder_names(theirs, name, approximate):
    saved_whole(theirs)
    change(activation_function=name)
    ours = GPT.from_pretrained("hf").eval()
    assert {block.mlp.gelu.approximate for block in ours.transformer.h} == {approximate}
    assert differences(ours, type(theirs).from_pretrained("hf")) < 1e-4


def test_openais_names_compute_with_the_exact_gelu_as_nanogpt_does(theirs):
    theirs.save_pretrained("gpt2-medium")  # transformers looks for a folder of this name before it asks the hub
    ours = GPT.from_pretrained("gpt2-medium").eval()
    assert {block.mlp.gelu.approximate for block in ours.transformer.h} == {"none"}
    change("gpt2-medium/config.json", activation_function="gelu")
    assert differences(ours, type(theirs).from_pretrained("gpt2-medium")) < 1e-4


def test_pretrained_models_that_are_not_to_be_had(theirs, monkeypatch):
    saved_whole(theirs)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        GPT.from_pretrained("hf")
    # A name that is neither one of the four nor a folder is refused before anybody is asked.
    with pytest.raises(ValueError, match="no pretrained model 'somebody/model'.*gpt2-xl"):
        GPT.from_pretrained("somebody/model")
    with pytest.raises(ValueError, match="only dropout can be overridden.*bias"):
        GPT.from_pretrained("hf", dict(bias=False))


def rewrite(**weights):
    """The weights in hf with some of them replaced; None leaves one out."""
    kept = {name: w for name, w in (load_file("hf/model.safetensors") | weights).items() if w is not None}
    save_file(kept, "hf/model.safetensors", {"format": "pt"})


NAME = "transformer.h.1.mlp.c_fc.weight"
OTHERS = {  # what is done to a folder: what is said
    "another model": (
        lambda: change(model_type="llama"),
        "its model_type is 'llama', and must be 'gpt2'",
    ),
    "another activation": (lambda: change(activation_function="relu"), "activation_function is 'relu', and must be"),
    "another epsilon": (lambda: change(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    "one weight less": (lambda: rewrite(**{NAME: None}), f"'hf' lacks 1 of GPT-2's weights: {NAME}"),
    "another head": (
        lambda: (change(tie_word_embeddings=False), rewrite(**{"lm_head.weight": torch.ones(67, 32)})),
        "'hf' has a head of its own",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_of_another_model_is_refused(theirs, case):
    act, sentence = OTHERS[case]
    saved_whole(theirs)
    act()
    with pytest.raises(ValueError, match=sentence):
        GPT.from_pretrained("hf")


# ---- the rest ----------------------------------------------------------------------------------------------


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


def test_cropping_keeps_the_first_positions():
    model = toy().eval()
    idx = torch.randint(65, (1, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert model.transformer.wpe.weight.shape == (8, 32)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(ValueError, match="at most 8, not 16"):
        model.crop_block_size(16)


def test_mfu_is_the_share_of_an_a100():
    model = toy()
    flops_per_token = 6 * model.get_num_params() + 12 * 2 * 32 * 16
    assert model.estimate_mfu(4, 0.5) == pytest.approx(flops_per_token * 16 * 4 / 0.5 / 312e12)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(n_embd=32, n_head=5), "n_embd=32 is not divisible by n_head=5"),
        (dict(n_layer=0), "n_layer must be at least 1, not 0"),
        (dict(dropout=1.0), "dropout must be at least 0 and below 1, not 1.0"),
    ],
)
def test_impossible_sizes(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        toy(**changes)


def test_a_sequence_longer_than_the_block():
    with pytest.raises(ValueError, match="17 tokens are more than the model's block_size 16"):
        toy()(torch.zeros((1, 17), dtype=torch.long))


def loss_without_chunks(h, weight, targets):
    return F.cross_entropy(h @ weight.t(), targets, ignore_index=-1)


def loss_and_gradients(loss, h, weight, targets, factor=1.0):
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(h, weight, targets)
    (value * factor).backward()
    return value.detach(), h.grad / factor, weight.grad / factor


def chunks_of(monkeypatch, rows, vocab_size):
    """From now on, the loss goes by chunks of so many rows, and softmax by slices of two."""
    monkeypatch.setattr(model_module, "LOSS_CHUNK_BYTES", 4 * vocab_size * rows)
    monkeypatch.setattr(model_module, "LOSS_CHUNKS", math.inf)
    monkeypatch.setattr(model_module, "SOFTMAX_BYTES", 4 * vocab_size * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("n_rows", "vocab_size", "ignored", "rows_of_a_chunk"),
    [(37, 101, 0.5, 8), (1, 65, 0.0, 1), (6, 9, 1.0, 4), (64, 500, 0.1, 64)],
)
def test_the_loss_in_chunks_is_the_loss(monkeypatch, dtype, n_rows, vocab_size, ignored, rows_of_a_chunk):
    chunks_of(monkeypatch, rows_of_a_chunk, vocab_size)
    g = torch.Generator().manual_seed(0)
    h = torch.randn(n_rows, 16, dtype=dtype, generator=g)
    weight = torch.randn(vocab_size, 16, dtype=dtype, generator=g)
    targets = torch.randint(vocab_size, (n_rows,), generator=g)
    targets[torch.rand(n_rows, generator=g) < ignored] = -1
    ours = loss_and_gradients(head_loss, h, weight, targets, factor=3.0)
    theirs = loss_and_gradients(loss_without_chunks, h, weight, targets, factor=3.0)
    tolerance = dict(rtol=0, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)  # nan: the mean over no target at all


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.numbers])])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**16)])
def test_the_loss_in_16_bits_is_as_exact_as_torchs_own(monkeypatch, dtype, factor, device):
    chunks_of(monkeypatch, 100, 3000)
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(700, 64, generator=g).to(device), 0.2 * torch.randn(3000, 64, generator=g).to(device)
    targets = torch.randint(3000, (700,), generator=g).to(device)
    exact = loss_and_gradients(loss_without_chunks, h.double(), weight.double(), targets)
    with torch.autocast(device, dtype):
        ours = loss_and_gradients(head_loss, h, weight, targets, factor)
        torchs = loss_and_gradients(loss_without_chunks, h, weight, targets, factor)
    assert ours[0].dtype == torch.float32
    for name, ours_i, torchs_i, exact_i in zip(("loss", "h", "weight"), ours, torchs, exact, strict=True):
        assert (ours_i - exact_i).norm() <= 1.1 * (torchs_i - exact_i).norm() + 1e-9 * exact_i.norm(), name


def test_the_loss_alone_is_the_one_that_comes_with_logits():
    model = toy()
    idx = torch.randint(65, (3, 16))
    with_logits = model(idx, idx)[1]
    none, alone = model(idx, idx, return_logits=False)
    assert none is None
    torch.testing.assert_close(alone, with_logits)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (with_logits, alone)]
    for name, a, b in zip(dict(model.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx, return_logits=False)[1], with_logits)


def test_the_loss_never_holds_all_logits():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    with FakeTensorMode(), Largest() as largest:
        h, weight = torch.randn(65536, 64, requires_grad=True), torch.randn(50304, 64, requires_grad=True)
        loss_and_gradients(head_loss, h, weight, torch.zeros(65536, dtype=torch.long))
    assert largest.elements <= 65536 * 50304 / model_module.LOSS_CHUNKS


def without_cache(model, idx, max_new_tokens, temperature, top_k):
    """What generate does, by a whole forward pass for each token."""
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1, :] / temperature
        if top_k:
            kth = logits.topk(top_k).values[:, [-1]]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        idx = torch.cat((idx, torch.multinomial(F.softmax(logits, dim=-1), 1)), dim=1)
    return idx


@pytest.mark.parametrize(("prompt", "new"), [(1, 15), (5, 40), (16, 3), (30, 4)])  # block_size is 16
@torch.no_grad()
def test_the_cache_of_keys_and_values_changes_no_token(prompt, new):
    model = toy().eval()
    idx = torch.randint(65, (3, prompt))
    drawn = []
    for generate in (without_cache, GPT.generate):
        torch.manual_seed(2)
        drawn.append(generate(model, idx, new, 0.9, 20))
    assert torch.equal(*drawn)


@torch.no_grad()
def test_generating_computes_each_position_once(monkeypatch):
    model = toy().eval()
    computed = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: computed.append(args[0].shape[1]))
    model.generate(torch.zeros((1, 5), dtype=torch.long), 8)
    assert computed == [5] + [1] * 7
