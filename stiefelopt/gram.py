"""Tall to small and back: the only code that touches tall matrices on the default step.

Everything that Stiefel geometry needs lies in the span of a point x and a displacement u, so it is a
computation on p x p matrices between two tall operations: `gram` (tall -> small) and `combine`
(small -> tall). A *tall* argument is a list with one stack ``(b, n, p)`` per height n; small matrices of
all heights form one batch ``(B, p, p)``, B the sum of the b, in the order of the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .transforms import host_can_look, is_differentiated, under_transform

Tall = Sequence[Tensor]
Reduce = Callable[[Tensor], Tensor]

# Columns of x^T x computed at a time, for a stack of several and for a single matrix, where x is at least twice BLOCK
# wide: 0.7 to 0.9 of the whole product, see benchmarks/NOTES.md.
BLOCK, LONE_BLOCK = 128, 192
# A BLAS adds up the rows one by one, in few chains where there are few columns: in float32 2e-5 off at 2048x8 where
# one entry is near 1 and the others small, 1e-2 at a million rows. So up to FEW columns FEW_ROWS at a time, else ROWS,
# where there are LONG rows and more (below, 4e-6 at most); and up to MANY columns, so that the pieces need no memory.
FEW, FEW_ROWS, ROWS, LONG, MANY = 8, 256, 4096, 2**15, 64


def identity_like(small: Tensor) -> Tensor:
    """The p x p identity in the dtype and on the device of a small batch."""
    return torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)


def sym(a: Tensor) -> Tensor:
    """Symmetric part (a + a^T) / 2."""
    return (a + a.mT).mul_(0.5)  # in place: fresh memory costs more than the pass


def gram(xs: Tall, ys: Tall, reduce: Reduce | None = None, *, out: Tensor | None = None) -> Tensor:
    """All products x^T y as one batch.

    Args:
        xs: stacks (b, n, p).
        ys: stacks of the same shapes, or the very same ones.
        reduce: sums the batch over the ranks that hold rows; None when every row is here.
        out: (B, p, p) to write to. Fresh memory costs as much as a pass or two.

    Returns:
        (B, p, p).

    Cost: 2 n p^2 flops per matrix, little more than half of that for wide x^T x; one pass over memory.
    """
    if out is None:
        parts = [_product(x, y) for x, y in zip(xs, ys, strict=True)]
        small = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        small = out
        for x, y, piece in zip(xs, ys, split(out, xs), strict=True):
            _product(x, y, piece)
    return small if reduce is None else reduce(small)


def _product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x^T y of stacks; by blocks of columns where it is x^T x, and wide, of rows where there are very many."""
    rows, long = (FEW_ROWS, 2 * FEW_ROWS) if x.shape[-1] <= FEW else (ROWS, LONG)
    if x.shape[1] >= long and x.shape[-1] <= MANY and x.dtype == torch.float32 and x.device.type == "cpu":
        return _by_rows(x, y, rows, out)
    if x is not y or x.shape[-1] < 2 * BLOCK or not _may_write(x):
        return torch.bmm(x.mT, y, out=out)
    if out is None:
        out = x.new_empty((x.shape[0], x.shape[2], x.shape[2]))
    _fill_symmetric(x, out)
    return out


def _by_rows(x: Tensor, y: Tensor, rows: int, out: Tensor | None) -> Tensor:
    """x^T y, a sum of products of about so many rows each, and of those left over."""
    least = x.shape[1] // rows
    # Pieces of a batch that leave nothing over are a batch, too; else torch copies them.
    count = next((k for k in range(least, 2 * least) if x.shape[1] % k == 0), least)
    rows = x.shape[1] // count
    first, second = (t[:, : count * rows].unflatten(1, (count, rows)) for t in (x, y))
    c = torch.matmul(first.mT, second).sum(1)
    if count * rows < x.shape[1]:
        c = torch.baddbmm(c, x[:, count * rows :].mT, y[:, count * rows :])
    return c if out is None else out.copy_(c)


def _may_write(x: Tensor) -> bool:
    """Whether a result may be put together from pieces, on the CPU: nothing is derived, mapped or compiled."""
    return host_can_look(x) and not is_differentiated(x) and not torch.compiler.is_compiling()


