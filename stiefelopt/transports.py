"""Vector transports: how a tangent vector at x is carried to y = R(x, u)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .errors import ConfigError
from .gram import Reduce, Tall, combine, gram, sym
from .registry import Registry
from .shapes import check_returned, on_stacks

GRAM, AMBIENT = "it maps w = y^T v, (B, p, p), to s", "it is called with stacks x, u, y and v, (B, n, p)"


@dataclass(frozen=True)
class Transport:
    """A vector transport; call it as ``transport(x, u, y, v)``.

    Form "gram": v - y f(y^T v). Form "ambient": f(x, u, y, v) on stacks (B, n, p).
    """

    name: str
    form: str
    function: Callable[..., Tensor]

    def __call__(self, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v, tangent at x, as a tangent vector at y = R(x, u); all are (*b, n, p)."""
        return on_stacks(lambda x, u, y, v: self.apply([x], [u], [y], [v])[0], x=x, u=u, y=y, v=v)

    def apply(self, xs: Tall, us: Tall, ys: Tall, vs: Tall, reduce: Reduce | None = None) -> list[Tensor]:
        """The transport on stacks.

        Raises:
            StepError: the function returned another shape.
        """
        if self.form == "ambient":
            return [
                self._returned(self.function(*args), args[0], AMBIENT)
                for args in zip(xs, us, ys, vs, strict=True)
            ]
        w = gram(ys, vs, reduce)
        return combine(vs, ys, self._returned(self.function(w), w, GRAM), alpha=-1.0)

    def _returned(self, found: object, like: Tensor, called: str) -> Tensor:
        return check_returned("transport", self.name, found, like.shape, called)


_registry: Registry[Transport] = Registry("transport", words=("none",))
names, get = _registry.names, _registry.get


def register(name: str, *, form: str = "gram") -> Callable[[Callable[..., Tensor]], Transport]:
    """Decorator that adds a transport.

    Args:
        name: the word that ``Stiefel(transport=...)`` will accept.
        form: "gram": ``f(w) -> s`` with w = y^T v, and the result is v - y s; "ambient": ``f(x, u, y, v)``.

    Raises:
        ConfigError: not a name, or one that is taken; another form.
    """
    _registry.check_name(name)
    if form not in ("gram", "ambient"):
        raise ConfigError(
            f"transport {name!r} was given form={form!r}; use 'gram' (w -> s) or 'ambient' ((x, u, y, v) -> v)."
        )
    return lambda function: _registry.add(name, Transport(name, form, function))


@register("projection")
def projection(w: Tensor) -> Tensor:
    """v - y sym(y^T v): the orthogonal projection at the new point. Cost: 4 n p^2 flops.

    Reference: Absil, Mahony & Sepulchre (2008), section 8.1.3.
    """
    return sym(w)
