"""What would stop a run on this machine, and what to do: to read, or to paste into an issue.

    python doctor.py [config/file.py ...] [--key=value ...] [--json]

The keys are train.py's: give those of your run. Nothing is trained, and no file changes; whether the batch fits is
simulated. The exit code is 1 if something would stop the run. The answer names no user, host or home folder.
"""

import json
import os
import sys
from dataclasses import asdict

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
import nanofit

AS_SET = dict(os.environ)  # before start() adds to it
nanofit.start()
from nanofit.tools.doctor.checks import STOP, facts, verdicts_on
from nanofit.tools.doctor.private import private

ROOT = os.path.dirname(os.path.abspath(__file__))


def main(argv):
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "usage: python doctor.py [--json]").strip())
        print("python train.py --help lists the keys.")
        return 0
    known, config, of_run = facts(AS_SET), {}, {}
    if known["torch"]:
        from nanofit.tools.doctor.run import look

        train = os.path.join(ROOT, "train.py")
        config, of_run = look(train, [argument for argument in argv if argument != "--json"])
    verdicts = {**verdicts_on(known, config), **of_run}
    stops = {name: verdict.says for name, verdict in verdicts.items() if verdict.level == STOP}
    if "--json" in argv:
        told = {"checks": {name: asdict(verdict) for name, verdict in verdicts.items()}, "stopped_by": [*stops]}
        print(json.dumps(private({**told, "config": config, "facts": known}, ROOT), indent=2, ensure_ascii=False))
        return int(bool(stops))
    lines = []
    for name, verdict in verdicts.items():
        lines.append(f"{verdict.level:<8} {name:<11} " + verdict.says.replace("\n", f"\n{'':<20} "))
        lines += [f"{'':<20} try: {verdict.do}"] if verdict.do else []
    lines += ["", *(f"would stop the run: {says}" for says in stops.values())]
    lines += [] if stops else ["nothing would stop the run"]
    print(private("\n".join(lines), ROOT), "TROUBLES.md tells more of each", sep="\n")
    return int(bool(stops))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
