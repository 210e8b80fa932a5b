"""What training needs from a model, whoever wrote it.

Any model.py with nanoGPT's GPTConfig and GPT trains here. What this project's model.py has beyond them is optional.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import json
import math
import os
import sys
import traceback
import types
import typing
import warnings
from operator import attrgetter

import torch
from torch._subclasses.fake_tensor import FakeCopyMode
from torch.overrides import TorchFunctionMode

from nanofit import cards, machine
from nanofit.errors import UsageError, first_line, is_out_of_memory, reason, usage_errors
from nanofit.recompute import recomputed
from nanofit.units import GPT2_SIZES, PADDED_VOCAB_SIZE

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # nanoGPT's GPTConfig
INIT = torch.nn.init
DRAWING = (torch.Tensor.normal_, torch.Tensor.uniform_, INIT.normal_, INIT.uniform_, INIT.kaiming_uniform_)
GELUS = {"gelu": "none", "gelu_new": "tanh"}  # transformers' name of an activation: nn.GELU's argument
KEY_TYPES = (bool, int, float, str)  # what --key=value can set


# ---- the config, and a model of it -------------------------------------------------------------------------


def fields(config_class):
    """The parameters of a GPTConfig: {name: inspect.Parameter}."""
    return dict(inspect.signature(config_class).parameters)


def own_fields(config_class, but=()):
    """{name: (type, default)} of the fields that a GPTConfig has beyond nanoGPT's: they become keys of a run.

    but: names that the script uses, such as batch_size or checkpoint: a field of that name keeps model.py's default,
    and so does a field of another type, such as a tuple.
    """
    try:
        hints = typing.get_type_hints(config_class)
    except (NameError, TypeError):  # a name imported under TYPE_CHECKING; config_class is a function
        hints = {}  # the types of the defaults tell
    own = {}
    for name, parameter in fields(config_class).items():
        if name in (*SIZES, *but) or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = parameter.default
        # `int | None = None` stands for an int that the config computes by itself.
        hint = hints.get(name)
        of_hint = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
        of_hint = [typing.get_origin(kind) or kind for kind in of_hint]  # list[int] is a list
        kinds = [k for k in (*of_hint, type(default)) if k in (*KEY_TYPES, list)]
        if kinds and (default is None or type(default) in KEY_TYPES):
            own[name] = float if {int, float} <= set(kinds) else kinds[0], default
    return own


@contextlib.contextmanager
def refusals(prefix=""):
    """Turn a model.py's ValueError or failed assert into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, AssertionError) as error:
        if str(error):
            raise UsageError(f"{prefix}{error}") from error
        at = traceback.extract_tb(error.__traceback__)[-1]  # an assert without a message
        file = os.path.basename(at.filename)
        raise UsageError(f"{prefix.removeprefix(f'{file}: ')}{file}, line {at.lineno}, refuses: {at.line}") from error


def takes(config_class, name):
    """Whether a GPTConfig has a parameter of this name."""
    parameters = fields(config_class)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def config_of(config_class, model_args):
    """A GPTConfig of these sizes, without those that it has no parameter for. UsageError if it refuses them."""
    known = {name: value for name, value in model_args.items() if takes(config_class, name)}
    with refusals():
        return config_class(**known)


def build(model_class, config_class, model_args, empty=False):
    """A model of these sizes. empty: its weights get no values and take no memory, if it can be built so."""
    config = config_of(config_class, model_args)
    with refusals("model.py: "):
        if empty:
            # A model can't if it reads values while it is built, or keeps tensors that are neither weights nor buffers.
            with contextlib.suppress(Exception), torch.device("meta"):  # its own mistakes show again below
                model = model_class(config)
                if not any(_holds_a_tensor(held) for part in model.modules() for held in vars(part).items()):
                    return model
        return model_class(config)


def build_fake(model_class, config_class, model_args, mode):
    """A model with fake tensors, which have sizes and no values. mode: a FakeTensorMode, which is not entered yet.

    A model may read values while it is built. So it is built on the CPU first, without drawing its weights.
    """
    with torch.device("cpu"), WithoutDrawing():
        model = build(model_class, config_class, model_args)
    with FakeCopyMode(mode):
        return copy.deepcopy(model)


