"""Where a run's memory goes, against nanoGPT's way, and what its checkpoints hold: asked of torch in a child process.

So torch, which takes seconds to import, loads while the figures are read. A question comes as JSON on standard input,
the answer goes as JSON to standard output.
"""

import contextlib
import io
import json
import mmap
import os
import subprocess
import sys
from dataclasses import replace

from nanofit.autofit.plan import Job, Plan, from_dict
from nanofit.metrics_file import FILE, starts_in
from nanofit.tools.report.run import CHECKPOINTS
from nanofit.units import MemoryLevers

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FEW_LAYERS = (1, 2)  # memory is linear in n_layer: these are simulated in place of many


class Question:
    """A child process that looks into runs' folders while this one goes on."""

    def __init__(self, model_file, folders):
        """model_file: the model.py that the runs in these folders train."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((ROOT, os.environ.get("PYTHONPATH", "")))}
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "nanofit.tools.report.memory"], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._child.stdin.write(json.dumps({"model_file": model_file, "folders": folders}))
        self._child.stdin.close()
        self._child.stdin = None
        self._count = len(folders)

    def answer(self):
        """For each run a dict: "memory" as simulated, or "failure", why not; "checkpoints": {name: iteration}."""
        answer, said = self._child.communicate()
        if self._child.returncode == 0:
            return json.loads(answer)
        return [{"failure": (said.strip().splitlines() or ["no message"])[-1]}] * self._count


def ways_of(facts):
    """[(name, whether it is nanoGPT's, Job)] whose peaks a run's are compared with; a run whose facts lack has none.

    facts: as metrics.run_facts.
    """
    plan, levers = from_dict(Plan, {**facts.get("plan", {}), "trials": []}), facts.get("levers")
    levers = from_dict(MemoryLevers, levers)
    try:
        job = Job({}, facts["model_args"], "cpu", facts["config"]["dtype"], facts["config"]["grad_clip"], levers)
        ranks = facts["ranks"]
        size, accumulation = plan.micro_batch_size, plan.accumulation
    except (AttributeError, LookupError, TypeError):
        return []
    here = replace(job, micro_batch_size=size, micro_steps=accumulation // ranks, ranks=ranks)
    theirs = replace(here, levers=MemoryLevers())
    ways = [("this run", False, here), ("nanoGPT's way", True, theirs)]
    if plan.batch_size != size:
        whole = replace(theirs, micro_batch_size=plan.batch_size, micro_steps=plan.gradient_accumulation_steps // ranks)
        ways.append(("nanoGPT's way", True, whole))
    return ways


def simulated(model_file, facts):
    """[{"name", "micro_batch_size", "parts": {part: bytes}}] of the ways of a run."""
    from nanofit import models
    from nanofit.autofit.simulate import step_memory

    gpt, config = models.from_file(model_file)

    class AllLogits(gpt):
        """nanoGPT's way: logits of every position, which its script holds on to."""

        def forward(self, idx, targets):
            self.logits, loss = super().forward(idx, targets)
            return self.logits, loss

    def parts(job, is_theirs):
        def step(layers):
            asked = replace(job, model_args={**job.model_args, "n_layer": layers})
            return step_memory(AllLogits if is_theirs else gpt, config, asked, job.levers)

        layers = job.model_args["n_layer"]
        if layers <= FEW_LAYERS[1]:
            return step(layers)
        low, high = map(step, FEW_LAYERS)
        more = (layers - FEW_LAYERS[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
        return {part: round(low[part] + more * (high[part] - low[part])) for part in low}

    ways = ways_of(facts)
    return [{"name": n, "micro_batch_size": j.micro_batch_size, "parts": parts(j, theirs)} for n, theirs, j in ways]


def _answer(question):
    from nanofit import checkpoint

    def last_start(path):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            return (list(starts_in(lines)) or [{}])[-1]

    answers = []
    for folder in question["folders"]:
        facts = last_start(os.path.join(folder, FILE))
        held = {name: checkpoint.peek(os.path.join(folder, name)) for name in CHECKPOINTS}
        try:
            memory = {"memory": simulated(question["model_file"], facts)}
        except Exception as e:  # of a model that somebody wrote, or of a file that somebody changed
            memory = {"failure": f"{type(e).__name__}: {(str(e).strip().splitlines() or ['no message'])[0]}"}
        answers.append({**memory, "checkpoints": {name: saved["iter_num"] for name, saved in held.items() if saved}})
    return answers


if __name__ == "__main__":
    question = json.load(sys.stdin)
    with contextlib.redirect_stdout(io.StringIO()):  # every model tells its number of parameters
        answers = _answer(question)
    json.dump(answers, sys.stdout)
