"""What training asks of a model, whoever wrote it.

A model.py that has nanoGPT's GPTConfig and GPT trains here. What ours offers beyond these is looked for, and where it
is missing, done without: nothing here imports a model.py that it wasn't told of.
"""

import contextlib
import functools
import importlib
import inspect
import json
import math
import os
import sys
import traceback
import typing
import warnings
from operator import attrgetter

import torch
from torch.utils.checkpoint import checkpoint

from nanofit.errors import UsageError, first_line, is_out_of_memory, usage_errors
from nanofit.units import GPT2_SIZES, PADDED_VOCAB_SIZE

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # the fields of nanoGPT's config
KEY_TYPES = (bool, int, float, str)  # of what --key=value can set
NANOGPT_PEAK_FLOPS = 312e12  # an A100's, of which nanoGPT's estimate_mfu gives a share


# ---- the config, and a model of it -------------------------------------------------------------------------


def fields(config_class):
    """The parameters of a GPTConfig: {name: inspect.Parameter}."""
    return dict(inspect.signature(config_class).parameters)


def own_fields(config_class):
    """{name: (type, default)} of the fields that a GPTConfig has beyond nanoGPT's: they become keys of a run.

    A field that no --key=value can set, a tuple for one, stays as it is in model.py.
    """
    hints = typing.get_type_hints(config_class)
    own = {}
    for name, parameter in fields(config_class).items():
        if name in SIZES:
            continue
        default = parameter.default
        if default is parameter.empty:
            raise UsageError(
                f"model.py: the field {name} of GPTConfig has no default, which train.py needs: give it one"
            )
        # `int | None = None` stands for an int that the config works out by itself.
        kinds = [k for k in (type(default), *(typing.get_args(hints.get(name)) or [hints.get(name)])) if k in KEY_TYPES]
        if kinds:
            own[name] = kinds[0], default
    return own


@contextlib.contextmanager
def refusals(prefix=""):
    """Turn what a model.py refuses, by a ValueError or an assert, into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, AssertionError) as error:
        if str(error):
            raise UsageError(f"{prefix}{error}") from error
        at = traceback.extract_tb(error.__traceback__)[-1]  # of an assert without words
        file = os.path.basename(at.filename)
        raise UsageError(f"{prefix.removeprefix(f'{file}: ')}{file}, line {at.lineno}, refuses: {at.line}") from error


def config_of(config_class, model_args):
    """A GPTConfig of these sizes; those that it doesn't have are left out. UsageError where it refuses them."""
    known = {name: value for name, value in model_args.items() if name in fields(config_class)}
    with refusals():
        return config_class(**known)


def build(model_class, config_class, model_args, empty=False):
    """A model of these sizes. empty: its weights have no values and take no memory, if it can be built so."""
    config = config_of(config_class, model_args)
    with refusals("model.py: "):
        if empty:
            # Not one that looks at values while it is built, or keeps tensors that are neither weights nor buffers.
            with contextlib.suppress(Exception), torch.device("meta"):  # a mistake of its own shows again below
                model = model_class(config)
                if not any(_holds_a_tensor(held) for part in model.modules() for held in vars(part).items()):
                    return model
        return model_class(config)


def _holds_a_tensor(attribute):
    """Whether a module's attribute, (name, value), is a tensor or a collection of some."""
    name, value = attribute
    if name in ("_parameters", "_buffers", "_modules"):
        return False
    held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(one, torch.Tensor) for one in held)


def pretrained(model_class, name, dropout):
    """A GPT-2 with trained weights: name as in init_from."""
    if not hasattr(model_class, "from_pretrained"):
        raise UsageError(f"init_from={name!r}: model.py offers no from_pretrained: start from scratch, or resume")
    try:
        with refusals(f"init_from={name!r}: "):
            model = model_class.from_pretrained(name, dict(dropout=dropout))
    except UsageError:
        raise
    except Exception as e:  # transformers and safetensors have their own ways to say that a file is damaged
        if is_out_of_memory(e):
            raise
        raise UsageError(f"init_from={name!r}: {first_line(e)[:300]}") from e
    if not all(torch.isfinite(weight.sum()) for weight in model.parameters()):
        raise UsageError(f"init_from={name!r} holds weights that are not finite: take another")
    return model


