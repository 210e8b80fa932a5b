"""A model that users bring: model.py replaced by another, and the scripts run as they are.

tests/models/ holds nanoGPT's interface as nanoGPT has it, and a fork with other blocks and a GPTConfig of its own.
Each is put beside copies of the scripts. One process makes many runs, as starting it takes longer than they do.
"""

import dataclasses
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import REFERENCE, ROOT, TOY, Run, environment, flags, run_script, train_on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from model import GPT, GPTConfig
from nanofit import models
from nanofit.autofit.plan import Job
from nanofit.autofit.simulate import step_memory
from nanofit.errors import UsageError
from nanofit.units import MemoryLevers

TOLERANCE = 3e-4  # of a printed loss, between processors
LACKS_RETURN_LOGITS = r"^model\.py offers no return_logits.*all logits are held.*$"

# Runs scripts of its folder, in turn, and writes what became of each. What the user would meet as a sentence is its
# sentence; any other error is kept with its type. kept: elements that the forward passes kept for the backward
# ones, weights aside.
DRIVER = """
import contextlib, io, json, runpy, sys
import torch
from nanofit.errors import UsageError

def is_weight(tensor):
    base = tensor if tensor._base is None else tensor._base
    return base.is_leaf and base.requires_grad

runs, results = json.load(sys.stdin), []
for script, argv in runs:
    out, err, kept, sentence, code, names = io.StringIO(), io.StringIO(), [0], None, 0, {}
    def keep(tensor):
        kept[0] += 0 if is_weight(tensor) else tensor.numel()
        return tensor
    sys.argv, hook, stdout = [script, *argv], sys.excepthook, sys.stdout
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                names = runpy.run_path(script, run_name="__main__")
    except UsageError as e:
        sentence = str(e)
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        sentence = f"{type(e).__name__}, which no user should meet: {e}"
    sys.excepthook, sys.stdout = hook, stdout
    model = names.get("raw_model", names.get("model"))
    shape = vars(model.config) if model is not None else None
    told = dict(stderr=err.getvalue(), sentence=sentence, code=code, kept=kept[0], shape=shape)
    results.append([out.getvalue(), told])
with open("results.json", "w") as f:
    json.dump(results, f)
"""


class Checkout:
    """A checkout of this project in which somebody replaced model.py, with the toy data."""

    def __init__(self, folder, model):
        self.folder = folder
        folder.mkdir()
        for script in ROOT.glob("*.py"):
            shutil.copy(script, folder)
        for package in ("nanofit", "config"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "tests" / "models" / model, folder / "model.py")
        (folder / "drive.py").write_text(DRIVER)
        shutil.copytree(REFERENCE / "markov", folder / "data" / "markov")

    def run(self, runs):
        """{name: Run} for {name: (script, argument, ...)}, made in turn in one process."""
        done = subprocess.run(
            [sys.executable, "drive.py"],
            input=json.dumps([(script, argv) for script, *argv in runs.values()]),
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={k: v for k, v in environment().items() if k not in ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")},
        )
        assert done.returncode == 0, done.stderr
        results = json.loads((self.folder / "results.json").read_text())
        return {name: Run(*result) for name, result in zip(runs, results, strict=True)}

    def checkpoint(self, out_dir):
        return torch.load(self.folder / out_dir / "ckpt.pt", weights_only=True)


def training(*argv, **keys):
    return "train.py", *argv, *flags(**{**TOY, **keys})


def sampling(out_dir, *argv):
    keys = dict(out_dir=out_dir, device="cpu", num_samples=2, max_new_tokens=40, start="AB", top_k=5, seed=7)
    return "sample.py", *argv, *flags(**keys)


def benching(**keys):
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2)
    return "bench.py", *flags(**sizes, real_data=False, compile=False, device="cpu", **keys)


def ended_well(run):
    assert run.names["sentence"] is None
    assert run.names["code"] == 0
    assert "no script knows" not in run.names["stderr"]
    return run


def assert_same_run(a, b, start=0):
    """That b is a, from iteration start on."""
    ended_well(a), ended_well(b)
    assert b.iter_loss, b.text
    assert b.iter_loss == {i: loss for i, loss in a.iter_loss.items() if i >= start}
    assert b.eval_loss == {i: loss for i, loss in a.eval_loss.items() if i >= start}


def assert_same_weights(a, b):
    assert list(a["model"]) == list(b["model"])
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name