def _fill_symmetric(x: Tensor, c: Tensor) -> None:
    """c <- x^T x: of each block of rows what lies from the diagonal on, and its mirror image."""
    width = LONE_BLOCK if len(x) == 1 else BLOCK
    for start in range(0, x.shape[-1], width):
        here = slice(start, start + width)
        rows = c[:, here, start:]
        if len(x) == 1:
            rows.baddbmm_(x[:, :, here].mT, x[:, :, start:], beta=0)
        else:  # torch multiplies batches in parallel only into memory without gaps
            rows.copy_(torch.bmm(x[:, :, here].mT, x[:, :, start:]))
        c[:, start + width :, here] = rows[:, :, width:].mT
    for block in _diagonal_blocks(c, width):
        block.copy_(sym(block))  # BLAS may sum the two halves in different orders


def _diagonal_blocks(c: Tensor, width: int) -> Iterator[Tensor]:
    """Views of those that are whole, as one (b, k, width, width), and of what is left of the diagonal."""
    (count, p, _), (step, *steps) = c.shape, c.stride()
    yield c.as_strided((count, p // width, width, width), (step, width * sum(steps), *steps))
    if p % width:
        yield c[:, p - p % width :, p - p % width :]


def grams(*pairs: tuple[Tall, Tall], reduce: Reduce | None = None) -> list[Tensor]:
    """The `gram` of every pair, summed over the ranks all at once."""
    found = [gram(xs, ys) for xs, ys in pairs]
    if reduce is None:
        return found
    return list(reduce(torch.cat(found)).split([len(small) for small in found]))


def squared_norm(tensors: Tall, reduce: Reduce | None = None) -> float:
    """Sum of the squares of all entries. Cost: one pass, and a look at the result."""
    total = torch.stack([t.abs().square().sum() for t in tensors]).sum(0, keepdim=True)
    return (total if reduce is None else reduce(total)).item()


def split(small: Tensor, like: Tall) -> tuple[Tensor, ...]:
    """Cut a batch (B, ...) into one piece per height."""
    return (small,) if len(like) == 1 else small.split([x.shape[0] for x in like])


def products(xs: Tall, t: Tensor) -> list[Tensor]:
    """x t for every matrix: stacks (b, n, p) times (B, p, p). Cost: 2 n p^2 flops, one pass."""
    return [torch.bmm(x, s) for x, s in zip(xs, split(t, xs), strict=True)]


def combine(zs: Tall, xs: Tall, t: Tensor, *, alpha: float = 1.0, out: Tall | None = None) -> list[Tensor]:
    """z + alpha x t for every matrix: the increment form, which rounds three times better than x (I + t).

    Args:
        zs: stacks (b, n, p).
        xs: stacks (b, n, p).
        t: (B, p, p).
        alpha: factor of the product.
        out: stacks to write to; they may be the zs, not the xs.

    Cost: 2 n p^2 flops per matrix, one pass over memory.
    """
    pieces = split(t, xs)
    if out is None:
        return [torch.baddbmm(z, x, s, alpha=alpha) for z, x, s in zip(zs, xs, pieces, strict=True)]
    for z, x, s, y in zip(zs, xs, pieces, out, strict=True):
        torch.baddbmm(z, x, s, alpha=alpha, out=y)
    return list(out)


def mix(*terms: tuple[Tall, Tensor], start: Tall | None = None, out: Tall | None = None) -> list[Tensor]:
    """start + x s + z t + ... for every matrix, height after height, so that what is summed stays in the cache.

    Args:
        terms: stacks (b, n, p) with their factors (B, p, p); two or more.
        start: stacks that the sum begins with.
        out: stacks to write to; they may be the start or those of any term but the last.

    Cost: 2 n p^2 flops per matrix and term.
    """
    (first, s), *middle, (last, t) = [(xs, split(t, xs)) for xs, t in terms]
    sums = []
    for k, x in enumerate(first):
        total = torch.bmm(x, s[k]) if start is None else torch.baddbmm(start[k], x, s[k])
        ours = out is not None or not (is_differentiated(total) or under_transform())
        for xs, pieces in middle:
            total = torch.baddbmm(total, xs[k], pieces[k], out=total if ours else None)
        sums.append(torch.baddbmm(total, last[k], t[k], out=None if out is None else out[k]))
    return sums


def predicted_gram(a: Tensor, b: Tensor, c: Tensor, w: Tensor, q: Tensor) -> Tensor:
    """G = a^T c a + a^T w b + (a^T w b)^T + b^T q b, the Gram that y = x a + u b is going to have.

    Args:
        a: (B, p, p), likewise b, c = x^T x, w = x^T u and q = u^T u.
    """
    cross = a.mT @ w @ b
    return a.mT @ c @ a + cross + cross.mT + b.mT @ q @ b


def fold(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Self-correction: one Newton-Schulz step on the predicted Gram, the same for every retraction.

    Both coefficients are multiplied by (3 I - G) / 2, so that drift in x (c != I) shrinks quadratically instead of
    adding up.
    """
    t = 1.5 * identity_like(g) - 0.5 * g
    return a @ t, b @ t


def zero_matrices(us: Tall, reduce: Reduce | None = None) -> Tensor | None:
    """Mask (B,) of the displacements that are exactly zero; on the CPU None when there is none.

    On an accelerator the mask is always returned, so that nothing waits for the device.
    """
    return _mask_or_none(torch.cat([(u == 0).all(-1).all(-1) for u in us]), reduce)


def unmoved_matrices(
    xs: Tall, ms: Tall, e: Tensor, drift: float, reduce: Reduce | None = None
) -> Tensor | None:
    """Mask (B,) of the matrices whose moved copy m equals x bit for bit; on the CPU None when there is none.

    Args:
        xs: stacks (b, n, p).
        ms: stacks of the same shapes.
        e: x^T m - I.
        drift: the largest |x^T x - I| there may be, and so |e| where m equals x. On the CPU the tall scan runs only
            if some e is that small.
        reduce: sums a batch over ranks.
    """
    if host_can_look(e) and e.numel():
        # One row of each is mostly enough to see that it moved.
        if bool(e[..., 0, :].abs().amax(-1).amin() > drift):
            return None
        if not bool(e.abs().amax((-2, -1)).amin() <= drift):
            return None
    return _mask_or_none(torch.cat([(x == m).all(-1).all(-1) for x, m in zip(xs, ms, strict=True)]), reduce)


def _mask_or_none(mask: Tensor, reduce: Reduce | None) -> Tensor | None:
    if reduce is not None:  # set where it is set on all ranks
        mask = reduce((~mask).to(torch.float32)) == 0
    return mask if not host_can_look(mask) or bool(mask.any()) else None


def largest_entries(stack: Tensor) -> Tensor:
    """max |entry| of every matrix (or tensor) of a stack, (b,); NaN where one is NaN."""
    if stack.numel() == 0:
        return stack.new_zeros(len(stack))
    return torch.linalg.vector_norm(stack, math.inf, dim=tuple(range(1, stack.ndim)))


def subtract_points(xs: Tall, ms: Tall) -> None:
    """Overwrite moved points by displacements, m <- m - x."""
    for x, m in zip(xs, ms, strict=True):
        torch.sub(m, x, out=m)


def scale_displacements(ds: Tall, scales: Sequence[float]) -> bool:
    """Multiply each stack by its scale, in place; returns whether any has changed."""
    for d, scale in zip(ds, scales, strict=True):
        if scale != 1.0:
            d.mul_(scale)
    return any(scale != 1.0 for scale in scales)


def keep_where(mask: Tensor | None, xs: Tall, ys: Tall, out: Tall | None = None) -> list[Tensor]:
    """x where the mask is set, else y; with no mask the ys themselves."""
    if mask is None:
        return list(ys)
    outs: Sequence[Tensor | None] = [None] * len(xs) if out is None else out
    every = zip(split(mask, xs), xs, ys, outs, strict=True)
    return [torch.where(m[:, None, None], x, y, out=o) for m, x, y, o in every]
