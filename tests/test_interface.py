"""What users are promised: nanoGPT's keys with their defaults, and the documents' commands, run as they stand."""

import ast
import pickle
import re
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, ROOT, environment, flags, run_script, torchrun

from nanofit import machine

DEVICE = machine.best_device()  # nanoGPT's is always 'cuda'
DTYPE = machine.best_dtype(DEVICE)
KEYS = {
    "train.py": dict(
        out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from="scratch", wandb_log=False, wandb_project="owt", wandb_run_name="gpt2",
        dataset="openwebtext", gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12,
        n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9,
        beta2=0.95, grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5,
        backend="nccl", device=DEVICE, dtype=DTYPE, compile=True,
    ),
    "sample.py": dict(
        init_from="resume", out_dir="out", start="\n", num_samples=10, max_new_tokens=500, temperature=0.8, top_k=200,
        seed=1337, device=DEVICE, dtype=DTYPE, compile=False,
    ),
    "bench.py": dict(
        batch_size=12, block_size=1024, bias=False, real_data=True, seed=1337, device=DEVICE, dtype=DTYPE,
        compile=True, profile=False,
    ),
}  # fmt: skip


def listed(script, *argv):
    """{key: value} as --help lists them after what argv made of them, and the whole text."""
    with pytest.raises(SystemExit) as stop:
        run_script(script, *argv, "--help")
    assert stop.value.code == 0
    found = re.findall(r"^  --(\w+)=('.*?'|\S+)", stop.value.text, re.MULTILINE)
    return {key: ast.literal_eval(value) for key, value in found}, stop.value.text


@pytest.mark.parametrize(("script", "count"), [("train.py", 33), ("sample.py", 11), ("bench.py", 9)])
def test_nanogpts_keys_keep_their_defaults(script, count):
    assert len(KEYS[script]) == count
    found, _ = listed(script)
    ours = {key: found.get(key) for key in KEYS[script]}
    assert ours == KEYS[script]
    assert {key: type(value) for key, value in ours.items()} == {k: type(v) for k, v in KEYS[script].items()}


def test_help_shows_what_a_config_file_made_of_a_key():
    found, text = listed("train.py", str(ROOT / "config" / "train_shakespeare_char.py"), "--dropout=0.1")
    assert (found["n_layer"], found["dropout"]) == (6, 0.1)
    assert "\nlearning rate schedule:\n  --decay_lr=True" in text
    assert re.search(r"^  --batch_size=64 .*\(default 12\)$", text, re.MULTILINE)


# ---- the README's commands ---------------------------------------------------------------------------------


@dataclass
class How:
    """How a command is run here: with these flags behind it, after another command, so that it shows this."""

    flags: tuple = ()
    shows: str = ""  # a regular expression
    after: str = ""
    needs: tuple = ()  # fixtures, which skip where something isn't there
    proof: bool = False  # takes long


@dataclass
class Cannot:
    """Why a command can't be run in a test."""

    why: str


TINY = dict(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, compile=False)
SHORT = flags(
    **TINY, device="cpu", gradient_accumulation_steps=4, max_iters=1, eval_iters=1, eval_interval=1, log_interval=1,
    wandb_log=False, always_save_checkpoint=True,
)  # fmt: skip
TRAINED = r"^iter 1: loss \d"
ONE = flags(batch_size=1, gradient_accumulation_steps=1)
TOKENS = r"^train has [\d,]+ tokens"
TEXT, LINES = ("--input=text.txt",), ("--source=documents.txt",)
BY_CHARACTERS = "python train.py config/train_shakespeare_char.py"
EXPORT = "python export.py --out_dir=out-shakespeare-char --to=shakespeare-gpt"
RULES = [  # (a pattern of a command, How); the first that is found in a command is its
    ("report.py", Cannot("tests/test_report.py makes the runs that it wants")),
    ("--nnodes=", Cannot("needs two machines: tests/two_hosts.py makes two of one")),
    ("finetune_shakespeare.py", Cannot("it wants weights: the row of eval_gpt2.py is like it")),
    ("benchmarks/muon.py", Cannot("it takes minutes: its runs are the row's of --optimizer=muon")),
    ("benchmarks/memory.py", How((*flags(block_size=8, batch_sizes="1"),), "^{.*}$", proof=True)),
    ("train.py --help", How(shows="^  --batch_size=12 ")),
    ("--init_from=resume", How(("--max_iters=2",), r"^resuming .* at iteration 1\n(.*\n)*iter 2: loss", BY_CHARACTERS)),
    ("--init_from=shakespeare-gpt", How(SHORT, TRAINED, EXPORT)),
    ("--optimizer=muon", How(SHORT, TRAINED, needs=("muon",))),
    ("--gpu=", How((*flags(**TINY), *ONE), "^auto-fit: batch_size 1, gradient.*$")),
    ("eval_gpt2.py", How((*SHORT[1:], *ONE, "--init_from=hf", "--block_size=8"), "^step 0: train loss", needs=("hf",))),
    ("torchrun.*--auto_fit", How(SHORT, rf"^auto-fit: batch_size .*, effective (.*\n)*{TRAINED[1:]}", proof=True)),
    ("torchrun", How(SHORT, TRAINED, proof=True)),
    ("train.py.*--auto_fit", How((*SHORT, *ONE), rf"^auto-fit: batch_size 1,(.*\n)*{TRAINED[1:]}")),
    ("train.py", How(SHORT, TRAINED)),
    ("doctor.py", How((*SHORT, *ONE), r"^nothing would stop the run$")),
    ("export.py", How((), "shakespeare-gpt", BY_CHARACTERS)),
    ("sample.py --out_dir", How(flags(device="cpu", num_samples=1, max_new_tokens=5), "^O Romeo.{5}\n", BY_CHARACTERS)),
    ("sample.py --init_from", How(("--init_from=hf", "--device=cpu"), "^The prompt", needs=("bpe", "hf"))),
    ("bench.py", How((*flags(**TINY), "--device=cpu"), r"^time per iteration: \d.*ms, MFU")),
    ("data/python_char", How((), TOKENS)),
    ("data/shakespeare_char", How(TEXT, TOKENS)),
    ("data/shakespeare", How(TEXT, TOKENS, needs=("bpe",))),
    ("data/openwebtext.*--name", How((*LINES, "--name="), TOKENS, needs=("bpe",))),
    ("data/openwebtext", How(LINES, TOKENS, needs=("bpe",))),
    ("data/from_text", How((), TOKENS, needs=("bpe",))),
]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(path):
    """The python and torchrun commands of a Markdown file, those in mid-sentence too; lines that go on are joined."""
    text = re.sub(r"\s*\\\n\s*", " ", path.read_text(encoding="utf-8"))
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    alone = re.findall(r"^(?:\$ )?((?:python3?|torchrun) .*?)(?: +#.*)?$", blocks, re.MULTILINE)
    return {*alone, *re.findall(r"`((?:python3?|torchrun) [^`\n]+)`", text)}


