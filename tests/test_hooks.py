"""What train.py and sample.py do with what export.py writes."""

import torch
from conftest import flags, run_script, train
from test_export import difference, drawn, export, ours, save, trained

from model import GPT
from nanofit import checkpoint, models


def sample(**keys):
    return run_script(
        "sample.py", *flags(device="cpu", num_samples=1, max_new_tokens=20, top_k=1, start="HELLO", **keys)
    ).text


def test_the_activation_survives_training_and_resuming():
    model = drawn(vocab_size=65, block_size=32, bias=True)
    models.set_activation(model, "gelu_new")
    save(model, activation="gelu_new", config={"dataset": "markov"})
    export(to="hf")
    train(init_from="hf", max_iters=10)
    assert checkpoint.load("out")["activation"] == "gelu_new"
    resumed = train(init_from="resume", max_iters=12)
    assert models.activation_of(resumed.names["raw_model"]) == "gelu_new"
    export(to="again")
    assert difference(GPT.from_pretrained("again").eval(), ours()) < 1e-4


def test_an_exact_gelu_is_recorded_and_nothing_else_of_model_args_changes():
    train(max_iters=10)
    saved = torch.load("out/ckpt.pt")
    assert saved["activation"] == "gelu"
    assert list(saved["model_args"]) == ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"]


def test_folders_are_sampled_from():
    trained()
    expected = sample().split("symbols:")[1].split("\n", 1)[1]
    export(to="hf")
    assert sample(init_from="hf").split("symbols:")[1].split("\n", 1)[1] == expected
