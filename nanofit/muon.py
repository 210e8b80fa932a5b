"""Muon for the matrices of a model's blocks, and AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) is torch's own. Its updates are scaled to the size of
AdamW's, so that both use the same learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982).
"""

import torch

from nanofit.errors import UsageError
from nanofit.models import blocks_of

MOMENTUM = 0.95


def with_muon(model, adamw, learning_rate, weight_decay, betas):
    """[Muon, AdamW]. adamw: what configure_optimizers gave. Its groups, without Muon's matrices, become AdamW's."""
    matrices = [p for block in blocks_of(model) for p in block.parameters() if p.dim() == 2 and p.requires_grad]
    if not matrices:
        raise UsageError("optimizer='muon' is for the matrices of model.py's transformer.h, and there are none")
    of_muon = set(matrices)
    rest = [{"params": [p for p in group["params"] if p not in of_muon],
             "weight_decay": group.get("weight_decay", 0.0)} for group in adamw.param_groups]  # fmt: skip
    fused = all(group.get("fused") for group in adamw.param_groups)
    rest = [group for group in rest if group["params"]]
    return [
        torch.optim.Muon(matrices, learning_rate, weight_decay, MOMENTUM, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, learning_rate, betas, fused=fused or None),
    ]
