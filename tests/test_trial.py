"""Trials in real child processes: whatever becomes of one is a Trial."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, environment

from model import GPT, GPTConfig
from nanofit import models
from nanofit.autofit import trials
from nanofit.autofit.plan import OUT_OF_MEMORY, Facts, Job, Trial, to_json
from nanofit.autofit.trials import Trials
from nanofit.units import GIB, MemoryLevers

GOOD = to_json(Trial(1, peak_bytes=5, tokens_per_second=1.0))
JOB = Job(
    source=models.source_of(GPT, GPTConfig),
    model_args=dict(n_layer=2, n_head=2, n_embd=64, block_size=32, bias=False, vocab_size=65, dropout=0.1),
    device="cpu", dtype="float32", grad_clip=1.0, micro_batch_size=8, micro_steps=4, memory_limit_gb=4.0,
)  # fmt: skip


def run_trial(job, on_facts=lambda facts: None, seconds=60):
    with Trials() as run:
        return run(job, on_facts, seconds)


@pytest.fixture
def child(workplace, monkeypatch):
    """Let a script be the child of a trial."""

    def be(script):
        (workplace / "fake.py").write_text(script)
        monkeypatch.setattr(trials, "COMMAND", [sys.executable, str(workplace / "fake.py")])

    return be


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
         "was killed by signal 9, as the system does when memory runs out"),
        ("import time; time.sleep(60)", "took longer than 1 s"),
        ("print('garbage'); print('{'); print('[1]'); print('3')", "gave no answer (no message)"),
        ("print('{\"kind\": \"Trial\", \"peak_bytes\": 1}')", "gave no answer (no message)"),
        (f"import sys; sys.stdout.write('''{GOOD}''')", "gave no answer (no message)"),  # no line end: it may be cut
        ("import sys; print('error: no such GPU\\nW: a warning', file=sys.stderr); sys.exit(1)",
         "ended with exit code 1 and no answer (no such GPU)"),
    ],
)  # fmt: skip
def test_a_child_that_ends_badly_is_a_sentence(child, script, sentence):
    child(script)
    tried = replace(JOB, levers=MemoryLevers(recompute=True), compile=True)
    answer = run_trial(tried, seconds=1 if "longer" in sentence else 20)
    assert not answer.fits
    assert answer.failure.startswith(f"the probe {sentence}")
    assert (answer.micro_batch_size, answer.levers, answer.compiled) == (8, tried.levers, True), (
        "it says what was tried"
    )
    assert not answer.out_of_memory


ANSWERS = f"""
import os, sys
for line in sys.stdin:
    open("asked", "a").write(str(os.getpid()) + "\\n")
    print('''{to_json(Facts("x", limit_bytes=9))}''')
    print('''{GOOD}''', flush=True)
