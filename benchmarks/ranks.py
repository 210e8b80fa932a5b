"""Several ranks: our iteration, and nanoGPT's way under torch's DistributedDataParallel, in turns.

    python benchmarks/ranks.py

Two processes of one thread each on a CPU, or --ranks of a machine's GPUs with --device=cuda. Ours is train.py's
iteration with all that it survives; 'sharded' and 'gathered once' are the same with shard, without and with
gather_once. All sides tell the loss of every iteration. The ranks of each side are processes of their own, and wait
while others take their turns. Prints a table, and one line of JSON last.
"""

import os
import socket
import statistics
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
from common import Player, finish, take_turns
from nanogpt import TheirForward, their_batch, their_optimizer, their_update
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from model import GPT, GPTConfig
from nanofit import gradients, machine, settings, sharding
from nanofit.batches import Batches
from nanofit.ranks import World
from nanofit.recovery import Recovery, StopSignals
from nanofit.step import accumulate, clip, update
from nanofit.tokens import open_data
from nanofit.units import MemoryLevers

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
ranks = 2
threads = 1  # of a rank
micro_steps = "1,8"  # of a rank, one after the other
batch_size = 8
block_size = 64
n_layer = 6
n_head = 4
n_embd = 256
vocab_size = 65
rounds = 10  # turns that are counted
steps = 5  # iterations of each side in a turn
device = machine.best_device()
dtype = machine.best_dtype(device)
side = ""  # the side of a rank, which this script starts itself
folder = ""  # its data
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "ranks", "threads", "batch_size", "block_size", "rounds", "steps")
dtype = config["dtype"] = settings.dtype(config, given)


class Ours:
    """An iteration as train.py makes it."""

    levers = MemoryLevers()

    def __init__(self, model, micro_steps):
        self.model, self.micro_steps = model, micro_steps
        sharding.place(model, world, device, dtype, self.levers)
        self.autocast, self.scaler = machine.autocast(device, dtype), machine.grad_scaler(device, dtype)
        self.optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
        data = open_data(folder, block_size, vocab_size)
        self.batches = Batches(data, batch_size=batch_size, device=device, per_iter=micro_steps)
        self.own_gradients = gradients.of(self.model, world, self.levers)
        self.signals = StopSignals()
        self.recovery = Recovery(world, device, self.batches, self.model, self.scaler, give_up=lambda: "")

    def step(self):
        here = {"data": self.batches.state_dict(), "generators": machine.rng_state(device)}
        assert not world.all_reduce_max(self.signals.received), here
        for attempt in self.recovery.attempts():
            with attempt:
                loss = accumulate(self.model, self.scaler, self.batches, self.autocast, self.own_gradients)
                norm = clip(self.model, self.optimizer, self.scaler, 1.0)
        update(self.optimizer, self.scaler, norm)
        world.all_reduce_mean([loss])
        return loss.item()


class Sharded(Ours):
    levers = MemoryLevers(shard=True)


class GatheredOnce(Ours):
    levers = MemoryLevers(shard=True, gather_once=True)


class NanoGPT:
    """An iteration as nanoGPT makes it."""

    def __init__(self, model, micro_steps):
        self.model, self.micro_steps, self.path = model.to(device), micro_steps, os.path.join(folder, "train.bin")
        only = [device.index] if device.type == "cuda" else None
        self.ddp = DistributedDataParallel(TheirForward(model), device_ids=only)
        their_dtype = dtype if device.type == "cuda" else "float32"
        self.autocast, self.scaler = machine.autocast(device, their_dtype), machine.grad_scaler(device, their_dtype)
        self.optimizer = their_optimizer(model, device)
        self.generator = torch.Generator().manual_seed(1337 + world.rank)
        self.x, self.y = self.batch()

    def batch(self):
        return their_batch(self.path, batch_size, block_size, device, self.generator)

    def step(self):
        for step in range(self.micro_steps):
            self.ddp.require_backward_grad_sync = step == self.micro_steps - 1
            with self.autocast:
                self.logits, loss = self.ddp(self.x, self.y)
                loss = loss / self.micro_steps
            self.x, self.y = self.batch()
            self.scaler.scale(loss).backward()
        their_update(self.model, self.optimizer, self.scaler)
        return loss.item() * self.micro_steps


SIDES = {
    "ours": Ours,
    "nanoGPT under DDP": NanoGPT,
    "sharded": Sharded,
    "gathered once": GatheredOnce,
}


def build(side):
    torch.manual_seed(1337)
    shape = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout=0.0, bias=False)
    return SIDES[side](GPT(shape), int(micro_steps))


def turn(run):
    """[seconds of an iteration, as rank 0 sees it]"""
    run.step()  # untimed: caches hold what another side has left there
    machine.synchronize(device)
    world.all_reduce_max(0)  # begin together
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    machine.synchronize(device)
    world.all_reduce_max(0)
    return [(time.perf_counter() - start) / steps]


def turns():
    """On all ranks: one for each line that rank 0 is told."""
    while world.all_reduce_max(int(world.is_main and bool(sys.stdin.readline()))):
        yield


def play(place, micro_steps):
    """{side: seconds of an iteration in each turn}"""
    arguments = [*sys.argv[1:], f"--folder={place}", f"--micro_steps={micro_steps}", "--save="]
    players = {}
    for name in SIDES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
        each = [
            {**meet, "OMP_NUM_THREADS": str(threads), "RANK": rank, "LOCAL_RANK": rank}
            for rank in map(str, range(ranks))
        ]
        players[name] = Player(name, [sys.executable, __file__, *arguments, f"--side={name}"], *each)
    took = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name in list(SIDES) if number % 2 else reversed(SIDES):
            found = players[name].play()
            took[name] += found if number else []  # the first turn warms up
    for player in players.values():
        player.end()
    return took


if side:
    world = World.of_torchrun()
    device = world.init("nccl" if device == "cuda" else "gloo", device)
    if device.type != "cpu" or not side.startswith("nanoGPT"):  # which asks nothing of the C library
        machine.set_device(device)
    torch.set_num_threads(threads)
    take_turns(partial(turn, build(side)), turns())
    world.destroy()
    sys.exit(0)
figures = {}
with tempfile.TemporaryDirectory() as place:
    for split in ("train", "val"):
        tokens = np.random.default_rng(0).integers(vocab_size, size=1_000_000, dtype=np.uint16)
        tokens.tofile(os.path.join(place, f"{split}.bin"))
    for count in map(int, micro_steps.split(",")):
        took = play(place, count)
        figures[count] = {"seconds_per_iteration": {name: statistics.median(found) for name, found in took.items()}}
        for name in SIDES:
            print(f"{count} micro-steps, {name:20} {statistics.median(took[name]) * 1000:10.1f} ms an iteration")
        for name in list(SIDES)[1:]:
            ratios = [a / b for a, b in zip(took[name], took["ours"], strict=True)]
            spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            figures[count][f"tokens_per_second_ratio_to_{name.replace(' ', '_')}"] = spread
            print("    ours is {median:.3f} ({min:.3f} to {max:.3f}) times as fast as".format(**spread), name)
del config["folder"], config["side"]
finish("ranks", config, machine.find_device(device), {"micro_steps": figures}, save)
