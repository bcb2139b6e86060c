"""Base and update computed as one: the same numbers at fewer passes, and only where nobody could tell."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from stiefelopt import RiemannLoRALinear, StelLALinear

LAYERS: dict[str, Callable[..., Any]] = {
    "stella": StelLALinear,
    "stella-diagonal": lambda base, **o: StelLALinear(base, diagonal=True, **o),
    "stella-keep": lambda base, **o: StelLALinear(base, init="pseudo-zero", correction="keep", **o),
    "riemannlora": RiemannLoRALinear,
    "riemannlora-keep": lambda base, **o: RiemannLoRALinear(base, correction="keep", **o),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def layer_of(make: Callable[..., Any], *, bias: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = make(nn.Linear(7, 9, bias=bias, dtype=torch.float64), r=3, alpha=6, **options)
    with torch.no_grad():
        layer.S.add_(torch.rand_like(layer.S))
    return layer


def outcome(layer: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients by the input and the factors."""
    x = x.clone().requires_grad_()
    y = layer(x)
    factors = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad((y * torch.arange(1.0, 10.0)).sin().sum(), [x, *factors])]


@each_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0, 3)])
def test_it_is_what_base_and_update_give_apart(
    make: Callable[..., Any], bias: bool, batch: tuple[int, ...]
) -> None:
    layer, x = layer_of(make, bias=bias), torch.randn(*batch, 7, dtype=torch.float64)
    assert layer.may_fuse(x)
    together = outcome(layer, x)
    seen = []
    layer.base.register_forward_hook(lambda _, inputs, y: seen.append(y.clone()))
    assert not layer.may_fuse(x)
    torch.testing.assert_close(together, outcome(layer, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen, [nn.functional.linear(x, layer.base.weight, layer.base.bias)])


class Products(TorchDispatchMode):
    """Counts the flops of matrix products (torch's counter listens to every module, and then nothing is fused)."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * b.shape[0] * b.shape[1]
        return func(*args, **(kwargs or {}))


class Wide(TorchDispatchMode):
    """Counts the results of the size of the layer's output."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.shape == (5, 9) and out.data_ptr() not in known:
            self.count += 1
        return out


@each_layer
def test_it_makes_one_wide_result(make: Callable[..., Any]) -> None:
    layer, x = layer_of(make), torch.randn(5, 7, dtype=torch.float64)
    with torch.no_grad(), Wide() as together:
        layer(x)
    layer.base.register_forward_hook(lambda *_: None)
    with torch.no_grad(), Wide() as apart:
        layer(x)
    assert (together.count, apart.count) == (1, 2)


def test_whoever_listens_or_trains_is_served() -> None:
    layer, x = layer_of(StelLALinear), torch.randn(5, 7, dtype=torch.float64)
    seen: list[type[nn.Module]] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    layer(x)
    handle.remove()
    assert nn.Linear in seen
    layer.base.weight.requires_grad_()
    layer(x).sum().backward()
    assert layer.base.weight.grad is not None


def test_a_base_whose_forward_was_replaced_is_called() -> None:
    """accelerate's hooks are no hooks of torch's: they put another forward into the module."""
    layer, x = layer_of(StelLALinear), torch.randn(5, 7, dtype=torch.float64)
    plain, own = layer(x), layer.base.forward
    layer.base.forward = lambda x: own(x) + 100
    torch.testing.assert_close(layer(x), plain + 100)


def test_dropout_is_applied_to_the_adapters_input_alone() -> None:
    layer, x = layer_of(StelLALinear, dropout=0.5), torch.ones(5, 7, dtype=torch.float64)
    torch.manual_seed(1)
    training = layer(x)
    torch.manual_seed(1)
    h = nn.functional.dropout(x, 0.5)
    expected = layer.base(x) + layer.scale * (h @ layer.V @ layer.S.T @ layer.U.T)
    torch.testing.assert_close(training, expected)
    torch.testing.assert_close(
        layer.eval()(x), layer.base(x) + layer.add_update(torch.zeros(5, 9).double(), x)
    )


def test_autocast_decides_the_dtype() -> None:
    layer = layer_of(StelLALinear).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 7)).dtype == torch.bfloat16


