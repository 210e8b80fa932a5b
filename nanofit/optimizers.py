"""The optimizer that a model configures; and AdamW with its state in 8 bits or in the machine's memory.

The state_dict() of these two is that of torch.optim.AdamW with float32 moments. So a checkpoint can be resumed with
another optimizer_state, and by nanoGPT.
"""

import importlib.util
from functools import partial

import torch

from nanofit.errors import UsageError, first_line, is_out_of_memory
from nanofit.muon import with_muon
from nanofit.sharding import share_like

OPTIMIZERS = ("adamw", "muon")
OPTIMIZER_STATES = ("float32", "8bit", "offload")
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign
IMPLEMENTATION = ("fused", "foreach", "capturable")  # how this machine computes a step
SHARE = "lr_share"  # a key of a group: its learning rate divided by the schedule's
OF_THIS_RUN = (*IMPLEMENTATION, SHARE)  # a group's keys that are not taken from a checkpoint


def require(name, kind):
    """Raise a UsageError if a package for this optimizer and this kind of state is missing."""
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UsageError(f"optimizer='muon' needs torch 2.9 or newer, not {torch.__version__}: use 'adamw'")
    if kind == "8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError("optimizer_state='8bit' is kept by torchao: pip install torchao, or use 'offload'")


def configured(model, name, weight_decay, learning_rate, betas, device_type):
    """What a model's configure_optimizers gives; with name 'muon', Muon takes over the matrices of its blocks.

    A list of optimizers becomes one.
    """
    optimizer = model.configure_optimizers(weight_decay, learning_rate, betas, device_type)
    if isinstance(optimizer, (list, tuple)):
        optimizer = Together(optimizer)
    if name == "muon":
        optimizer = Together(with_muon(model, optimizer, learning_rate, weight_decay, betas))
    return optimizer


class Together:
    """Several optimizers as one."""

    def __init__(self, parts):
        self.parts = list(parts)

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return dict(enumerate(part.state_dict() for part in self.parts))

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state.values(), strict=True):
            part.load_state_dict(saved)


def make_optimizer(model, kind, weight_decay, learning_rate, betas, device, name="adamw"):
    """The optimizer of a model that is already on its device.

    kind: how AdamW keeps its state. 'float32'; '8bit' (two bytes a parameter instead of eight; Dettmers et al. 2022,
    arXiv:2110.02861), which needs torchao; or 'offload' (none on the device). Other optimizers stay as they are.
    """
    optimizer = configured(model, name, weight_decay, learning_rate, betas, device.type)
    rates = [group.get("lr") for group in optimizer.param_groups]
    rates = [learning_rate if rate is None else float(rate) for rate in rates]  # no rate: the schedule gives it
    differ = len(set(rates)) > 1 and learning_rate > 0
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group[SHARE] = rate / learning_rate if differ else 1.0
    if kind == "float32":
        return optimizer
    changed = any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups)
    if type(optimizer) is not torch.optim.AdamW or changed:
        own = type(optimizer).__name__
        print(f"optimizer_state={kind!r} is for plain AdamW: the optimizer here ({own}) is used as it is")
        return optimizer
    print(f"AdamW's state: {kind}")
    dropped = (*IMPLEMENTATION, "amsgrad", "maximize", "differentiable")
    groups = [{k: v for k, v in group.items() if k not in dropped} for group in optimizer.param_groups]
    return (_eight_bit if kind == "8bit" else OffloadedAdamW)(groups, lr=learning_rate, betas=betas)


