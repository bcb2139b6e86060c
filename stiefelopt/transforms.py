"""What torch's transforms leave of a tensor: whether the host may read its numbers, whether it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

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


class _NoDerivative(torch.autograd.Function):
    """Results that depend on the inputs, and an error for whoever asks how."""

    @staticmethod
    def forward(ctx: Any, what: str, results: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(t.view_as(t) for t in results)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ConfigError(
            f"{ctx.what} has no derivative here: detach() what it returns, or leave it out of the loss."
        )


def without_derivative(method: F) -> F:
    """Decorator of a method of points and vectors that come as tuples of tensors: no graph, and no silent zero."""

    @wraps(method)
    def call(self: Any, *points: Any) -> Any:
        with torch.no_grad():
            y = method(self, *points)
        inputs = [t for point in points for t in point]
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
            return y
        what = f"{type(self).__name__}.{method.__name__}"
        return type(y)(*_NoDerivative.apply(what, list(y), *inputs))

    return call  # type: ignore[return-value]
