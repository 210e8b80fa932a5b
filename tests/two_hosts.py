"""A run on two hosts, one of which is unplugged in mid-run; both are network namespaces of this machine.

    sudo python tests/two_hosts.py

Within the time that is set, each host must say that it has lost the other; plugged in again and started again, the run
must end with the weights of a run that was left in peace, to 1e-5. Needs Linux, root and `ip` of iproute2. Prints what
went wrong, and ends with exit code 1 if something did.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import REFERENCE, ROOT, TOY, flags

HOSTS = [(f"nanofit{os.getpid()}-{i}", f"veth{os.getpid() % 10**8}-{i}", f"10.77.0.{i + 1}") for i in (0, 1)]
WAIT_MINUTES = 0.25
KEYS = dict(TOY, backend="gloo", gradient_accumulation_steps=2, max_iters=400, wait_minutes=WAIT_MINUTES)
KEYS["init_from"] = "auto"


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def plug(up):
    """Connect the second host, or take its cable away."""
    name, cable, _ = HOSTS[1]
    ip("-n", name, "link", "set", cable, "up" if up else "down")


def start(attempt):
    """One rank on each host: the processes and their logs."""
    started = []
    for number, (name, cable, _) in enumerate(HOSTS):
        log = Path(f"host{number}-{attempt}.log")
        rendezvous = ["--nnodes=2", f"--node_rank={number}", f"--master_addr={HOSTS[0][2]}", "--master_port=29511"]
        command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc_per_node=1", ROOT / "train.py"]
        command = ["ip", "netns", "exec", name, *command, *flags(**KEYS)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(log, "w") as file:
            started.append((subprocess.Popen(command, stdout=file, stderr=file, env=environment), log))
    return started


def until(happened, seconds):
    """Whether something happens in so many seconds."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def run():
    """A list of complaints; the current folder has the data set in data/markov."""
    complaints = []
    first = start(1)
    if not until(lambda: first[0][1].read_text().count("saving checkpoint") >= 2, 180):
        complaints.append(f"the hosts don't train:\n{first[0][1].read_text()[-2000:]}{first[1][1].read_text()[-2000:]}")
    plug(False)
    since = time.monotonic()
    for number, (process, log) in enumerate(first):
        left = 60 * WAIT_MINUTES + 45 - (time.monotonic() - since)  # torchrun gives a rank 30 seconds to end
        if not until(lambda process=process: process.poll() is not None, left):
            complaints.append(f"host {number} still waits after {time.monotonic() - since:.0f} s")
            process.kill()
        if f"error: rank {number} has lost another" not in log.read_text():
            complaints.append(f"host {number} doesn't say that it lost the other:\n{log.read_text()[-3000:]}")
    print(f"both hosts had ended {time.monotonic() - since:.0f} s after one was unplugged")
    plug(True)
    for process, log in start(2):
        if process.wait(timeout=240):
            complaints.append(f"the run did not go on:\n{log.read_text()[-3000:]}")
        elif "resuming from out at iteration" not in Path("host0-2.log").read_text():
            complaints.append("the run began anew")
    alone = [sys.executable, ROOT / "train.py", *flags(**KEYS, out_dir="alone")]
    subprocess.run(alone, check=True, stdout=subprocess.DEVNULL)
    if complaints:
        return complaints
    import torch

    ours, theirs = (torch.load(f"{name}/ckpt.pt", weights_only=True)["model"] for name in ("out", "alone"))
    difference = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    print(f"largest difference of a weight from a run of one process in peace: {difference:.1e}")
    return complaints + ([f"the weights differ by {difference:.1e}"] if difference > 1e-5 else [])


if __name__ == "__main__":
    made = []
    try:
        for name, _, _ in HOSTS:
            ip("netns", "add", name)
            made.append(name)
        (here, mine, _), (there, theirs, _) = HOSTS
        ip("-n", here, "link", "add", mine, "type", "veth", "peer", "name", theirs, "netns", there)
        for name, cable, address in HOSTS:
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(REFERENCE / "markov", os.path.join(place, "data", "markov"))
            os.chdir(place)
            wrong = run()
            os.chdir("/")
    finally:
        for name in made:
            ip("netns", "delete", name)
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))