def set_learning_rate(optimizer, lr):
    """Give each group the schedule's learning rate, as nanoGPT does, or its share of it if the groups' rates differ."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(SHARE, 1.0)
    # An object that holds optimizers may list old groups: load_state_dict makes new ones. A group without SHARE was
    # never listed, and keeps its own rate.
    for group in (group for one in _torch_optimizers(optimizer) for group in one.param_groups if SHARE in group):
        group["lr"] = lr * group[SHARE]


def parameters_of(optimizer):
    """The weights that an optimizer, and optimizers within it, update, as a set."""
    return {
        p for one in (optimizer, *_torch_optimizers(optimizer)) for group in one.param_groups for p in group["params"]
    }


def leaves_out_by_tensor(optimizer):
    """Whether step() does nothing if the optimizer's found_inf, a tensor on the device, is 1, without waiting."""
    of_torch = type(optimizer).__module__.startswith("torch.optim.")
    return of_torch and all(group.get("fused") for group in optimizer.param_groups)


def allocate_state(optimizer):
    """Make the state of torch's AdamW now, as its first step would, so that a step takes no more memory.

    It can be called again after memory ran out. The state of another optimizer is made by its first step.
    """
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups if type(part) is torch.optim.AdamW else ():
            on_device = group["fused"] or group["capturable"]
            names = (*MOMENTS, "max_exp_avg_sq") if group["amsgrad"] else MOMENTS
            for p in group["params"]:
                if p.requires_grad and not part.state[p]:
                    step = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
                    part.state[p] = {"step": step, **{name: torch.zeros_like(p) for name in names}}


# ---- a checkpoint's state ----------------------------------------------------------------------------------


def load(optimizer, state, cropped=False):
    """Load a checkpoint's state, as state_dict gave it, into an optimizer. Tensors are copied.

    cropped: block_size has become smaller, and the state of cropped weights is cropped as well. The state of sharded
    weights is sharded. This machine's way to compute a step stays. Raises UsageError if load_state_dict refuses it.
    """
    parts = _torch_optimizers(optimizer)
    adapted = {}
    hooks = [part.register_load_state_dict_pre_hook(partial(_adapt, adapted, cropped)) for part in parts]
    try:
        # An optimizer that isn't torch's may keep the tensors that it gets, which are mapped from the file.
        optimizer.load_state_dict(state if optimizer in parts else _changed(state, torch.clone))
    except Exception as e:
        if is_out_of_memory(e):
            raise
        raise UsageError(
            f"the checkpoint's optimizer does not belong to its model: {type(e).__name__}: {first_line(e)}"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
    for part, saved in adapted.items():
        _keep_precision(part, saved)


def _torch_optimizers(whole):
    """All torch optimizers in what configure_optimizers returned: itself, and those that it holds."""
    found, looking = [], [whole]
    for held in looking:
        if held is whole or isinstance(held, torch.optim.Optimizer):
            attributes = getattr(held, "__dict__", {})
            if "_optimizer_load_state_dict_pre_hooks" in attributes and held not in found:
                found.append(held)
            looking.extend(v for k, v in attributes.items() if k not in ("state", "param_groups"))
        elif isinstance(held, (dict, list, tuple)):
            looking.extend(held.values() if isinstance(held, dict) else held)
    return found


def _changed(value, change):
    """A copy of nested dicts and lists in which each tensor is replaced by change(tensor)."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(one, change) for key, one in value.items()}
    return type(value)(_changed(one, change) for one in value) if type(value) in (list, tuple) else value


def _with_parameters(optimizer, saved):
    """[(parameter, its index, its state)] for an optimizer and a saved state_dict."""
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    pairs = zip(params, indices, strict=False)  # load_state_dict refuses another length
    return [(p, index, saved["state"][index]) for p, index in pairs if index in saved["state"]]


def _adapt(adapted, cropped, optimizer, saved):
    """A saved state, adapted to this run, for load_state_dict, which checks the numbers of groups and weights."""
    state = dict(saved["state"])
    for p, index, values in _with_parameters(optimizer, saved):
        state[index] = _changed(values, partial(_share_of, p, cropped))
    groups = [{k: v for k, v in group.items() if k not in OF_THIS_RUN} for group in saved["param_groups"]]
    if len(groups) == len(optimizer.param_groups):  # keys that a saved group lacks stay
        groups = [{**ours, **theirs} for ours, theirs in zip(optimizer.param_groups, groups, strict=True)]
    adapted[optimizer] = {**saved, "state": state, "param_groups": groups}
    return adapted[optimizer]


def _share_of(p, cropped, value):
    """A copy of a tensor of p's state: if p is cropped, its rows; if p is sharded, this rank's share."""
    of_rows = value.dim() == p.dim() > 0 and all(n in (1, m) for n, m in zip(value.shape[1:], p.shape[1:], strict=True))
    if cropped and of_rows:
        value = value[: len(p)]
    return (share_like(value, p) if value.shape == p.shape else value).clone()


def _keep_precision(optimizer, saved):
    """Restore the dtypes of state, which load_state_dict casts to the weight's: ASGD's eta, float32 weights."""
    for p, _, values in _with_parameters(optimizer, saved):
        for name, value in values.items():
            loaded = optimizer.state[p].get(name)
            if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[p][name] = value.to(loaded.device)


# ---- AdamW's state elsewhere -------------------------------------------------------------------------------


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW in the machine's memory: 12 bytes a parameter there, and 4 more during a step; none on the device.

    Once a step, after unscaling and clipping, gradients are copied to the host and weights back. (torchao's
    CPUOffloadOptimizer copies gradients in the backward pass, before they are clipped.)
    """

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr})
        hosted = [{**g, "params": [self._to_host(p) for p in g["params"]]} for g in groups]
        self._inner = torch.optim.AdamW(hosted, lr=lr, betas=betas, fused=True)

    @staticmethod
    def _to_host(tensor):
        """A copy in the machine's memory; pinned if it comes from a GPU, for fast copies back."""
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor.detach())

    def _pairs(self):
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            yield from zip(group["params"], inner["params"], strict=True)

    @torch.no_grad()
    def step(self, closure=None):
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"] = group["lr"]
        for p, host in self._pairs():
            host.grad = None if p.grad is None else p.grad.to("cpu")
        self._inner.step()
        for p, host in self._pairs():
            p.copy_(host, non_blocking=True)
            host.grad = None

    def state_dict(self):
        return self._inner.state_dict()

    def load_state_dict(self, state_dict):
        self._inner.load_state_dict(state_dict)
        with torch.no_grad():
            for p, host in self._pairs():
                host.copy_(p)