def samples(run):
    return re.findall(r"^(AB.{40})\n-{15}$", ended_well(run).text, re.MULTILINE | re.DOTALL)


def split_of(run):
    """(batch_size, accumulation) as configured, and as auto-fit split them."""
    line = r"^auto-fit: batch_size (\d+) -> (\d+), gradient_accumulation_steps (\d+) -> (\d+), effective batch (\d+), "
    [found] = re.findall(line, ended_well(run).text, re.MULTILINE)
    batch, micro, steps, micro_steps, effective = map(int, found)
    assert batch * steps == micro * micro_steps == effective
    return (batch, steps), (micro, micro_steps)


# ---- nanoGPT's own -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory, hugging_face_gpt2):
    """(checkout, runs) with a model.py of nanoGPT's interface."""
    checkout = Checkout(tmp_path_factory.mktemp("nanogpt") / "checkout", "nanogpt_like.py")
    reference = json.loads((REFERENCE / "losses.json").read_text())
    (checkout.folder / "out-resumed").mkdir()
    shutil.copy(REFERENCE / "upstream_ckpt.pt", checkout.folder / "out-resumed" / "ckpt.pt")
    (checkout.folder / "theirs").mkdir()
    shutil.copy(REFERENCE / "upstream_ckpt.pt", checkout.folder / "theirs" / "ckpt.pt")
    runs = {name: ("train.py", *flags(**expected["args"])) for name, expected in reference.items()}
    runs["whole"] = training(max_iters=23, out_dir="whole", dropout=0.1)
    runs["part"] = training(max_iters=17, out_dir="parts", dropout=0.1)
    runs["rest"] = training(max_iters=23, out_dir="parts", dropout=0.1, init_from="resume")
    runs["cropped"] = training(max_iters=22, out_dir="out-to_resume", init_from="resume", block_size=16)
    runs["recomputed"] = training(**{**reference["plain"]["args"], "out_dir": "recomputed"}, recompute=True)
    runs["sampled"] = sampling("theirs")
    runs["benched"] = benching()
    runs["no such pretrained"] = training(init_from="gpt3")
    runs["a folder"] = training(init_from=hugging_face_gpt2[0], out_dir="refused")
    runs["heads of unequal size"] = training(n_head=3, out_dir="refused too")
    return checkout, checkout.run(runs)


in_one_process = pytest.mark.xdist_group("nanogpt-like")


@in_one_process
@pytest.mark.parametrize("name", ["plain", "to_resume", "resumed", "biased", "accumulated"])
def test_nanogpts_model_trains_as_in_nanogpt(nanogpt, reference, name):
    run, expected = ended_well(nanogpt[1][name]), reference[name]
    assert set(run.eval_loss) == {int(i) for i in expected["eval_loss"]}
    for i, losses in expected["eval_loss"].items():
        assert run.eval_loss[int(i)] == pytest.approx(losses, abs=TOLERANCE), f"evaluation at {i}"
    assert set(run.iter_loss) == {int(i) for i in expected["iter_loss"]}
    if expected["args"]["gradient_accumulation_steps"] == 1:  # else nanoGPT prints the last micro-batch's loss alone
        for i, loss in expected["iter_loss"].items():
            assert run.iter_loss[int(i)] == pytest.approx(loss, abs=TOLERANCE), f"iteration {i}"


@in_one_process
def test_one_line_says_what_nanogpts_model_lacks(nanogpt):
    text = nanogpt[1]["plain"].text
    assert len(re.findall(LACKS_RETURN_LOGITS, text, re.MULTILINE)) == 1
    assert text.count("model.py offers") == 1


def test_nothing_is_said_to_lack_in_ours():
    run = run_script("train.py", *flags(**{**TOY, "max_iters": 0}))
    assert "model.py offers" not in run.text


@in_one_process
def test_nanogpts_model_resumes_bit_for_bit(nanogpt):
    checkout, runs = nanogpt
    assert_same_run(runs["whole"], runs["rest"], start=18)
    assert set(checkout.checkpoint("whole")["model_args"]) == set(torch.load(
        REFERENCE / "upstream_ckpt.pt", weights_only=True)["model_args"])  # fmt: skip
    assert_same_weights(checkout.checkpoint("whole"), checkout.checkpoint("parts"))


@in_one_process
def test_nanogpts_model_goes_on_with_a_shorter_block(nanogpt):
    run = ended_well(nanogpt[1]["cropped"])
    assert run.names["shape"]["block_size"] == 16
    assert "tokens per iteration will be: 128\n" in run.text
    assert set(run.iter_loss) == {20, 21, 22}


