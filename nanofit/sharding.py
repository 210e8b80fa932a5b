"""A model that is too large for one device: each rank keeps a share of every weight, its gradient and AdamW's state.

torch's FSDP2 (fully_shard) gathers a block's weights while it computes, or once for an iteration, and reduces its
gradients to the shares right after its backward pass, in every micro-step. All ranks must call these functions, and
the same blocks in the same order in each pass.
"""

import contextlib
import random

import torch
from torch.utils._pytree import tree_map

from nanofit.errors import UsageError
from nanofit.machine import DTYPES
from nanofit.models import blocks_of


def place(model, world, device, dtype, levers):
    """Bring a model onto this rank's device, with rank 0's weights and buffers; with levers.shard, only a share.

    Then the models of other ranks may be empty (models.build), so that a machine holds only one whole model. dtype: of
    products, and on a GPU of a block's gathered weights; all else stays float32.
    """
    world.sharded = levers.shard and world.size > 1
    if not world.sharded:
        model.to(device)
        world.broadcast([*model.parameters(), *model.buffers()])
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    of_blocks = [set(block.parameters()) for block in blocks_of(model)]
    if sum(map(len, of_blocks)) > len(set().union(*of_blocks)):
        raise UsageError("shard=True: model.py ties weights of different blocks, which would be shared out apart")
    for weights in (*of_blocks, set(model.parameters()).difference(*of_blocks)):
        if len({p.dtype for p in weights}) > 1 or not all(p.dim() for p in weights):
            raise UsageError("shard=True: FSDP2 shares out no weights of mixed dtypes, and none of no dimensions")
    _require_fixed_order(model)
    whole = {name: p.detach() for name, p in model.named_parameters()}  # on the host
    mesh = init_device_mesh(device.type, (world.size,))
    # On a CPU, norms need weights in the precision of their input.
    reduced = DTYPES[dtype] if device.type == "cuda" and dtype != "float32" else None
    of_block = MixedPrecisionPolicy(
        param_dtype=reduced, reduce_dtype=torch.float32 if reduced else None, cast_forward_inputs=False
    )
    for block in blocks_of(model):
        # With gather_once, gradients.ShardedGradients frees the gathered weights after the last backward pass.
        fully_shard(block, mesh=mesh, mp_policy=of_block, reshard_after_forward=not levers.gather_once)
    # Embeddings and the head stay float32.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    _deal(model, whole, world, device)


PASSES = 64  # in which a layer that is left out at random should show


@torch.no_grad()
def _require_fixed_order(model):
    """Raise UsageError if passes of training call different blocks: ranks would wait for each other's shares.

    It is tried with a few tokens on the host, where the whole model is. Each block computes once, and then returns the
    same again. A model that can't compute there isn't tried.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return
    called, outputs, orders = [], {}, set()

    def recorded(block, forward):
        def call(*args, **options):
            called.append(block)
            if block not in outputs:
                outputs[block] = forward(*args, **options)
            return outputs[block]

        return call

    instead = {block: recorded(block, block.forward) for block in blocks_of(model)}
    of_their_own = {block: vars(block).get("forward") for block in instead}
    drawn = random.getstate()
    try:
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
            for block, forward in instead.items():
                block.forward = forward
            for _ in range(PASSES):
                tokens = torch.randint(model.config.vocab_size, (1, min(4, model.config.block_size)))
                buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # which stay as they are
                torch.func.functional_call(model, buffers, (tokens, tokens))
                orders.add(tuple(map(id, called)))
                called.clear()
    finally:
        random.setstate(drawn)
        for block, forward in of_their_own.items():
            del block.forward
            if forward is not None:
                block.forward = forward
    if len(orders) > 1:
        raise UsageError(
            "shard=True: model.py doesn't call the same blocks in each pass (layer drop?), so that ranks would wait "
            "for each other's shares: train it with --shard=False"
        )


@torch.no_grad()
def _deal(model, whole, world, device):
    """Give the ranks their shares of rank 0's weights, {name: tensor on the host}, and its buffers."""
    from torch.distributed.tensor import distribute_tensor

    empty = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if empty:
        model.to_empty(device=device)
    for name, p in model.named_parameters():
        if empty and world.is_main:  # in a trial, where values mean nothing and the other ranks don't exist
            p.zero_()
            continue
        sent = whole[name].to(device) if world.is_main else torch.empty_like(whole[name], device=device)
        share = distribute_tensor(sent, p.device_mesh, p.placements)
        if not world.is_main:  # rank 0 has its share already
            p.copy_(share)
    world.broadcast(model.buffers())


def whole_model(model, world):
    """model.state_dict(). For a sharded model, rank 0 gets whole tensors on the host, gathered one by one.

    Tied tensors stay one.
    """
    plain = model.state_dict()  # which frees gathered weights
    if not world.sharded:
        return plain
    whole = {id(p): _whole(p, world.is_main) for p in model.parameters()}
    names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: whole[names[name]] if name in names else value for name, value in plain.items()}


def whole_optimizer(optimizer, world):
    """optimizer.state_dict(), as whole_model."""
    plain = optimizer.state_dict()
    return tree_map(lambda value: _whole(value, world.is_main), plain) if world.sharded else plain


def _whole(value, keep):
    """A tensor gathered from its shares: on the host if keep, else None. Any other value stays as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    value = value.detach().full_tensor()
    return value.to("cpu", copy=True) if keep else None  # waits for the gathering


def share_like(value, p):
    """This rank's share of a whole tensor on the host, sharded as p is; the tensor itself if p is whole."""
    if not hasattr(p, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