def how_of(command):
    return next((how for pattern, how in RULES if re.search(pattern, command)), Cannot(""))


COMMANDS = sorted(set().union(*map(commands_of, DOCUMENTS)))


@pytest.mark.proof
def test_the_plan_that_the_readme_shows_is_what_its_command_prints(checkout):
    block = r"^\$ python train.py (.*)\n\.\.\.\n((?:auto-fit: .*\n)+)"
    [(arguments, shown)] = re.findall(block, (ROOT / "README.md").read_text(), re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        run_script("train.py", *shlex.split(arguments))
    told = [line for line in stop.value.text.splitlines() if line.startswith("auto-fit: ")]
    seconds = r", found in \d+ s"
    assert [re.sub(seconds, "", line) for line in shown.splitlines()] == [re.sub(seconds, "", line) for line in told]


@pytest.mark.parametrize(("folder", "not_named"), [("benchmarks", {"common", "nanogpt"}), ("nanofit", {"__init__"})])
def test_the_map_names_each_file(folder, not_named):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    missing = {path.stem for path in (ROOT / folder).glob("*.py") if f"`{folder}/{path.name}`" not in text}
    assert missing == not_named


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.fixture
def checkout(workplace, monkeypatch):
    """The current folder as a checkout is, with small data sets where the README's commands look for theirs."""
    for path in (*ROOT.glob("*.py"), ROOT / "nanofit", ROOT / "config", ROOT / "benchmarks"):
        (workplace / path.name).symlink_to(path)
    kept = shutil.ignore_patterns("*.bin", "*.pkl", "input.txt", "__pycache__")
    shutil.copytree(ROOT / "data", "data", ignore=kept, dirs_exist_ok=True)
    symbols = string.ascii_letters + string.digits + " \n."
    meta = {"vocab_size": 65, "stoi": {s: i for i, s in enumerate(symbols)}, "itos": dict(enumerate(symbols))}
    for name in ("openwebtext", "edu", "shakespeare_char"):
        Path("data", name).mkdir(exist_ok=True)
        for split in ("train", "val"):
            shutil.copy(REFERENCE / "markov" / f"{split}.bin", f"data/{name}")
    Path("data/shakespeare_char/meta.pkl").write_bytes(pickle.dumps(meta))
    Path("text.txt").write_text("To be, or not to be" * 10 + "O Romeo...")
    Path("FOLDER").mkdir()
    shutil.copy("text.txt", "FOLDER")
    Path("documents.txt").write_text("One.\n\nTwo.\n")
    Path("prompt.txt").write_text("The prompt")
    monkeypatch.setenv("HF_HOME", str(workplace / "hf-home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def muon():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9")


def run(command):
    """What a command of the README prints with the flags of its row behind it."""
    program, name, *arguments = shlex.split(command)
    arguments += how_of(command).flags
    if program == "torchrun":
        return torchrun(name, *arguments)[0].text
    if "/" not in name:  # a script of the project, in this process
        try:
            return run_script(name, *arguments).text
        except SystemExit as stop:
            if stop.code:
                raise
            return stop.text
    if name.startswith("data/"):  # what is prepared doesn't replace what is larger
        for path in Path("data").glob("*/*.bin"):
            path.unlink()
    done = subprocess.run([sys.executable, name, *arguments], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_after(command):
    """The same, after the commands that its row wants before it."""
    if how_of(command).after:
        run_after(how_of(command).after)
    return run(command)


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.proof if getattr(how_of(c), "proof", False) else ()) for c in COMMANDS],
)
def test_commands_of_the_readme(checkout, command, request):
    how = how_of(command)
    if isinstance(how, Cannot):
        assert how.why, "a row of RULES must tell how it is run, or why it can't be"
        pytest.skip(how.why)
    for fixture in how.needs:
        request.getfixturevalue(fixture)
    text = run_after(command)
    assert re.search(how.shows, text, re.MULTILINE), text