class WithoutDrawing(TorchFunctionMode):
    """Weights stay zero instead of being drawn on the CPU, which takes long."""

    FRESH_BYTES = 2**25  # larger tensors come from the system as zeros, which take no memory until they are written

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in DRAWING:
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs["tensor"]
        with torch.no_grad():
            return tensor if tensor.nbytes >= self.FRESH_BYTES else tensor.zero_()


def _holds_a_tensor(attribute):
    """Whether a module's attribute, (name, value), is a tensor or a collection of some."""
    name, value = attribute
    if name in ("_parameters", "_buffers", "_modules"):
        return False
    held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(one, torch.Tensor) for one in held)


def pretrained(model_class, name, dropout):
    """A GPT-2 with trained weights. name: as init_from."""
    if not hasattr(model_class, "from_pretrained"):
        raise UsageError(f"init_from={name!r}: model.py offers no from_pretrained: start from scratch, or resume")
    try:
        with refusals(f"init_from={name!r}: "):
            return model_class.from_pretrained(name, dict(dropout=dropout))
    except UsageError:
        raise
    except Exception as e:  # transformers and safetensors raise many kinds for a damaged file
        if is_out_of_memory(e):
            raise
        raise UsageError(f"init_from={name!r}: {first_line(e)[:300]}") from e


