"""Muon for the matrices of a model's blocks, AdamW for the rest: one optimizer to whoever trains.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) is torch's own. An update has the size of AdamW's, by which
both take one learning rate and one weight decay (Liu et al. 2025, arXiv:2502.16982).
"""

import torch

from nanofit.errors import UsageError
from nanofit.models import blocks_of

MOMENTUM = 0.95


class Muon:
    """parts: the two, in the order of their state in state_dict()."""

    def __init__(self, model, adamw, learning_rate, weight_decay, betas):
        """adamw: what configure_optimizers gave. Its groups, without what Muon moves, become AdamW's."""
        matrices = [p for block in blocks_of(model) for p in block.parameters() if p.dim() == 2 and p.requires_grad]
        if not matrices:
            raise UsageError("optimizer='muon' is for the matrices of model.py's transformer.h, and there are none")
        of_muon = set(matrices)
        rest = [{"params": [p for p in group["params"] if p not in of_muon],
                 "weight_decay": group.get("weight_decay", 0.0)} for group in adamw.param_groups]  # fmt: skip
        fused = all(group.get("fused") for group in adamw.param_groups)
        self.parts = [
            torch.optim.Muon(matrices, learning_rate, weight_decay, MOMENTUM, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([group for group in rest if group["params"]], learning_rate, betas, fused=fused or None),
        ]

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
        return dict(zip(("muon", "adamw"), (part.state_dict() for part in self.parts), strict=True))

    def load_state_dict(self, state):
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state[name])
