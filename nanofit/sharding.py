"""A model that no device holds: each rank keeps a share of every weight, its gradient and AdamW's state.

By torch's FSDP2 (fully_shard): a block's weights are gathered while it computes, or once for all of an iteration, and
its gradients are reduced to the shares right after its backward pass, in every micro-step. All ranks must call what is
here, and call the same blocks in the same order in each pass.
"""

import torch
from torch.utils._pytree import tree_map

from nanofit.errors import UsageError
from nanofit.machine import DTYPES
from nanofit.models import blocks_of


def place(model, world, device, dtype, levers):
    """Bring a model onto this rank's device, with rank 0's weights and buffers; with levers.shard, this rank's share.

    Other ranks' models may then come empty (models.build): one machine holds one model, however many ranks it has.
    dtype: what products run in, and so, on a GPU, what a block's weights travel in; all else stays float32.
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
    whole = {name: p.detach() for name, p in model.named_parameters()}  # on the host: it may not fit the device
    mesh = init_device_mesh(device.type, (world.size,))
    # On a CPU, norms don't take weights of another precision than their input's.
    reduced = DTYPES[dtype] if device.type == "cuda" and dtype != "float32" else None
    of_block = MixedPrecisionPolicy(
        param_dtype=reduced, reduce_dtype=torch.float32 if reduced else None, cast_forward_inputs=False
    )
    for block in blocks_of(model):
        # What stays gathered after a forward pass, gradients.ShardedGradients gives up after the last backward pass.
        fully_shard(block, mesh=mesh, mp_policy=of_block, reshard_after_forward=not levers.gather_once)
    # Embeddings and the head in float32, in which the residual stream begins and the loss is computed.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    _deal(model, whole, world, device)


@torch.no_grad()
def _deal(model, whole, world, device):
    """Give the ranks their shares of rank 0's weights, {name: tensor on the host}, and its buffers."""
    from torch.distributed.tensor import distribute_tensor

    empty = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if empty:
        model.to_empty(device=device)
    for name, p in model.named_parameters():
        if empty and world.is_main:  # of a trial, in which values mean nothing and no other rank is real
            p.zero_()
            continue
        sent = whole[name].to(device) if world.is_main else torch.empty_like(whole[name], device=device)
        share = distribute_tensor(sent, p.device_mesh, p.placements)
        if not world.is_main:  # which has its own
            p.copy_(share)
    world.broadcast(model.buffers())


def whole_model(model, world):
    """model.state_dict(); of a sharded one with whole tensors on the host, gathered one by one. Rank 0 alone has them.

    Tensors that are tied are one.
    """
    plain = model.state_dict()  # which leaves each rank its shares alone, whatever was gathered
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
    """A tensor gathered from its shares, on the host, or None; what isn't shared out stays as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    value = value.detach().full_tensor()
    return value.to("cpu", copy=True) if keep else None  # a copy waits for what is on its way


def share_like(value, p):
    """This rank's share of a whole tensor on the host, in the way in which p is shared out; p may be whole itself."""
    if not hasattr(p, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