def load_weights(model, saved, where):
    """Load a checkpoint's weights and activation into a model. where: the checkpoint's name, for the message."""
    weights = saved["model"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # for each weight without memory, which stays so
            # A module may keep its extra state as it gets it: that must not be mapped from the checkpoint's file.
            own = {name: copy.deepcopy(value) for name, value in weights.items() if name.endswith("_extra_state")}
            model.load_state_dict({**weights, **own})
    except Exception as e:  # torch lists everything that differs, one line each: the first is enough
        if is_out_of_memory(e):
            raise
        first = str(e).splitlines()[:2][-1].strip()[:200]
        raise UsageError(f"{where}: its weights don't fit its model_args: {first}") from e
    set_activation(model, saved.get("activation"))


def crop(model, trained_with, block_size):
    """Crop a model to a shorter block_size, and print a line about it."""
    if block_size < trained_with:
        model.crop_block_size(block_size)
        print(f"block_size {trained_with} -> {block_size}: the model is cropped")


def not_finite(model):
    """Names of the trained weights that hold an infinite number or a nan, as a set."""
    found = set()
    for name, p in model.named_parameters():
        weight = p.detach()
        weight = weight.to_local() if hasattr(weight, "to_local") else weight  # a rank looks at its share
        weight = torch.view_as_real(weight) if weight.is_complex() else weight
        # The extremes take no memory, unlike a mask.
        if p.requires_grad and weight.numel() and not all(map(math.isfinite, map(float, torch.aminmax(weight)))):
            found.add(name)
    return found


def source_of(*classes):
    """Where classes come from, in a form for JSON, so that another process can import them."""
    for cls in classes:
        if getattr(cls, "__module__", "__main__") == "__main__" or not hasattr(cls, "__qualname__"):
            raise UsageError(
                "GPT and GPTConfig must be classes in a module, such as model.py: auto_fit's trials import them"
            )
    path = [os.path.abspath(entry) for entry in sys.path]  # an entry '' is the current folder
    return {"path": path, "classes": [[cls.__module__, cls.__qualname__] for cls in classes]}


def from_source(source):
    """The classes, imported from what source_of gave."""
    sys.path[:] = source["path"]
    return tuple(attrgetter(name)(importlib.import_module(module)) for module, name in source["classes"])


def activation_of(model):
    """What all nn.GELU modules of a model compute, 'gelu' or 'gelu_new'; None if they differ or there are none.

    A checkpoint keeps it as an entry of its own, as model_args hold only sizes.
    """
    found = {module.approximate for module in model.modules() if isinstance(module, torch.nn.GELU)}
    return next((name for name, approximate in GELUS.items() if found == {approximate}), None)


def set_activation(model, name):
    """Set what a model's nn.GELU modules compute, by the name that activation_of gives; None changes nothing."""
    for module in model.modules():
        if isinstance(module, torch.nn.GELU) and name in tuple(GELUS):
            module.approximate = GELUS[name]


def sizes_of(init_from, config, saved, meta, own):
    """model_args of the model that a run starts with.

    config: the run's keys. saved: the checkpoint with the model, or None. meta: the data set's meta.pkl, or None.
    own: as own_fields gives them.
    """
    args = {name: config[name] for name in (*SIZES, *own) if name != "vocab_size"}
    if saved:
        args |= {name: value for name, value in saved["model_args"].items() if name in (*SIZES, *own)}
        args["dropout"] = config["dropout"]
    elif init_from == "scratch":
        args["vocab_size"] = meta["vocab_size"] if meta else PADDED_VOCAB_SIZE
    else:
        args |= _pretrained_sizes(init_from)
    return {name: args[name] for name in (*SIZES, *own)}


def _pretrained_sizes(name):
    if name in GPT2_SIZES:
        return {**GPT2_SIZES[name], "block_size": 1024, "vocab_size": 50257, "bias": True}
    path = os.path.join(name, "config.json")
    keys = {**{name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")}, "block_size": "n_positions"}
    prefix = f"init_from={name!r} expects a folder that holds a ckpt.pt, or a Hugging Face GPT-2 with its config.json: "
    with usage_errors(OSError, ValueError, LookupError, TypeError, prefix=prefix), open(path, encoding="utf-8") as f:
        theirs = json.load(f)
        return {**{ours: int(theirs[key]) for ours, key in keys.items()}, "bias": True}


# ---- what it offers ----------------------------------------------------------------------------------------


@functools.cache
def _parameters_of_forward(model_class):
    return inspect.signature(model_class.forward).parameters


def offers(model, parameter):
    """Whether the forward method of a model, compiled or not, has this parameter."""
    return parameter in _parameters_of_forward(type(getattr(model, "_orig_mod", model)))


def loss_of(model, x, y):
    """Mean cross-entropy in nats of predicting y, int64 (B, T), from x; without holding the logits if the model can."""
    return model(x, y, return_logits=False)[1] if offers(model, "return_logits") else model(x, y)[1]


def blocks_of(model):
    """The transformer's blocks, if a model keeps them in transformer.h as nanoGPT does; else nothing."""
    blocks = getattr(getattr(model, "transformer", None), "h", ())
    if isinstance(blocks, torch.nn.ModuleDict):
        return tuple(blocks.values())
    return blocks if isinstance(blocks, (torch.nn.ModuleList, torch.nn.Sequential)) else ()


def lacks(model_class):
    """A line if a model lacks what training would use."""
    if not hasattr(model_class, "forward") or "return_logits" in _parameters_of_forward(model_class):
        return []  # GPT may be a function, whose model isn't known yet
    return ["model.py offers no return_logits: all logits are held, and loss_chunk_mb does nothing"]


def share_of_peak(model, sequences, seconds, peak_flops):
    """Model FLOP/s utilisation by the model's own estimate_mfu, which gives a share of an A100's peak."""
    return model.estimate_mfu(sequences, seconds) * cards.A100.tflops * 1e12 / peak_flops


def mfu_of(model, sequences, device, dtype):
    """A function of the seconds that these sequences take: share_of_peak on this device, -1 if the model can't tell."""
    peak_flops, note = machine.peak_flops(device, dtype)
    if note:
        print(note)

    def mfu(seconds):
        nonlocal peak_flops
        if not peak_flops:
            return -1.0  # as nanoGPT while it is unknown
        try:
            share = share_of_peak(model, sequences, seconds, peak_flops)
        except Exception as e:  # a model.py of the user's may raise anything
            print(f"mfu is not known: the model's estimate_mfu can't tell ({reason(e)})")
            peak_flops = 0.0
            return -1.0
        if share > 1 and device.type == "cpu":  # the machine was busy while its peak was measured
            peak_flops, share = share * peak_flops, 1.0
        return share

    return mfu


# ---- memory levers -----------------------------------------------------------------------------------------


def apply_levers(model, levers):
    """Let a model train with these MemoryLevers. (optimizer_state and shard are applied elsewhere.)"""
    if hasattr(model, "loss_chunk_mb"):
        model.loss_chunk_mb = levers.loss_chunk_mb
    if levers.recompute:
        if not blocks_of(model):
            print("model.py has no transformer.h: recompute does nothing")
        for block in blocks_of(model):
            block.forward = recomputed(block)
