"""What stands in the way of a run on this machine, and what to do: to read, or to paste into an issue.

    python doctor.py [config/file.py ...] [--key=value ...] [--json]

The keys are train.py's, and those of the run that is asked about. Nothing is trained, and what is there stays as it
is; whether the batch fits is simulated. Exit code 1 if something would stop the run. The answer names no user, host
or home folder.
"""

import ast
import contextlib
import io
import json
import os
import sys
from dataclasses import asdict

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH leaves out
import nanofit

nanofit.start()
from configurator import configure
from nanofit.errors import UsageError
from nanofit.tools.doctor.checks import STOP, Verdict, facts, verdicts_on
from nanofit.tools.doctor.private import private

ROOT = os.path.dirname(os.path.abspath(__file__))
TRAIN = os.path.join(ROOT, "train.py")


def keys_of_train():
    """{key: default}, as train.py's source assigns them before `defaults`; nothing else of it runs."""
    from nanofit import machine

    keys = {}
    with open(TRAIN, encoding="utf-8") as file:
        for statement in ast.parse(file.read()).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                if statement.targets[0].id == "defaults":
                    break
                exec(compile(ast.Module([statement], []), TRAIN, "exec"), {"machine": machine}, keys)
    return keys


def look_at_run(argv):
    """(train.py's keys as argv sets them, {name of a check: its Verdict}) of the run that is asked about."""
    from model import GPT, GPTConfig
    from nanofit import models
    from nanofit.tools.doctor.run import Run

    try:
        own = models.own_fields(GPTConfig, but=keys_of_train())
        with contextlib.redirect_stdout(io.StringIO()):
            config, given = configure({**keys_of_train(), "__file__": TRAIN}, argv, more=own)
    except UsageError as e:
        return {}, {"keys": Verdict(STOP, str(e), "python train.py --help")}
    run = Run(config, given, GPT, GPTConfig, own)
    run.look()
    return run.config, run.verdicts


def main(argv):
    if {"-h", "--help"} & set(argv):
        print(
            (__doc__ or "usage: python doctor.py [--json]").strip(), "python train.py --help lists the keys.", sep="\n"
        )
        return 0
    known, config, of_run = facts(), {}, {}
    if known["torch"]:
        config, of_run = look_at_run([argument for argument in argv if argument != "--json"])
    verdicts = {**verdicts_on(known, config), **of_run}
    stops = [name for name, verdict in verdicts.items() if verdict.level == STOP]
    if "--json" in argv:
        told = {"checks": {name: asdict(verdict) for name, verdict in verdicts.items()}, "stopped_by": stops}
        print(json.dumps(private({**told, "config": config, "facts": known}, ROOT), indent=2, ensure_ascii=False))
        return int(bool(stops))
    lines = []
    for name, verdict in verdicts.items():
        lines.append(f"{verdict.level:<8} {name:<11} " + verdict.says.replace("\n", f"\n{'':<20} "))
        lines += [f"{'':<20} try: {verdict.do}"] if verdict.do else []
    lines += ["", f"this would stop the run: {', '.join(stops)}" if stops else "nothing would stop the run"]
    print(private("\n".join(lines), ROOT), "TROUBLES.md tells more of each", sep="\n")
    return int(bool(stops))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
