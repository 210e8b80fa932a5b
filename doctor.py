"""What stands in the way of a run on this machine, and what to do: to read, or to paste into an issue.

    python doctor.py [config/file.py ...] [--key=value ...] [--json]

The keys are train.py's, and those of the run that is asked about. Nothing is written and nothing trained; whether the
batch fits is simulated. Exit code 1 if something would stop the run. The answer names no user, host or home folder.
"""

import ast
import contextlib
import io
import json
import os
import sys
import types
from dataclasses import asdict

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH leaves out
import nanofit

nanofit.start()
from configurator import configure
from nanofit.errors import UsageError
from nanofit.tools.doctor.checks import STOP, size_of, verdicts_on
from nanofit.tools.doctor.gather import of_machine, private, run

ROOT = os.path.dirname(os.path.abspath(__file__))
TRAIN = os.path.join(ROOT, "train.py")


def keys_of_train(machine):
    """{key: default} of train.py, as its source assigns them: nothing else of it runs.

    machine: nanofit's, or what answers in its place for the device and its dtype.
    """
    keys = {}
    with open(TRAIN, encoding="utf-8") as file:
        for statement in ast.parse(file.read()).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                if statement.targets[0].id == "defaults":  # what follows isn't a key
                    break
                exec(compile(ast.Module([statement], []), TRAIN, "exec"), {"machine": machine}, keys)
    return keys


def examine(argv):
    """The Facts of this machine and of the run that argv asks for."""
    facts = of_machine()
    if facts.torch_failure:
        model, own_fields = None, None
        machine = types.SimpleNamespace(best_device=lambda: "cpu", best_dtype=lambda device: "float32")
    else:
        from model import GPT, GPTConfig
        from nanofit import machine, models, settings

        own_fields = models.own_fields(GPTConfig)
        model = GPT, GPTConfig, own_fields
    defaults = keys_of_train(machine)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config, given = configure({**defaults, "__file__": TRAIN}, argv, more=own_fields)
        if model and ("dtype" in given or settings.is_elsewhere(config) or machine.is_here(config["device"])):
            config["dtype"] = settings.dtype(config, given)
    except UsageError as e:
        return private(run(facts, defaults, (), None, refusal=str(e)), ROOT)
    return private(run(facts, config, given, model), ROOT)


def lines_on(facts):
    """What there is, for people: (name, text)."""
    limit = f", the container's limit is {size_of(facts.container_bytes)}" if facts.container_bytes else ""
    memory = f"{size_of(facts.memory_bytes)} of memory, {size_of(facts.memory_free_bytes)} free{limit}"
    yield "system", f"{facts.system}{', WSL' if facts.is_wsl else ''}, {facts.cores} cores, {memory}"
    yield "Python", f"{facts.python}, compilers: {', '.join(facts.compilers) or 'none'}"
    runs = "{}.{}".format(*facts.driver_cuda) if facts.driver_cuda else "unknown"
    yield (
        "torch",
        f"{facts.torch or 'none'}, CUDA {facts.torch_cuda or 'none'}; driver {facts.driver or 'unknown'}, CUDA {runs}",
    )
    for index, gpu in enumerate(facts.gpus):
        held = (
            "unknown"
            if gpu.holders is None
            else ", ".join(f"{n} ({mib:,} MiB)" for _, n, mib in gpu.holders) or "nobody"
        )
        yield (
            f"GPU {index}",
            f"{gpu.name}, {gpu.sm_count} SMs, compute capability {'.'.join(map(str, gpu.capability))}, "
            f"{size_of(gpu.total_bytes)}, {size_of(gpu.free_bytes)} free, held by: {held}",
        )
    yield "packages", ", ".join(f"{name} {version}" for name, version in facts.packages.items() if version)
    for name, value in facts.environment.items():
        yield "variable", f"{name}={value}"
    for data in facts.data_sets:
        tokens = ", ".join(f"{count:,} {split}" for split, count in data.tokens.items())
        vocabulary = data.failure or (f"{data.vocab_size} symbols" if data.vocab_size else "GPT-2's BPE")
        yield "data", f"{data.name}: {tokens} tokens, {vocabulary}"
    for saved in facts.checkpoints:
        state = "damaged" if saved.iteration is None else f"iteration {saved.iteration:,}"
        yield "checkpoint", f"{saved.name}: {state}, {size_of(saved.bytes)}"
    yield "disk", f"{size_of(facts.disk_free_bytes)} free"


def main(argv):
    if {"-h", "--help"} & set(argv):
        print(
            (__doc__ or "usage: python doctor.py [--json]").strip(), "python train.py --help lists the keys.", sep="\n"
        )
        return 0
    facts = examine([argument for argument in argv if argument != "--json"])
    verdicts = verdicts_on(facts)
    stops = [name for name, verdict in verdicts.items() if verdict.level == STOP]
    if "--json" in argv:
        told = {"facts": asdict(facts), "checks": {n: asdict(v) for n, v in verdicts.items()}, "stopped_by": stops}
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return int(bool(stops))
    for name, text in lines_on(facts):
        print(f"{name:<12} {text}")
    print()
    for name, verdict in verdicts.items():
        print(f"{verdict.level:<8} {name:<13} " + verdict.says.replace("\n", f"\n{'':<22} "))
        if verdict.do:
            print(f"{'':<22} try: {verdict.do}")
    print(f"\nthis would stop the run: {', '.join(stops)}" if stops else "\nnothing would stop the run")
    print("TROUBLES.md tells more of each")
    return int(bool(stops))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