def load_weights(model, weights, where):
    """Give a model a checkpoint's weights; where: what holds them, for the message where they are of another model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of each weight without memory: it stays so
            model.load_state_dict(weights)
    except RuntimeError as e:  # torch lists everything that differs, one line each: the first tells enough
        first = str(e).splitlines()[:2][-1].strip()[:200]
        raise UsageError(f"{where}: its weights don't fit its model_args: {first}") from e


def is_finite(model):
    """Whether the weights that a model trains are finite; buffers and frozen weights may hold what they like."""
    for weight in (p for p in model.parameters() if p.requires_grad and p.numel()):
        weight = weight.detach()
        weight = weight.to_local() if hasattr(weight, "to_local") else weight  # a rank looks at its share
        weight = torch.view_as_real(weight) if weight.is_complex() else weight
        if weight.numel() and not all(map(math.isfinite, map(float, torch.aminmax(weight)))):  # takes no memory
            return False
    return True


def source_of(*classes):
    """Where GPT and GPTConfig come from, as JSON can hold it: for a process that must import them as this one did."""
    for cls in classes:
        if cls.__module__ == "__main__":
            raise UsageError(
                f"{cls.__name__} must be in a module of its own, such as model.py: auto_fit's trials import it"
            )
    path = [os.path.abspath(entry) for entry in sys.path]  # an entry '' is the current folder
    return {"path": path, "classes": [[cls.__module__, cls.__qualname__] for cls in classes]}


def from_source(source):
    """The classes of which source_of gave this."""
    sys.path[:] = source["path"]
    return tuple(attrgetter(name)(importlib.import_module(module)) for module, name in source["classes"])


def from_file(path):
    """(GPT, GPTConfig) of a model.py."""
    sys.path.insert(0, os.path.dirname(path))
    module = importlib.import_module(os.path.splitext(os.path.basename(path))[0])
    return module.GPT, module.GPTConfig


def sizes_of(init_from, config, saved, meta, own):
    """model_args of the model that a run starts with, before a single weight is made.

    config: the run's keys. saved: the checkpoint, for 'resume'. meta: the data set's meta.pkl or None. own: own_fields.
    """
    args = {name: config[name] for name in (*SIZES, *own) if name != "vocab_size"}
    if init_from == "scratch":
        args["vocab_size"] = meta["vocab_size"] if meta else PADDED_VOCAB_SIZE
    elif init_from == "resume":
        args |= {name: value for name, value in saved["model_args"].items() if name in (*SIZES, *own)}
        args["dropout"] = config["dropout"]
    else:
        args |= _pretrained_sizes(init_from)
    return {name: args[name] for name in (*SIZES, *own)}


def _pretrained_sizes(name):
    if name in GPT2_SIZES:
        return {**GPT2_SIZES[name], "block_size": 1024, "vocab_size": 50257, "bias": True}
    path = os.path.join(name, "config.json")
    if not os.path.isfile(path):
        raise UsageError(f"there is no {path}: init_from expects a folder that holds a Hugging Face GPT-2")
    prefix = f"{path} is not the config of a GPT-2: "
    with usage_errors(OSError, ValueError, RecursionError, prefix=prefix), open(path, encoding="utf-8") as f:
        theirs = json.load(f)
    keys = {**{name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")}, "block_size": "n_positions"}
    for key in keys.values():
        if not isinstance(theirs, dict) or type(theirs.get(key)) is not int or not 1 <= theirs[key] < 2**31:
            raise UsageError(f"{prefix}{key} must be a whole number from 1 to 2**31")
    return {**{ours: theirs[key] for ours, key in keys.items()}, "bias": True}


# ---- what it offers ----------------------------------------------------------------------------------------


@functools.cache
def _parameters_of_forward(model_class):
    return inspect.signature(model_class.forward).parameters


def offers(model, parameter):
    """Whether the forward method of a model, compiled or not, has this parameter."""
    return parameter in _parameters_of_forward(type(getattr(model, "_orig_mod", model)))


def loss_of(model, x, y):
    """Mean cross-entropy in nats of predicting y, int64 (B, T), from x: without the logits, if the model can."""
    return model(x, y, return_logits=False)[1] if offers(model, "return_logits") else model(x, y)[1]


def blocks_of(model):
    """The transformer's blocks, where a model keeps them as nanoGPT does; else nothing."""
    return getattr(getattr(model, "transformer", None), "h", ())


def lacks(model_class):
    """A line for each thing that training would use and a model doesn't offer."""
    if "return_logits" in _parameters_of_forward(model_class):
        return []
    return ["model.py offers no return_logits: all logits are held, and loss_chunk_mb does nothing"]


def share_of_peak(model, sequences, seconds, peak_flops):
    """Model FLOP/s utilisation, by the model's own estimate_mfu: sequences forward and backward in so many seconds."""
    return model.estimate_mfu(sequences, seconds) * NANOGPT_PEAK_FLOPS / peak_flops


# ---- memory levers -----------------------------------------------------------------------------------------


def apply_levers(model, levers):
    """Let a model train with these MemoryLevers. Where AdamW's state is kept is optimizers.py's."""
    if hasattr(model, "loss_chunk_mb"):
        model.loss_chunk_mb = levers.loss_chunk_mb
    if levers.recompute:
        if not blocks_of(model):
            print("model.py has no transformer.h: recompute does nothing")
        # By a field of its own, a model may draw random numbers that dropout says nothing of.
        draws = getattr(model.config, "dropout", 1.0) > 0 or bool(set(fields(type(model.config))) - set(SIZES))
        for block in blocks_of(model):
            block.forward = _recomputed(block.forward, draws)


def _recomputed(forward, draws):
    """A block's forward that keeps only what enters it, and computes the rest again in the backward pass.

    draws: it draws random numbers, which must be the same again.
    """

    def call(*args, **options):
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **options)

    return call