@in_one_process
def test_nanogpts_blocks_are_recomputed_from_outside(nanogpt):
    checkout, runs = nanogpt
    assert_same_run(runs["plain"], runs["recomputed"])
    assert_same_weights(checkout.checkpoint("out-plain"), checkout.checkpoint("recomputed"))
    assert runs["recomputed"].names["kept"] < 0.5 * runs["plain"].names["kept"]


@in_one_process
def test_nanogpts_model_samples_what_ours_samples(nanogpt, workplace):
    shutil.copytree(nanogpt[0].folder / "theirs", workplace / "theirs")
    script, *argv = sampling("theirs")
    texts = samples(nanogpt[1]["sampled"])
    assert len(texts) == 2
    assert texts == re.findall(r"^(AB.{40})\n-{15}$", run_script(script, *argv).text, re.MULTILINE | re.DOTALL)


@in_one_process
def test_nanogpts_model_is_timed(nanogpt):
    run = ended_well(nanogpt[1]["benched"])
    assert re.fullmatch(r"time per iteration: \d+\.\d{4}ms, MFU: \d+\.\d\d%", run.text.splitlines()[-1])


@in_one_process
def test_what_nanogpts_model_refuses_is_a_sentence(nanogpt):
    """Its asserts have no words of their own."""
    sentences = {name: run.names["sentence"] for name, run in nanogpt[1].items()}
    assert re.match("init_from must be 'scratch', 'resume', .*gpt2-xl.*not 'gpt3'", sentences["no such pretrained"])
    assert re.match(
        r"init_from='.*': model.py, line \d+, refuses: assert model_type in \(.*gpt2-xl", sentences["a folder"]
    )
    refusal = r"model.py, line \d+, refuses: assert config.n_embd % config.n_head == 0"
    assert re.fullmatch(refusal, sentences["heads of unequal size"])


# A vocabulary of 50304, as the data set has no meta.pkl: a token's logits and their gradient take 0.6 MB.
LARGE = dict(dataset="openwebtext", n_layer=1, n_embd=32, max_iters=0, eval_iters=1, auto_fit=True)
FITTED = dict(batch_size=4, block_size=256, memory_limit_gb=0.85, **LARGE)  # of which torch takes 0.3
PLANNED = dict(batch_size=1, block_size=2048, device="cuda", memory_limit_gb=3, dry_run=True, **LARGE)


def assert_fitted(run):
    """That FITTED was split, trained and evaluated."""
    configured, found = split_of(run)
    assert configured == (4, 1)
    assert found in ((1, 4), (2, 2))
    assert set(run.iter_loss) == set(run.eval_loss) == {0}
    assert run.iter_loss[0] == pytest.approx(math.log(50304), abs=0.05), "nats, as nothing is learnt yet"


def assert_planned(run):
    """That PLANNED was planned, with the logits that the model holds."""
    assert split_of(run) == ((1, 1), (1, 1))
    assert "simulated on fake tensors: nothing is measured" in run.text
    [parts] = re.findall(r"^auto-fit: of [\d.]+ GiB \(simulated\): (.*)$", run.text, re.MULTILINE)
    gib = {part: float(size) for part, size in re.findall(r"([a-z ]+?) ([\d.]+)(?:, |$)", parts)}
    assert gib["loss and backward"] > 2 * 2048 * 50304 * 4 / 2**30, "logits and their gradient in float32"


def without_alphabet(checkout):
    """Give a checkout a data set that has no meta.pkl."""
    (checkout.folder / "data" / "openwebtext").mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(REFERENCE / "markov" / name, checkout.folder / "data" / "openwebtext")