def test_stella_is_differentiable_twice() -> None:
    layer, x = layer_of(StelLALinear), torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    factors = (layer.U, layer.S, layer.V)

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        named = dict(zip(("U", "S", "V"), factors, strict=True))
        return functional_call(layer, named, (x,)).tanh()

    assert torch.autograd.gradgradcheck(function, (x, *factors))


def second_derivatives(layer: Any, x: Tensor) -> list[Tensor]:
    """Of a layer applied twice, the second time to what it made itself: its input depends on its factors."""
    x = x.clone().requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(layer(x).tanh()).sin()
    firsts = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    return list(torch.autograd.grad(torch.stack([(g**3).sum() for g in firsts]).sum(), leaves))


@pytest.mark.parametrize("make", [m for name, m in LAYERS.items() if "riemann" not in name])
def test_second_derivatives_are_those_of_base_and_update_apart(make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    layer, x = make(nn.Linear(8, 8, dtype=torch.float64), r=3), torch.randn(5, 8, dtype=torch.float64)
    together = second_derivatives(layer, x)
    layer.base.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(together, second_derivatives(layer, x), rtol=1e-10, atol=1e-12)


def test_stella_is_differentiable_forward() -> None:
    layer, x = layer_of(StelLALinear), torch.randn(4, 7, dtype=torch.float64)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, layer(x + tangent) - layer(x))


@each_layer
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_others_may_write_to_its_output(
    make: Callable[..., Any], fused: bool, batch: tuple[int, ...]
) -> None:
    layer, x = layer_of(make, dropout=0.0 if fused else 1e-9), torch.randn(*batch, 7, dtype=torch.float64)
    factors = [layer.U, layer.S, layer.V]
    assert layer.may_fuse(x) == fused
    expected = torch.autograd.grad(layer(x).relu().sum(), factors)
    torch.testing.assert_close(torch.autograd.grad(layer(x).relu_().sum(), factors), expected)


@each_layer
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_can_be_saved(make: Callable[..., Any]) -> None:
    layer, x = layer_of(make).eval(), torch.randn(5, 7, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), buffer)
    buffer.seek(0)
    other = torch.randn(11, 7, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.load(buffer)(other), layer(other))


@each_layer
def test_gradients_lie_like_their_parameters(make: Callable[..., Any]) -> None:
    layer, seen = layer_of(make), []
    for name in ("U", "S", "V"):
        getattr(layer, name).register_hook(lambda g: seen.append(g.is_contiguous()))
    layer(torch.randn(5, 7, dtype=torch.float64)).sum().backward()
    assert seen == [True] * 3


@each_layer
@pytest.mark.parametrize("rows", [2, 40])
def test_it_takes_the_products_of_lora_and_some_of_r_rows(make: Callable[..., Any], rows: int) -> None:
    n, m, r = 24, 32, 4
    layer = make(nn.Linear(n, m), r=r)
    x = torch.randn(rows, n, requires_grad=True)
    with Products() as counted:
        layer(x).sum().backward()
    base = 2 * (2 * rows * n * m)
    # x V and the update, dy U and what it adds to dL/dx, and the gradients; of U0 and V0 beside them but the former.
    columns = r if layer.folds or layer.U0 is None else 2 * r
    thin = 2 * rows * (n + m) * (2 * columns + r)
    # S into the factors, the gradients of the factors through S, and the gradient of S
    small = 2 * r * r * (2 * (n + m) + rows)
    assert base + thin <= counted.flops <= base + thin + small


def test_factors_may_be_batched_by_vmap() -> None:
    layer, x = layer_of(StelLALinear), torch.randn(4, 7, dtype=torch.float64)
    s = torch.randn(6, 3, 3, dtype=torch.float64)
    found = vmap(lambda s: functional_call(layer, {"S": s}, (x,)))(s)
    torch.testing.assert_close(found, torch.stack([functional_call(layer, {"S": one}, (x,)) for one in s]))
