"""What torch's transforms leave of a tensor: whether the host may read its numbers, whether it is differentiated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Where the host may read numbers without waiting; tests take it away to be blind as on an accelerator.
HOST: tuple[str, ...] = ("cpu",)


def under_transform() -> bool:
    """Whether a function is being transformed by torch.func: vmap, grad, jvp, jacrev, hessian and the like."""
    return torch._C._are_functorch_transforms_active()


def host_can_look(a: Tensor) -> bool:
    """Whether reading a number back costs nothing: an accelerator would have to synchronize, vmap has many numbers."""
    return a.device.type in HOST and not under_transform()


def is_differentiated(a: Tensor) -> bool:
    """Whether derivatives are asked for, backward or forward."""
    return a.requires_grad or forward_ad.unpack_dual(a).tangent is not None
