"""Ranks that train tests/models/uneven.py, and rank 0 once more alone: whether they learn the same.

    PYTHONPATH=. torchrun ... tests/uneven_ranks.py kind,kind,... batches,batches,... iterations

batches: of an iteration, over all ranks together. Writes uneven.json: {case: the largest differences {loss, weights:
from one process; ranks: of weights and buffers between ranks; steps: of AdamW's counts}}.
"""

import json
import sys
from pathlib import Path

import torch

from nanofit import gradients, machine, models, sharding
from nanofit.batches import Batches
from nanofit.ranks import ALONE, World
from nanofit.step import accumulate, clip, update
from nanofit.tokens import open_data
from nanofit.units import MemoryLevers

CPU = torch.device("cpu")
sys.path.append(str(Path(__file__).parent / "models"))
from uneven import GPT, GPTConfig  # noqa: E402


def train(world, kind, batches_per_iter, levers):
    """(losses, {name: whole weight or buffer}, {name: steps of AdamW}) of this rank."""
    torch.manual_seed(1337 + world.rank)
    model = models.build(GPT, GPTConfig, dict(kind=kind))
    models.apply_levers(model, levers)
    sharding.place(model, world, CPU, "float32", levers)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    scaler, autocast = machine.grad_scaler(CPU, "float32"), machine.autocast(CPU, "float32")
    shares = dict(per_iter=batches_per_iter // world.size, rank=world.rank, ranks=world.size)
    state = torch.Generator().manual_seed(0).get_state()
    batches = Batches(open_data("data/markov", 16, 65), batch_size=2, device=CPU, state=state, **shares)
    own, losses = gradients.of(model, world, levers), []
    for _ in range(int(sys.argv[3])):
        loss = accumulate(model, scaler, batches, autocast, own)
        update(optimizer, scaler, clip(model, optimizer, scaler, 1.0))
        world.all_reduce_mean([loss])
        losses.append(loss)
    state = model.state_dict()  # of a sharded one, leaves each rank its shares
    whole = {name: (w.full_tensor() if hasattr(w, "full_tensor") else w).clone() for name, w in state.items()}
    steps = {name: float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0
             for name, p in model.named_parameters()}  # fmt: skip
    return torch.stack(losses), whole, steps


def apart(ours, theirs):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def compare(kind, batches_per_iter, levers):
    losses, tensors, steps = train(world, kind, batches_per_iter, levers)
    values = [torch.view_as_real(t) if t.is_complex() else t for t in tensors.values()]
    everyones = world.all_gather((losses, values, steps))
    ranks = max(apart([everyones[0][0], *everyones[0][1]], [loss, *theirs]) for loss, theirs, _ in everyones)
    alone_losses, alone, alone_steps = train(ALONE, kind, batches_per_iter, MemoryLevers(recompute=levers.recompute))
    weights = [name for name in tensors if "running" not in name]
    told = {"ranks": ranks, "steps": max(abs(steps[name] - alone_steps[name]) for name in steps)}
    if kind != "dropout":  # which draws as many numbers as there are ranks
        told["loss"] = apart([losses], [alone_losses])
        told["weights"] = apart(*([torch.view_as_real(w) if w.is_complex() else w for w in (t[n] for n in weights)]
                                  for t in (tensors, alone)))  # fmt: skip
    return told


if __name__ == "__main__":
    kinds, counts = sys.argv[1].split(","), [int(count) for count in sys.argv[2].split(",")]
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # AdamW makes much of the rounding of a gradient that is nearly 0
    gradients.BUCKET_BYTES = 20_000  # several, of which some wait for weights that aren't used
    world, found = World.of_torchrun(), {}
    world.init("gloo", "cpu")
    for kind in kinds:
        for count in counts:
            once = count > world.size
            for levers in (MemoryLevers(recompute=kind == "dropout"), MemoryLevers(shard=True, gather_once=once)):
                if not (levers.shard and kind in ("experts", "layer_drop", "rare")):  # ranks must use the same weights
                    found[f"{kind}, {count} batches{levers}"] = compare(kind, count, levers)
    if world.is_main:
        Path("uneven.json").write_text(json.dumps(found, indent=1))
    world.destroy()
