"""Locally optimal initialization of RiemannLoRALinear by a randomized SVD that needs backward passes only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import is_distributed
from ..draws import check_generator, normal
from ..errors import ConfigError, StepError
from .adapt import adapted_layers
from .riemann_lora import RiemannLoRALinear, check_scale

Closure = Callable[[], Tensor]

_NO_LOSS = (
    "loss_closure must return the scalar loss with its graph (no backward, no .item()), computed by the "
    "adapted model."
)


@torch.no_grad()
def loi_init(
    model: nn.Module,
    loss_closure: Closure | Sequence[Closure],
    *,
    scale: float | None = None,
    oversample: int = 16,
    power_iterations: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> None:
    r"""Start every RiemannLoRALinear where the first Riemannian gradient is as large as it can be.

    With G = dL/dW at the base weight, U becomes its first r left and V its second r right singular vectors, so
    that the projected gradient is the best rank-2r approximation of G. G itself is never formed: a randomized SVD
    (BackPropRSVD) asks for G Om and G^T Q only, which are ordinary gradients of a probe W + A Om^T at A = 0 or
    W + Q B^T at B = 0.

    Args:
        model: adapted with `RiemannLoRALinear`; other layers are left alone.
        loss_closure: returns the scalar loss with its graph, of the same batch each time, and does not call
            backward; several closures are several batches, whose gradients add up.
        scale: S = scale I at the start, default each layer's own; any finite number but 0.
        oversample: columns beyond 2 r; clipped to what the layer has.
        power_iterations: q; every one costs two passes and squares the decay of the singular values.
        generator: for the probes, on its own device.
        progress: show tqdm's bar, where tqdm is installed and somebody is looking (a terminal or a notebook).

    Raises:
        ConfigError: no such layer, an option out of range, or the closure is none, or returned no loss that depends on
            the model, or a layer ran without a graph (reentrant checkpointing).
        StepError: a gradient is not finite. In both cases nothing has changed.

    Cost: 2 (q + 1) forward and backward passes, all layers at once, each batch; memory for 2 (m + n) (2 r +
        oversample) numbers a layer beside the activations. The random state is the same in all passes, so that
        dropout draws the same masks, and is put back afterwards.
        Forward passes update what they always do (running statistics of batch norms).
    Accuracy: with the defaults the norm of the first projected gradient was 0.9985 of the best possible on a 64 x 48
        gradient of slowly falling singular values (r = 4; 0.962 at q = 0, 0.99996 at q = 2); at q = 15 it is the best
        to 1e-9.
    Reference: Bogachev et al., RiemannLoRA (arXiv 2507.12142), LOI and BackPropRSVD; Halko, Martinsson & Tropp (2011).
    """
    closures = _as_list(loss_closure)
    check_generator(generator)
    layers = {name: m for name, m in adapted_layers(model).items() if isinstance(m, RiemannLoRALinear)}
    if not layers:
        raise ConfigError(
            "the model holds no RiemannLoRALinear; adapt(model, RiemannLoRALinear, init='loi', ...) first."
        )
    counts = (oversample, power_iterations)
    if not closures or not all(isinstance(c, int) and c >= 0 for c in counts):
        raise ConfigError(
            f"loi_init got {len(closures)} closures, oversample={oversample!r} and power_iterations="
            f"{power_iterations!r}; a closure at least, and integers from 0 on are needed."
        )
    check_scale(scale)
    for layer in layers.values():
        layer.require_own_weight()
    sharded = next((name for name, layer in layers.items() if is_distributed(layer.U)), None)
    if sharded is not None:
        raise ConfigError(
            f"{sharded} is sharded, and loi_init needs whole layers: call it before fully_shard, on every rank "
            f"with the same batches and generator."
        )
    if isinstance(model, DistributedDataParallel):
        raise ConfigError(
            "loi_init works on the model that DistributedDataParallel wraps, and starts the layers anew on this rank "
            "alone: call it before DDP, which then gives every rank the first one's start."
        )
    passes = 2 * (power_iterations + 1) * len(closures)
    with _Probing(layers) as probing, _progress(passes, progress) as advance:
        starts = probing.singular_vectors(closures, oversample, power_iterations, generator, advance)
    for name, (u, v) in starts.items():
        layers[name].start_at(u, v, scale)


def _as_list(loss_closure: Any) -> list[Closure]:
    """One closure or several as a list."""
    several = isinstance(loss_closure, Iterable) and not (
        callable(loss_closure) or isinstance(loss_closure, Tensor)
    )
    closures = list(loss_closure) if several else [loss_closure]
    wrong = [type(c).__name__ for c in closures if not callable(c)]
    if wrong:
        raise ConfigError(
            f"loss_closure is or holds a {wrong[0]}; a function that returns the loss with its graph, or several, are "
            f"needed: loi_init(model, lambda: loss_of(model(batch)))."
        )
    return closures


class _Probing:
    """Layers that, while this is entered, are their base plus a probe, and whose own correction is taken back."""

    def __init__(self, layers: dict[str, RiemannLoRALinear]) -> None:
        self.layers = layers
        self.probes = {name: _Probe() for name in layers}

    def __enter__(self) -> _Probing:
        self._before = [
            (layer, layer.base.weight, dict(layer._kept), layer.U0, layer.V0)
            for layer in self.layers.values()
        ]
        for name, layer in self.layers.items():
            layer._correct(None, None)
            layer._probe = self.probes[name]
        return self

    def __exit__(self, *_: object) -> None:
        """Put back what was there, the very same tensors: undoing a correction by arithmetic would round."""
        for layer, weight, kept, u0, v0 in self._before:
            layer._probe = None
            layer.base.weight, layer._kept, layer.U0, layer.V0 = weight, kept, u0, v0

    def singular_vectors(
        self,
        closures: Sequence[Closure],
        oversample: int,
        iterations: int,
        generator: torch.Generator | None,
        advance: Callable[[], object],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """First r left and second r right singular vectors of every gradient; layers without one are left out."""
        sizes = {
            name: min(2 * layer.r + oversample, layer.in_features, layer.out_features)
            for name, layer in self.layers.items()
        }
        right = {name: _normal(layer.V, sizes[name], generator) for name, layer in self.layers.items()}
        for _ in range(iterations + 1):
            left = {k: _orthonormal(t) for k, t in self._products(closures, right, True, advance).items()}
            found = self._products(closures, left, False, advance)
            right = {name: _orthonormal(t) for name, t in found.items()}
        return {
            name: _start(layer.r, left[name], found[name])
            for name, layer in self.layers.items()
            if bool(found[name].any())
        }

    def _products(
        self,
        closures: Sequence[Closure],
        fixed: dict[str, Tensor],
        on_right: bool,
        advance: Callable[[], object],
    ) -> dict[str, Tensor]:
        """G X for X on the right, else G^T X, of all layers at once."""
        for name, layer in self.layers.items():
            free = layer.U if on_right else layer.V
            zeros = torch.zeros(len(free), fixed[name].shape[1], dtype=free.dtype, device=free.device)
            probe = self.probes[name]
            probe.free, probe.fixed, probe.on_right = zeros.requires_grad_(), fixed[name], on_right
        frees = [probe.free for probe in self.probes.values()]
        total = [torch.zeros_like(free) for free in frees]
        for closure in closures:
            for probe in self.probes.values():
                probe.grad_modes.clear()
            with torch.random.fork_rng(), torch.enable_grad():
                grads = torch.autograd.grad(_checked_loss(closure()), frees, allow_unused=True)
            advance()
            self._check_seen(grads)
            if all(g is None for g in grads):
                raise ConfigError(_NO_LOSS)
            total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        for name, t in zip(self.layers, total, strict=True):
            if not bool(torch.isfinite(t).all()):
                raise StepError(
                    f"the gradient at {name} is not finite; nothing has changed. Look at the loss and the batch."
                )
        return dict(zip(self.layers, total, strict=True))

    def _check_seen(self, grads: Sequence[Tensor | None]) -> None:
        """Refuse a layer that has run, but never with a graph: its gradient is not zero, it is unknown."""
        for (name, probe), g in zip(self.probes.items(), grads, strict=True):
            if g is None and probe.grad_modes == {False}:
                raise ConfigError(
                    f"{name} ran without a graph, so that its gradient cannot be asked for: reentrant checkpointing or "
                    f"torch.no_grad() in the model. Checkpoint with use_reentrant=False, or not at all "
                    f"(gradient_checkpointing_disable()), while loi_init runs; leave layers under no_grad out of adapt."
                )


class _Probe:
    """What a layer adds in place of its update: (x Om) A^T with A free, or (x B) Q^T with B free."""

    free: Tensor
    fixed: Tensor
    on_right: bool

    def __init__(self) -> None:
        self.grad_modes: set[bool] = set()  # those it ran in

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        self.grad_modes.add(torch.is_grad_enabled())
        inner, outer = (self.fixed, self.free) if self.on_right else (self.free, self.fixed)
        x = x.to(inner.dtype)
        return y + (x @ inner @ outer.mT).to(y.dtype)


def _normal(like: Tensor, columns: int, generator: torch.Generator | None) -> Tensor:
    return normal((len(like), columns), like.dtype, like.device, generator).to(like)


def _orthonormal(z: Tensor) -> Tensor:
    """An orthonormal basis, of a common scale first: gradients may be tiny, or zero."""
    z64 = z.double()
    return torch.linalg.qr(z64 / z64.abs().amax().clamp_min(torch.finfo(torch.float64).tiny))[0].to(z.dtype)


def _start(r: int, q: Tensor, gtq: Tensor) -> tuple[Tensor, Tensor]:
    """U and V from G ~ q (G^T q)^T; a layer thinner than 2 r shares directions."""
    v, _, uh = torch.linalg.svd(gtq.double(), full_matrices=False)
    second = slice(r, 2 * r) if v.shape[1] >= 2 * r else slice(v.shape[1] - r, None)
    return (q.double() @ uh.mT[:, :r]).to(q.dtype), v[:, second].to(q.dtype)


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ConfigError(_NO_LOSS)
    return loss


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """tqdm's bar where tqdm is installed."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda: None
        return
    with tqdm(
        total=total, desc="loi_init", unit="pass", leave=False, disable=None if wanted else True
    ) as bar:
        yield bar.update