@pytest.mark.proof
def test_nanogpts_model_is_fitted(tmp_path):
    checkout = Checkout(tmp_path / "checkout", "nanogpt_like.py")
    without_alphabet(checkout)
    run = checkout.run({"fitted": training(**FITTED)})["fitted"]
    assert_fitted(run)
    assert len(re.findall(LACKS_RETURN_LOGITS, run.text, re.MULTILINE)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_nanogpts_model_is_planned_for(tmp_path):
    run = Checkout(tmp_path / "checkout", "nanogpt_like.py").run({"planned": training(**PLANNED)})["planned"]
    assert_planned(run)
    assert len(re.findall(LACKS_RETURN_LOGITS, run.text, re.MULTILINE)) == 1


# ---- a fork ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """(checkout, runs) with a model.py of other blocks and two fields more."""
    checkout = Checkout(tmp_path_factory.mktemp("fork") / "checkout", "modern.py")
    (checkout.folder / "mine.py").write_text("n_kv_head = 1\nrope_base = 5e3\n")
    fields = dict(n_kv_head=1, rope_base=5000.0)
    runs = {
        "whole": training("mine.py", max_iters=23, out_dir="whole", dropout=0.1),
        "part": training(max_iters=17, out_dir="parts", dropout=0.1, **fields),
        "rest": training(max_iters=23, out_dir="parts", dropout=0.1, init_from="resume"),
        "sampled": sampling("parts", "mine.py"),
        "short": training(max_iters=1, eval_iters=1, out_dir="short", **fields),
        "other heads": training(max_iters=2, out_dir="short", init_from="resume", n_kv_head=2),
        "cropped": training(max_iters=4, out_dir="short", init_from="resume", block_size=16),
        "kept": training(max_iters=10, out_dir="kept"),
        "recomputed": training(max_iters=10, out_dir="recomputed", recompute=True),
        "benched": benching(n_kv_head=1),
        "benched with as many": benching(n_kv_head=2),
        "help": ("train.py", "--help"),
        "no number": training(n_kv_head="two"),
        "a word": training(rope_base="long"),
        "typo": training(n_kv_heads=1),
        "sampled with other heads": ("sample.py", "--out_dir=parts", "--n_kv_head=2"),
        "pretrained": training(init_from="gpt2"),
    }
    return checkout, checkout.run(runs)


in_another_process = pytest.mark.xdist_group("fork")


@in_another_process
def test_a_fork_trains_and_resumes_bit_for_bit(fork):
    """Fields given by a config file or by flags, and after that taken from the checkpoint."""
    checkout, runs = fork
    assert set(runs["whole"].iter_loss) == set(range(24))
    assert_same_run(runs["whole"], runs["rest"], start=18)
    assert_same_weights(checkout.checkpoint("whole"), checkout.checkpoint("parts"))
    for run in (runs["part"], runs["rest"]):
        assert run.names["shape"]["n_kv_head"] == 1
        assert run.names["shape"]["rope_base"] == 5000.0


@in_another_process
def test_a_forks_fields_are_kept_in_the_checkpoint(fork):
    args = fork[0].checkpoint("whole")["model_args"]
    assert args == fork[1]["whole"].names["shape"]
    assert args["n_kv_head"] == 1
    untouched = fork[0].checkpoint("kept")
    assert untouched["model_args"]["n_kv_head"] is None
    assert untouched["model_args"]["rope_base"] == 10000.0
    assert untouched["model"]["transformer.h.0.attention.to_kv.weight"].shape == (128, 64), "as many as n_head"
    assert {"n_kv_head", "rope_base"} <= set(untouched["config"])
    resumed = ended_well(fork[1]["other heads"])
    assert resumed.names["shape"]["n_kv_head"] == 1
    assert "differs, but stays as it is in the checkpoint: n_kv_head 1, not 2\n" in resumed.text


@in_another_process
def test_a_forks_fields_are_keys_like_any_other(fork):
    runs = fork[1]
    assert runs["help"].names["code"] == 0
    assert re.search(r"--n_kv_head\b.*None", runs["help"].text)
    assert re.search(r"--rope_base\b.*10000\.0", runs["help"].text)
    assert "n_kv_head must be a whole number" in runs["no number"].names["sentence"]
    assert "not 'two'" in runs["no number"].names["sentence"]
    assert "rope_base must be a number" in runs["a word"].names["sentence"]
    assert "train.py has no key 'n_kv_heads': did you mean 'n_kv_head'?" in runs["typo"].names["sentence"]
    sentence = runs["sampled with other heads"].names["sentence"]
    assert sentence == "sample.py has no key 'n_kv_head': it belongs to model.py"


@in_another_process
def test_a_fork_samples_as_its_checkpoint_says(fork):
    run = fork[1]["sampled"]
    assert len(set(samples(run))) == 2
    assert (run.names["shape"]["n_kv_head"], run.names["shape"]["rope_base"]) == (1, 5000.0)


@in_another_process
def test_a_fork_goes_on_with_a_shorter_block(fork):
    run = ended_well(fork[1]["cropped"])
    assert run.names["shape"]["block_size"] == 16
    assert set(run.iter_loss) == {3, 4}


@in_another_process
def test_a_forks_blocks_are_recomputed_from_outside(fork):
    checkout, runs = fork
    assert_same_run(runs["kept"], runs["recomputed"])
    assert_same_weights(checkout.checkpoint("kept"), checkout.checkpoint("recomputed"))
    assert runs["recomputed"].names["kept"] < 0.5 * runs["kept"].names["kept"]


@in_another_process
def test_a_fork_is_timed(fork):
    for heads, name in ((1, "benched"), (2, "benched with as many")):
        run = ended_well(fork[1][name])
        assert run.names["shape"]["n_kv_head"] == heads
        assert re.fullmatch(r"time per iteration: \d+\.\d{4}ms, MFU: \d+\.\d\d%", run.text.splitlines()[-1])


@in_another_process
def test_a_fork_that_has_nothing_pretrained_says_so(fork):
    sentence = fork[1]["pretrained"].names["sentence"]
    assert sentence.startswith("init_from='gpt2': model.py offers no from_pretrained: start from scratch")


@pytest.mark.slow
def test_a_fork_is_fitted(tmp_path):
    checkout = Checkout(tmp_path / "checkout", "modern.py")
    without_alphabet(checkout)
    assert_fitted(checkout.run({"fitted": training(**FITTED, n_kv_head=1)})["fitted"])


PLACED = """
import os, runpy, sys
from nanofit import sharding

place = sharding.place
def placed(model, *args):
    there = {not tensor.is_meta for tensor in (*model.parameters(), *model.buffers())}
    open("there" + os.environ["RANK"], "w").write(str(there))
    place(model, *args)
sharding.place = placed
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.proof
def test_a_fork_is_shared_out(tmp_path, monkeypatch):
    """Its weights, and buffers that no checkpoint holds, come from rank 0: another rank builds it without memory."""
    checkout = Checkout(tmp_path / "checkout", "modern.py")
    keys = dict(gradient_accumulation_steps=2, max_iters=6)
    alone = ended_well(checkout.run({"alone": training(**keys, out_dir="alone")})["alone"])
    monkeypatch.chdir(checkout.folder)
    (checkout.folder / "placed.py").write_text(PLACED)
    run, _, _ = train_on_ranks(2, script="placed.py", **keys, shard=True)
    assert [(checkout.folder / f"there{rank}").read_text() for rank in (0, 1)] == ["{True}", "{False}"]
    assert run.iter_loss == pytest.approx(alone.iter_loss, abs=TOLERANCE)
    rest, _, _ = train_on_ranks(2, script="placed.py", **{**keys, "max_iters": 9}, shard=True, init_from="resume")
    assert min(rest.iter_loss) == 7


class LooksAtValues(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.rates = [layer.item() / config.n_layer for layer in torch.arange(config.n_layer)]


class KeepsATensor(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.ones(3)


class KeepsSomeInADict(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.angles = {"cos": torch.ones(3)}


class AsksNumpy(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.table = torch.ones(3).numpy()


HELD_BACK = (LooksAtValues, KeepsATensor, KeepsSomeInADict, AsksNumpy)


@pytest.mark.parametrize(("model", "empty"), [(GPT, True), *((held_back, False) for held_back in HELD_BACK)])
def test_a_model_is_built_empty_where_it_can_be(model, empty):
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=65)
    built = models.build(model, GPTConfig, sizes, empty=True)
    assert {p.is_meta for p in built.parameters()} == {empty}
    assert not any(p.is_meta for p in models.build(model, GPTConfig, sizes).parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_fork_is_planned_for(tmp_path):
    runs = {"one": training(**PLANNED, n_kv_head=1)}
    assert_planned(Checkout(tmp_path / "checkout", "modern.py").run(runs)["one"])


# ---- what is looked for, by itself -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "counter"])  # which no state_dict holds
def test_whatever_a_model_holds_a_resumed_run_goes_on_as_the_uninterrupted_one(kind):
    whole, parts = tiny.made(kind), tiny.made(kind)
    losses = tiny.iterations(*whole, 0, 30)
    tiny.iterations(*parts, 0, 20)
    rest = tiny.resumed(*parts, kind=kind)
    assert tiny.iterations(*rest, 20, 30) == losses[20:]
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), rest[0].parameters(), strict=True))


def test_a_model_that_reads_values_is_built_of_fake_tensors():
    mode = FakeTensorMode()
    model = models.build_fake(tiny.GPT, tiny.GPTConfig, {**tiny.SIZES, "kind": "reads values"}, mode)
    with mode:
        loss = models.loss_of(model, *torch.zeros((2, 4, 8), dtype=torch.int64))
        loss.backward()
    assert model.lm_head.weight.grad.shape == (65, 16)
    assert model.lm_head.weight is model.transformer.wte.weight


@dataclasses.dataclass
class Config:
    """A GPTConfig whose author had ideas."""

    dropout: float = 0.0
    noise: float = 0.1
    window: int | None = None
    pattern: tuple = ("local", "global")


@dataclasses.dataclass
class Annotated:
    rope_theta: float = 10000
    scale: float = np.float32(0.5)
    steps: np.int64 = np.int64(3)  # noqa: RUF009
    limit: float | None = None
    seen: "Unknown" = 2  # noqa: F821


@dataclasses.dataclass
class Unset:
    n_experts: int


def test_fields_become_keys_where_a_key_can_set_them():
    assert models.own_fields(Config) == {"noise": (float, 0.1), "window": (int, None)}
    kinds = {name: kind for name, (kind, _) in models.own_fields(Annotated).items()}
    assert kinds == {"rope_theta": float, "scale": float, "steps": int, "limit": float, "seen": int}
    assert models.config_of(Config, {"n_layer": 2, "noise": 0.2}) == Config(noise=0.2)
    with pytest.raises(UsageError, match="the field n_experts of GPTConfig has no default"):
        models.own_fields(Unset)


class Noisy(torch.nn.Module):
    """Blocks that draw random numbers, whatever dropout is."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(config.noise)) for _ in range(2)]
        self.transformer = torch.nn.ModuleDict({"h": torch.nn.ModuleList(blocks)})

    def forward(self, x):
        for block in self.transformer.h:
            x = torch.tanh(block(x))
        return x


def test_what_is_recomputed_draws_the_same_numbers_again():
    gradients = []
    for levers in (MemoryLevers(), MemoryLevers(recompute=True)):
        torch.manual_seed(0)
        model = Noisy(Config())
        models.apply_levers(model, levers)
        gradients.append(torch.autograd.grad(model(torch.ones(64, 8)).sum(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_without_transformer_h_is_told_when_recompute_is_asked_for(capsys):
    model = torch.nn.Linear(2, 2)
    model.config = Config()
    models.apply_levers(model, MemoryLevers())
    assert capsys.readouterr().out == ""
    models.apply_levers(model, MemoryLevers(recompute=True))
    assert capsys.readouterr().out == "model.py has no transformer.h: recompute does nothing\n"


@pytest.fixture
def brought():
    """{name: (GPT, GPTConfig)} of the stand-ins."""
    found = {}
    for name in ("nanogpt_like", "modern"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "models" / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[name] = module.GPT, module.GPTConfig
    return found


@pytest.mark.parametrize("name", ["nanogpt_like", "modern"])
def test_dropout_costs_a_plan_no_attention_matrices_in_any_model(brought, name):
    peaks = []
    for dropout in (0.0, 0.2):
        sizes = dict(n_layer=2, n_head=4, n_embd=64, block_size=1024, vocab_size=65, bias=False, dropout=dropout)
        job = Job(
            source={}, model_args=sizes, device="cuda", dtype="bfloat16", grad_clip=1.0, micro_batch_size=2,
            micro_steps=1,
        )  # fmt: skip
        peaks.append(sum(step_memory(*brought[name], job, MemoryLevers()).values()))
    assert peaks[0] < peaks[1] < 1.3 * peaks[0], "masks are a byte for each value that they drop"


@pytest.mark.parametrize(("state", "share"), [("float32", 2), ("offload", 0)])
def test_an_optimizer_that_is_not_fused_is_simulated(brought, state, share):
    sizes = dict(n_layer=1, n_head=2, n_embd=128, block_size=16, vocab_size=64, bias=False, dropout=0.0)
    job = Job(
        source={}, model_args=sizes, device="cuda", dtype="float32", grad_clip=1.0, micro_batch_size=1,
        micro_steps=1,
    )  # fmt: skip
    parts = step_memory(*brought["nanogpt_like"], job, MemoryLevers(optimizer_state=state))
    assert parts["optimizer state"] == pytest.approx(share * parts["weights"], rel=0.01)
