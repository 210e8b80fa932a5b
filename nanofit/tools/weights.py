"""The weights of a checkpoint alone, as one safetensors file: to share, without an optimizer and without pickle."""

import json
import os

import torch
from torch import nn

from nanofit import checkpoint
from nanofit.errors import UsageError, first_line, usage_errors
from nanofit.files import whole_or_not_at_all

SUFFIX = ".safetensors"
KEPT = ("model_args", "activation", "config", "iter_num", "best_val_loss")  # entries of a checkpoint
APPROXIMATE = {"gelu": "none", "gelu_new": "tanh"}  # an activation by its name in transformers: nn.GELU's argument


def require_safetensors():
    """The module, or a UsageError that tells how to get it."""
    with usage_errors(ImportError, prefix="safetensors files need a package: pip install safetensors. "):
        import safetensors.torch
    return safetensors


def activation_of(model):
    """What all nn.GELU modules of a model compute, 'gelu' or 'gelu_new'; None where they differ or there are none.

    It is no size, so model_args don't tell: a checkpoint keeps it as an entry of its own.
    """
    found = {module.approximate for module in model.modules() if isinstance(module, nn.GELU)}
    return next((name for name, approximate in APPROXIMATE.items() if found == {approximate}), None)


def set_activation(model, name):
    """Make the nn.GELU modules of a model compute what a checkpoint's entry says; None leaves them as they are.

    Raises UsageError where they can't.
    """
    if name is None:
        return
    if name not in tuple(APPROXIMATE):
        raise UsageError(f"the checkpoint's activation must be {' or '.join(APPROXIMATE)}, not {str(name)[:50]!r}")
    gelus = [module for module in model.modules() if isinstance(module, nn.GELU)]
    if not gelus:
        raise UsageError(f"the checkpoint's activation is {name}, and the model of model.py has no nn.GELU")
    for module in gelus:
        module.approximate = APPROXIMATE[name]


def figures_of(saved):
    """iter_num, an int, and best_val_loss, a float, of a checkpoint; what it lacks is left out."""
    found = {}
    if type(saved.get("iter_num")) is int:
        found["iter_num"] = saved["iter_num"]
    loss = saved.get("best_val_loss")
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:  # nanoGPT saves it so
        loss = loss.item()
    if isinstance(loss, float) and loss < 1e9:  # which stands for none
        found["best_val_loss"] = loss
    return found


def save(saved, path):
    """Write the weights of a checkpoint to a new file, and beside them, as its metadata, what a model needs to be made.

    Of the run's keys only the data set's name is kept: the others are nobody else's business.
    """
    safetensors = require_safetensors()
    weights, tied, first = {}, {}, {}
    for name, weight in saved["model"].items():
        place = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
        if weight.numel() and first.setdefault(place, name) != name:
            tied[name] = first[place]  # a file holds a tensor once
        else:
            weights[name] = weight.detach().contiguous()
    about = {key: saved[key] for key in KEPT[:3] if saved.get(key) is not None} | figures_of(saved)
    if "config" in about:
        about["config"] = {key: value for key, value in about["config"].items() if key == "dataset"}
    with usage_errors(TypeError, ValueError, prefix="the checkpoint's model_args can't be written as JSON: "):
        metadata = {key: json.dumps(value) for key, value in {**about, "tied": tied}.items()}
    with (
        whole_or_not_at_all(path) as part,
        usage_errors(safetensors.SafetensorError, prefix=f"{path} can't be written: "),
    ):
        safetensors.torch.save_file(weights, part, {"format": "pt", **metadata})


def load(path):
    """What save wrote, as a checkpoint with the entries model, model_args and config; tensors on the CPU.

    Raises UsageError where the file is missing, damaged, or of another kind.
    """
    safetensors = require_safetensors()
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {path}: export.py --weights_only_to={path} makes one")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        saved = {"config": {}, **{key: json.loads(metadata[key]) for key in KEPT if key in metadata}, "model": weights}
        weights |= {name: weights[other] for name, other in json.loads(metadata.get("tied", "{}")).items()}
    except Exception as e:  # safetensors, JSON and what it may hold each have their own way to say it
        raise UsageError(f"{path} can't be read, it is damaged or not a file of weights ({first_line(e)})") from e
    if "model_args" not in saved:
        raise UsageError(
            f"{path} lacks model_args: expected a file that export.py --weights_only_to wrote; for a Hugging Face "
            "model, name its folder"
        )
    checkpoint.check(saved, path, for_training=False)
    return saved
