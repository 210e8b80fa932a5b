"""ckpt.pt: written whole or not at all, read whether nanoGPT or this project wrote it."""

import os

import torch

from configurator import UsageError

NAME = "ckpt.pt"
MODEL_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")  # these make the weights' shapes
REQUIRED = ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")
# How AdamW computes, not what: these follow the machine that runs, not the one that saved.
_IMPLEMENTATION = ("fused", "foreach", "capturable")


def save(checkpoint, out_dir):
    """Write a checkpoint to out_dir/ckpt.pt. The one before stays until this one is whole on disk."""
    path = os.path.join(out_dir, NAME)
    part = path + ".part"
    with open(part, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def load(out_dir, required=REQUIRED):
    """out_dir/ckpt.pt with its tensors on the CPU, and torch.compile's prefix taken off its names.

    Raises UsageError where there is none, where it is damaged, or where a required entry is missing.
    """
    path = os.path.join(out_dir, NAME)
    if not os.path.isfile(path):
        raise UsageError(f"there is no checkpoint {path}: train with --out_dir={out_dir} first, or set out_dir")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and torch each have their own way to say that a file is damaged
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UsageError(f"{path} can't be read, it is damaged or not a checkpoint ({reason})") from e
    missing = [k for k in required if k not in checkpoint] if isinstance(checkpoint, dict) else required
    if missing:
        raise UsageError(f"{path} is not a checkpoint of a training run: it lacks {', '.join(missing)}")
    lacking = [k for k in (*MODEL_KEYS, "dropout") if k not in checkpoint["model_args"]]
    if lacking:
        raise UsageError(f"{path}: its model_args lack {', '.join(lacking)}: it is not a checkpoint of this model")
    checkpoint["model"] = {name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()}
    return checkpoint


def load_optimizer(optimizer, state):
    """Give AdamW its saved moments. Rows that a cropped block_size dropped are dropped here too."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state["state"].items():
        for name, value in moments.items():
            if value.dim() and value.shape[0] > params[index].shape[0]:
                moments[name] = value[: params[index].shape[0]].clone()
    for saved, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved.update({k: ours[k] for k in _IMPLEMENTATION if k in ours})
    optimizer.load_state_dict(state)
