"""HellaSwag's accuracy beside the loss, against what a plain loop computes."""

import json
import pickle
import random

import pytest
import torch
from conftest import train

from model import GPT, GPTConfig
from nanofit import models
from nanofit.codec import codec_of
from nanofit.errors import UsageError
from nanofit.hellaswag import HellaSwag
from nanofit.ranks import ALONE, World
from nanofit.step import more_figures

CPU = torch.device("cpu")
BLOCK_SIZE = 16
SIZES = dict(n_layer=1, n_head=2, n_embd=32, block_size=BLOCK_SIZE, vocab_size=65)


@pytest.fixture(autouse=True)
def symbols(workplace):
    with open("data/markov/meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": 65, "stoi": {chr(32 + i): i for i in range(65)}}, file)


def a_file(items=20, symbols="ABCD"):
    """Items whose contexts are shorter or longer than BLOCK_SIZE, and whose endings differ in length."""
    draw = random.Random(0)
    text = lambda low, high: "".join(draw.choices(symbols, k=draw.randint(low, high)))  # noqa: E731
    lines = [
        {"ctx": text(1, 30), "endings": [text(1, 9) for _ in range(4)], "label": draw.randrange(4)}
        for _ in range(items)
    ]
    with open("items.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return lines


def made():
    torch.manual_seed(0)
    model = models.build(GPT, GPTConfig, SIZES)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # or every ending is nearly as likely as another
    return model


def plainly(model, lines, encode):
    """Token by token: the last logits of what comes before it."""
    means = sums = 0
    for line in lines:
        found = []
        for ending in line["endings"]:
            own = encode(" " + ending)
            tokens = (encode(line["ctx"]) + own)[-BLOCK_SIZE - 1 :]
            total = 0.0
            for place in range(len(tokens) - len(own), len(tokens)):
                logits, _ = model(torch.tensor([tokens[:place]]))
                total += torch.log_softmax(logits[0, -1], 0)[tokens[place]].item()
            found.append((total / len(own), total))
        means += max(range(4), key=lambda i: found[i][0]) == line["label"]
        sums += max(range(4), key=lambda i: found[i][1]) == line["label"]
    return {"hellaswag": means / len(lines), "hellaswag_sum": sums / len(lines)}


def test_twenty_items_are_what_a_plain_loop_computes_on_any_number_of_ranks():
    lines, model, encode = a_file(), made(), codec_of("data/markov").encode
    expected = plainly(model.eval(), lines, encode)
    assert expected["hellaswag"] != expected["hellaswag_sum"], "or the two could be mistaken for each other"
    generator = torch.get_rng_state()
    found = more_figures(model, [HellaSwag("items.jsonl", "data/markov", SIZES, ALONE, CPU, "float32")])
    assert found == pytest.approx(expected)
    assert torch.equal(torch.get_rng_state(), generator), "so that a run resumes as it would without it"
    parts = []
    for rank in range(3):
        world = World(rank=rank, size=3)
        world.all_gather = lambda value: [value]
        parts.append(more_figures(model, [HellaSwag("items.jsonl", "data/markov", SIZES, world, CPU, "float32")]))
    assert {name: sum(part[name] for part in parts) for name in expected} == pytest.approx(expected)


def test_a_run_prints_and_keeps_it():
    a_file()
    text = train(hellaswag="items.jsonl", max_iters=0).text
    assert ", hellaswag 0." in text
    with open("out/metrics.jsonl") as file:
        assert {"hellaswag", "hellaswag_sum"} <= set(json.loads(file.readlines()[1]))


def test_what_fails_beside_the_loss_leaves_the_others_figures(capsys):
    def mine(model):
        raise RuntimeError("odd")

    assert more_figures(made(), [mine, lambda model: {3: 1.0}]) == {"3": 1.0}
    assert capsys.readouterr().out.endswith("mine failed (RuntimeError: odd): training goes on\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "hellaswag='items.jsonl' holds no items"),
        ('\n{"ctx": "A"}\n', "line 2 can't be read .KeyError: 'endings'.: it must hold lines of JSON"),
        ('{"ctx": "A", "endings": ["\u2603"], "label": 0}\n', "hellaswag='items.jsonl', line 1: .*lack"),
        ('{"ctx": "A", "endings": ["A"], "label": 1}\n', "label 1 names none of 1 endings"),
    ],
)
def test_another_file_is_a_sentence(content, sentence):
    with open("items.jsonl", "w", encoding="utf-8") as file:
        file.write(content)
    with pytest.raises(UsageError, match=sentence):
        train(hellaswag="items.jsonl")
    with pytest.raises(UsageError, match="hellaswag='nowhere' can't be read"):
        train(hellaswag="nowhere")