def _eight_bit(groups, lr, betas):
    """torchao's AdamW8bit, with the learning rate as a number and with AdamW's state_dict."""
    from torchao.optim import AdamW8bit
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    class EightBitAdamW(AdamW8bit):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)  # a number would be compiled anew
            return super().step(closure)

        def state_dict(self):
            plain, scales = super().state_dict(), {}
            for index, state in plain["state"].items():
                compact = {name: state[name] for name in MOMENTS if hasattr(state[name], "codes")}
                # On the CPU: float32 moments don't fit the device.
                plain["state"][index] = {**state, **{name: v.cpu().dequantize() for name, v in compact.items()}}
                scales[index] = {name: v.scale.cpu() for name, v in compact.items()}
            plain["param_groups"] = [{**group, "lr": float(group["lr"])} for group in plain["param_groups"]]
            return {**plain, "scales": scales}  # with them, loading gives the same codes

        @torch.no_grad()
        def load_state_dict(self, state_dict):
            for p, index, saved in _with_parameters(self, _adapt({}, False, self, state_dict)):
                state = self.state[p] = {"step": torch.as_tensor(saved["step"]).cpu()}
                for name, signed in MOMENTS.items():
                    value, state[name] = saved[name].to(p.device), self._new_buffer(p, signed)
                    state[name].copy_(value)
                    scale = state_dict.get("scales", {}).get(index, {}).get(name)
                    if scale is not None and scale.numel() * self.block_size == p.numel():
                        blocks = value.view(-1, self.block_size) / scale.to(p.device)[:, None]
                        state[name].scale.copy_(scale)
                        state[name].codes.copy_(quantize_8bit_with_qmap(blocks, state[name].qmap).view(p.shape))

    return EightBitAdamW(groups, lr=lr, betas=betas)