"""


def children_of(workplace, *jobs, answers=ANSWERS):
    """Which child had which of the jobs, as numbers from 0."""
    with Trials() as run:
        for job in jobs:
            run(job)
        process = run._process
    assert not process or process.poll() is not None, "none is left"
    pids = (workplace / "asked").read_text().split()
    return [list(dict.fromkeys(pids)).index(pid) for pid in pids]


def test_a_child_may_start_before_its_first_job_is_known(child, workplace):
    child(ANSWERS)
    with Trials(begins=True) as run:
        process = run._process
        assert process.poll() is None
        run(JOB)
        assert (workplace / "asked").read_text().split() == [str(process.pid)]
    with Trials(begins=True) as run:  # and none comes
        process = run._process
    assert process.poll() is not None


def test_a_child_goes_on_with_other_sizes(child, workplace):
    child(ANSWERS)
    job = replace(JOB, device="cuda")
    small, smaller = replace(job, micro_batch_size=4, micro_steps=8), replace(job, micro_batch_size=2)
    assert children_of(workplace, job, small, smaller, replace(job, limit_bytes=7)) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "other",
    [
        dict(levers=MemoryLevers(recompute=True), micro_batch_size=16),
        dict(compile=True, micro_batch_size=16),
        dict(micro_batch_size=4),  # a CPU's peak doesn't fall again
    ],
)
def test_what_an_earlier_job_might_disturb_gets_a_child_of_its_own(child, workplace, other):
    child(ANSWERS)
    assert children_of(workplace, JOB, replace(JOB, **other), replace(JOB, micro_batch_size=32))[:2] == [0, 1]


def test_facts_are_told_at_once_and_their_limit_is_the_trials(child):
    facts = Facts("a card", limit_bytes=9, neighbours=((1, "x", 2),))
    child(f"print('''{to_json(facts)}'''); print('''{GOOD}''')")
    told = []
    assert run_trial(JOB, told.append).limit_bytes == 9
    assert told == [facts]


def test_a_child_gets_the_job_the_project_and_no_rank(child, workplace, monkeypatch):
    of_ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"}
    for name in of_ranks:
        monkeypatch.setenv(name, "error.json")
    monkeypatch.setenv("PYTHONPATH", "mine")
    child("import os, json, sys; open('got', 'w').write(json.dumps(dict(os.environ)) + '\\n' + sys.stdin.readline())")
    run_trial(JOB)
    environ, job = (workplace / "got").read_text().splitlines()
    assert not of_ranks & set(json.loads(environ))
    assert f'"PYTHONPATH": "{ROOT}{os.pathsep}mine"' in environ
    assert job == to_json(JOB)


def test_a_probe_ends_when_nobody_waits_any_more():
    """Its parent may be killed: then standard input ends."""
    probe = subprocess.Popen(
        trials.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    probe.stdin.write(to_json(replace(JOB, micro_batch_size=1024, micro_steps=8)) + "\n")
    probe.stdin.flush()
    assert '"kind": "Facts"' in probe.stdout.readline()
    probe.stdin.close()
    assert probe.wait(timeout=30) == 1
    probe.stdout.close()


def test_a_probe_measures_memory_and_speed(workplace):
    for name in ("torch", "json", "model"):
        (workplace / f"{name}.py").write_text("raise SystemExit('the wrong one')")  # of the folder it is started in
    facts = []
    measured = run_trial(JOB, facts.append)
    assert measured.failure == ""
    assert measured.fits
    assert 0 < facts[0].limit_bytes <= 4 * GIB
    assert measured.limit_bytes == facts[0].limit_bytes
    assert 0.1 * GIB < measured.peak_bytes < 2 * GIB
    assert measured.tokens_per_second > 100
    assert measured.levers == JOB.levers.within(measured.limit_bytes, "cpu"), "what was left open is settled"


def test_one_process_tries_several_sizes():
    shared = replace(JOB, sharers=4)
    with Trials() as run:
        facts = []
        small, large = run(shared, facts.append), run(replace(shared, micro_batch_size=256, micro_steps=2))
        again = run(shared)
        assert small.fits
        assert large.fits
        assert run._job.micro_batch_size == JOB.micro_batch_size
    assert large.peak_bytes > small.peak_bytes
    assert again.peak_bytes < (small.peak_bytes + large.peak_bytes) / 2, "what went before doesn't show"
    assert facts[0].name == "CPU of 4 ranks"
    assert facts[0].limit_bytes < facts[0].total_bytes / 4


def test_one_process_tries_the_share_of_a_rank():
    """Which imagines the others: FSDP2 needs their number, not them."""
    tried = run_trial(replace(JOB, levers=MemoryLevers(shard=True), ranks=8))
    assert tried.failure == ""
    assert tried.fits


# ---- the model that train.py imported ----------------------------------------------------------------------

SPLIT = {
    "parts/__init__.py": "",
    "parts/sizes.py": "from model import GPTConfig as Theirs\n\nclass GPTConfig(Theirs):\n    pass\n",
    "parts/net.py": "from .sizes import GPTConfig\nimport model\n\nclass GPT(model.GPT):\n"
    "    def __init__(self, config):\n        assert type(config) is GPTConfig\n        super().__init__(config)\n",
    "model.py": "raise SystemExit('the wrong one')",  # of the folder that the run is started in
}


def test_the_probe_imports_the_model_as_the_run_did(workplace, monkeypatch):
    """GPT from one module of a package, GPTConfig from another, in a folder of sys.path that isn't the project's."""
    for name, text in SPLIT.items():
        (workplace / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / "mine" / name if name != "model.py" else workplace / name).write_text(text)
    monkeypatch.syspath_prepend(str(workplace / "mine"))
    net, sizes = (importlib.import_module(f"parts.{name}") for name in ("net", "sizes"))
    tried = run_trial(replace(JOB, source=models.source_of(net.GPT, sizes.GPTConfig)))
    assert tried.failure == ""
    assert tried.fits
    for name in [name for name in sys.modules if name.partition(".")[0] == "parts"]:
        del sys.modules[name]


def test_a_size_far_beyond_the_limit_ends_in_the_probe_alone():
    tried = run_trial(replace(JOB, micro_batch_size=200_000, memory_limit_gb=0.5))
    assert tried.failure == OUT_OF_MEMORY
    assert tried.peak_bytes == 0
    assert tried.out_of_memory
