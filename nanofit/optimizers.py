"""AdamW, and two that keep its state elsewhere than in the device's memory in float32.

Whatever the kind, state_dict() is that of torch.optim.AdamW with float32 moments: a checkpoint can be resumed with
another optimizer_state, and by nanoGPT.
"""

import importlib.util

import torch

from nanofit.errors import UsageError

OPTIMIZER_STATES = ("float32", "8bit", "offload")
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign


def require(kind):
    """Raise a UsageError if the library that this kind needs is not installed."""
    if kind == "8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError("optimizer_state='8bit' is kept by torchao: pip install torchao, or use 'offload'")


def make_optimizer(model, kind, weight_decay, learning_rate, betas, device):
    """The optimizer of a model that is on its device already, its groups as in GPT.configure_optimizers.

    kind: 'float32'; '8bit' (state of two bytes a parameter instead of eight; Dettmers et al. 2022,
    arXiv:2110.02861), which needs torchao: see require; or 'offload' (no state on the device).
    """
    adamw = model.configure_optimizers(weight_decay, learning_rate, betas, device.type)
    if kind == "float32":
        return adamw
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in adamw.param_groups]
    print(f"AdamW's state: {kind}")
    return (_eight_bit if kind == "8bit" else OffloadedAdamW)(groups, lr=learning_rate, betas=betas)


def allocate_state(optimizer):
    """Make the state of torch's AdamW at once, as its first step would: after that, a step takes no memory.

    Each parameter's state is there whole or not at all, so that it can be called again after running out of memory.
    """
    if type(optimizer) is not torch.optim.AdamW:
        return
    for group in optimizer.param_groups:
        on_device = group["fused"] or group["capturable"]
        for p in group["params"]:
            if not optimizer.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
                optimizer.state[p] = {"step": step, **{name: torch.zeros_like(p) for name in MOMENTS}}


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW in the machine's memory: 12 bytes a parameter there, and 4 more during a step; none on the device.

    Gradients travel to the host and weights back once a step, after clipping and unscaling: more accumulation makes
    that cheaper. (torchao's CPUOffloadOptimizer copies gradients in the backward pass, before they are clipped.)
    """

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr})
        hosted = [{**g, "params": [self._to_host(p) for p in g["params"]]} for g in groups]
        self._inner = torch.optim.AdamW(hosted, lr=lr, betas=betas, fused=True)

    @staticmethod
    def _to_host(tensor):
        """A copy in the machine's memory, pinned if it comes from a GPU, so that copies to there don't wait."""
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
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)  # a number would compile anew
            return super().step(closure)

        def state_dict(self):
            plain, scales = super().state_dict(), {}
            for index, state in plain["state"].items():
                compact = {name: state[name] for name in MOMENTS if hasattr(state[name], "codes")}
                # On the CPU: on the device, there is no room for them.
                plain["state"][index] = {**state, **{name: v.cpu().dequantize() for name, v in compact.items()}}
                scales[index] = {name: v.scale.cpu() for name, v in compact.items()}
            plain["param_groups"] = [{**group, "lr": float(group["lr"])} for group in plain["param_groups"]]
            return {**plain, "scales": scales}  # with which the same codes come out again

        @torch.no_grad()
        def load_state_dict(self, state_dict):
            params = [p for group in self.param_groups for p in group["params"]]
            for index, saved in state_dict["state"].items():
                p = params[index]
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
