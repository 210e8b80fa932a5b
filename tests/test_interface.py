"""What users are promised: nanoGPT's keys with their defaults, and the documents' commands, run as they stand."""

import ast
import pickle
import re
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, ROOT, environment, flags, run_script, torchrun

from nanofit import machine

# ---- keys --------------------------------------------------------------------------------------------------

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
    assert re.search(r"^  --batch_size=64 +sequences in a micro-step \(default 12\)$", text, re.MULTILINE)
    assert re.search(r"^  --log_interval=10 +iterations between lines \(default 1\)$", text, re.MULTILINE)
    assert re.search(r"^  --dropout=0.1 +0 for pretraining; .*\(default 0.0\)$", text, re.MULTILINE)


# ---- the README's commands ---------------------------------------------------------------------------------


@dataclass
class How:
    """How a command is run here: with these flags behind it, after another command, so that it shows this."""

    flags: tuple = ()
    shows: str = ""  # a regular expression
    after: str = ""
    needs: tuple = ()  # fixtures, which skip where something isn't there
    proof: bool = False  # takes long, and much of it is told by other rows


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
TEXT = ("--input=text.txt",)
FITTED = How((*SHORT, *ONE), r"^auto-fit: batch_size 1,(.*\n)*iter 1: loss \d")
DOCUMENTS = How(("--source=documents.txt",), "^train has 3 tokens", needs=("bpe",))
BY_CHARACTERS = "python train.py config/train_shakespeare_char.py"
LAPTOP = (
    f"{BY_CHARACTERS} --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
EXPORT = "python export.py --out_dir=out-shakespeare-char --to=shakespeare-gpt"
COMMANDS = {
    "python train.py --help": How(shows="^  --batch_size=12 "),
    "python train.py config/train_openwebtext.py --auto_fit=True": FITTED,
    "python report.py out-a out-b": Cannot("it wants two runs: tests/test_report.py makes them"),
    "python report.py out": Cannot("tests/test_report.py makes the run that it wants"),
    "python doctor.py config/train_openwebtext.py": How((*SHORT, *ONE), r"^nothing would stop the run$"),
    EXPORT: How((), "shakespeare-gpt", BY_CHARACTERS),
    f"{BY_CHARACTERS} --init_from=shakespeare-gpt --out_dir=out-again --max_iters=100": How(SHORT, TRAINED, EXPORT),
    "python train.py config/train_openwebtext.py --dataset=edu --auto_fit=True": replace(FITTED, proof=True),
    'python train.py config/train_openwebtext.py --gpu="RTX 3060"': How(
        (*flags(**TINY), *ONE), "^auto-fit: batch_size 1, gradient.*$"
    ),
    BY_CHARACTERS: How(SHORT, TRAINED),
    LAPTOP: How(SHORT, TRAINED),
    "python train.py --out_dir=out-shakespeare-char --init_from=resume": How(
        ("--max_iters=2",), r"^resuming from \S+ at iteration 1\n(.*\n)*iter 2: loss \d", BY_CHARACTERS
    ),
    "python train.py config/finetune_shakespeare.py --auto_fit=True": Cannot(
        "it wants weights: the next row is like it"
    ),
    "python train.py config/eval_gpt2.py": How(
        ("--init_from=hf", "--device=cpu", "--batch_size=1", "--eval_iters=1", "--block_size=8"),
        "^step 0: train loss",
        needs=("hf",),
    ),
    'python sample.py --out_dir=out-shakespeare-char --start="O Romeo"': How(
        ("--device=cpu", "--num_samples=1", "--max_new_tokens=5"), "^O Romeo.{5}\n-{15}$", BY_CHARACTERS
    ),
    'python sample.py --init_from=gpt2-xl --start="FILE:prompt.txt"': How(
        ("--init_from=hf", "--device=cpu", "--num_samples=1", "--max_new_tokens=2"), "^The prompt", needs=("bpe", "hf")
    ),
    "python bench.py --real_data=False": How((*flags(**TINY), "--device=cpu"), r"^time per iteration: \d.*ms, MFU"),
    "torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py": How(SHORT, TRAINED, proof=True),
    "torchrun --standalone --nproc_per_node=2 train.py config/train_gpt2.py --auto_fit=True": How(
        SHORT, rf"^auto-fit: batch_size .*, effective batch \d+, (.*\n)*{TRAINED[1:]}", proof=True
    ),
    "torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py --n_layer=48 --n_head=25 --n_embd=1600 "
    "--shard=True": How(SHORT, TRAINED, proof=True),
    "torchrun --standalone --nproc_per_node=4 --max-restarts=3 train.py config/train_gpt2.py --init_from=auto": How(
        SHORT, TRAINED, proof=True
    ),
    "torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --nproc_per_node=8 train.py config/train_gpt2.py "
    "--gradient_accumulation_steps=48": Cannot("needs two machines"),
    "torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d --rdzv_id=run1 "
    "--rdzv_endpoint=10.0.0.1:29400 train.py config/train_gpt2.py --gradient_accumulation_steps=48 "
    "--init_from=auto": Cannot("needs two machines: tests/two_hosts.py makes two of one"),
    "python data/python_char/prepare.py": How(shows=r"^train has \d+,\d+,\d+ tokens"),
    "python data/shakespeare_char/prepare.py": How(TEXT, "^train has 180 tokens"),
    "python data/shakespeare/prepare.py": How(TEXT, "^train has 67 tokens", needs=("bpe",)),
    "python data/openwebtext/prepare.py": DOCUMENTS,
    "python data/openwebtext/prepare.py --max_tokens=100_000_000": DOCUMENTS,
    "python data/openwebtext/prepare.py --source=... --out=NAME": DOCUMENTS,
    "python data/openwebtext/prepare.py --source=HuggingFaceFW/fineweb-edu --name=sample-10BT "
    "--max_tokens=100_000_000 --out=edu": How((*DOCUMENTS.flags, "--name="), DOCUMENTS.shows, needs=DOCUMENTS.needs),
    "python data/from_text/prepare.py FOLDER": How(shows="^train has 66 tokens", needs=("bpe",)),
    "python train.py config/train_openwebtext.py --optimizer=muon": How(SHORT, TRAINED, needs=("muon",)),
    "python benchmarks/muon.py": Cannot("it takes minutes: its runs are the row's above"),
    "python benchmarks/memory.py": How((*flags(block_size=8, batch_sizes="1"),), "^{.*}$", proof=True),
}


def documents():
    """What README.md, CONTRIBUTING.md and docs/ say, as one text."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def commands_of(text):
    """The python and torchrun commands of a Markdown text, those in mid-sentence too; lines that go on are joined."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    alone = re.findall(r"^(?:\$ )?((?:python3?|torchrun) .*?)(?: +#.*)?$", blocks, re.MULTILINE)
    return alone + re.findall(r"`((?:python3?|torchrun) [^`\n]+)`", text)


@pytest.mark.proof
def test_the_plan_that_the_readme_shows_is_what_its_command_prints(checkout):
    block = r"^\$ python train.py (.*)\n\.\.\.\n((?:auto-fit: .*\n)+)"
    [(arguments, shown)] = re.findall(block, (ROOT / "README.md").read_text(), re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        run_script("train.py", *shlex.split(arguments))
    told = [line for line in stop.value.text.splitlines() if line.startswith("auto-fit: ")]
    seconds = r", found in \d+ s$"
    assert [re.sub(seconds, "", line) for line in shown.splitlines()] == [re.sub(seconds, "", line) for line in told]


@pytest.mark.parametrize(("folder", "not_named"), [("benchmarks", {"common", "nanogpt"}), ("nanofit", {"__init__"})])
def test_the_map_names_each_file(folder, not_named):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    missing = {path.stem for path in (ROOT / folder).glob("*.py") if f"`{folder}/{path.name}`" not in text}
    assert missing == not_named


def test_each_command_has_a_row_and_each_row_a_command():
    found = commands_of(documents())
    assert set(found) == set(COMMANDS), "a row of COMMANDS tells how a command is run, or why it can't be"


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
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


@pytest.fixture
def hf():
    """A GPT-2 of one layer in the folder hf, in the place of the one that would come from the hub."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained("hf")


def run(command):
    """What a command of the README prints with the flags of its row behind it."""
    program, name, *arguments = shlex.split(command)
    arguments += COMMANDS[command].flags
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


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.proof if getattr(how, "proof", False) else ())
        for command, how in COMMANDS.items()
    ],
)
def test_commands_of_the_readme(checkout, command, request):
    how = COMMANDS[command]
    if isinstance(how, Cannot):
        pytest.skip(how.why)
    for fixture in how.needs:
        request.getfixturevalue(fixture)
    before = []
    while how.after:
        before.append(how.after)
        how = COMMANDS[how.after]
    for earlier in reversed(before):
        run(earlier)
    how, text = COMMANDS[command], run(command)
    assert re.search(how.shows, text, re.MULTILINE), text
