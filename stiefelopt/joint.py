"""Parameters of one shape that the inner optimizer steps as one tensor, and large ones that it steps in pieces.

Most of torch's optimizers are elementwise: what becomes of an entry depends on that entry, its gradient, its state and
the step count alone. So they may step a whole stack of parameters in the calls that one parameter takes, or one
parameter in runs of entries that the cache holds. Each parameter keeps its own state: its tensors are pieces of the
stack's, its step count is the stack's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .moments import Block

ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in (
        *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax"),
        *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    )
)


# Bytes of points that each thread steps at a time: with gradient, moments and a temporary they fit a core's cache.
PIECE_BYTES = 2**19
# Pieces from which on a single parameter is cut: its temporaries would not stay with the allocator.
LARGE = 8
# State of these types is the same where it is equal.
_PLAIN = (bool, int, float, str)


def _piece_length(like: Tensor) -> int:
    """Entries that make a piece."""
    return max(1, PIECE_BYTES * torch.get_num_threads() // like.element_size())


def steps_elementwise(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's elementwise optimizers, and nothing around its step might look at parameters."""
    step = vars(optimizer).get("step")
    # A scheduler patches the step to count it, no more.
    patched = step is not None and not getattr(step, "_wrapped_by_lr_sched", False)
    if type(optimizer) not in ELEMENTWISE or patched:
        return False
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        getattr(torch_optimizer, "_global_optimizer_pre_hooks", None),
        getattr(torch_optimizer, "_global_optimizer_post_hooks", None),
    )
    return not any(hooks)


def saves_time(params: Sequence[Tensor]) -> bool:
    """Whether several of these make a piece, or one makes many; between these torch's loop serves as well."""
    count, length = params[0].numel(), _piece_length(params[0])
    return (len(params) > 1 and 2 * count <= length) or count >= LARGE * length


def _stands_for(a: object, b: object) -> bool:
    """Whether two values are one, or plain and equal; comparing others (arrays, lists) might say anything."""
    return a is b or (type(a) is type(b) and type(a) in _PLAIN and a == b)


def _flat(t: Tensor) -> Tensor:
    """The entries of a tensor without gaps, in the order they have in memory; a view."""
    return t.as_strided((t.numel(),), (1,))


class Joint:
    """Parameters of one group as one, in pieces that fit the cache.

    A piece is a run of entries, which may hold many parameters or be a part of one.

    Args:
        optimizer: whose state is theirs.
        params: k of them, of one shape.
        whole: (k, *shape), what the optimizer steps in their place; no gaps.
        grad: like it.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], whole: Tensor, grad: Tensor) -> None:
        self.params = params
        self._optimizer, self._whole = optimizer, whole.detach()
        self._length = _piece_length(whole)
        self.wholes, self._grads = self._pieces(self._whole), self._pieces(grad)
        self._blocks: dict[str, Block] = {}
        self._shared: dict[str, Any] = {}  # the common state
        self._cut: dict[str, tuple[Tensor, list[Tensor]]] = {}  # its tensors, and the pieces' parts of them
        self._lent: list[dict[str, Any]] = []  # what each piece was lent
        self.stepped: dict[str, Tensor] = {}  # those (k, *shape) that the last step has left in place

    def _pieces(self, whole: Tensor) -> list[Tensor]:
        return list(_flat(whole).split(self._length))

    def enter(self) -> bool:
        """Lend the pieces their gradients and the state of the parameters; False where that has no common form."""
        common = self._common([self._optimizer.state.get(p) or {} for p in self.params])
        if common is None:
            return False
        self._shared = common
        parts = {name: self._parts(name, value) for name, value in common.items()}
        for i, (whole, grad) in enumerate(zip(self.wholes, self._grads, strict=True)):
            self._lent.append({name: part[i] for name, part in parts.items()})
            self._optimizer.state[whole] = dict(self._lent[-1])
            whole.grad = grad
        return True

    def leave(self) -> None:
        """Give every parameter its part of what the state has become."""
        self.stepped = {}
        states = [self._optimizer.state.pop(whole, {}) for whole in self.wholes]
        for whole in self.wholes:
            whole.grad = None
        # A step that has failed may have left state with some of the pieces only: then there is none.
        for name in [name for name in states[0] if all(name in state for state in states)]:
            values = [state[name] for state in states]
            known = all(name in lent and v is lent[name] for v, lent in zip(values, self._lent, strict=True))
            self._return(name, values, known=known)
        self._lent, self._shared = [], {}

    def dissolve(self) -> None:
        """Give every state its own memory again, before others are made of these parameters."""
        self._cut, self.stepped = {}, {}
        for block in self._blocks.values():
            block.dissolve()

    def _return(self, name: str, values: list[Any], *, known: bool) -> None:
        value = values[0]
        if not isinstance(value, Tensor):
            parts: Iterable[Any] = repeat(value)
        elif value.ndim == 0:
            if known:
                self._shared[name].fill_(value)
                return
            parts = (value.clone() for _ in self.params)
        elif known:
            self.stepped[name] = self._shared[name]
            return
        else:  # memory of their own: whoever needs several side by side moves them
            whole = torch.empty_like(self._whole, dtype=value.dtype)
            torch.cat(values, out=_flat(whole))
            parts = (part.clone(memory_format=torch.preserve_format) for part in whole)
        for p, part in zip(self.params, parts, strict=False):
            self._optimizer.state[p][name] = part

    def _common(self, states: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The one state that stands for all of these, whose tensors are theirs; None where there is none."""
        found = {}
        for name, value in states[0].items():
            values = [state.get(name) for state in states]
            if isinstance(value, Tensor):
                whole = self._joined(name, values)
                if whole is None:
                    return None
                found[name] = whole
            elif not all(_stands_for(value, v) for v in values):
                return None
            else:
                found[name] = value
        return found if set(map(len, states)) == {len(found)} else None

    def _parts(self, name: str, value: Any) -> list[Any]:
        """What each piece sees of a common state: its entries, a number of its own, or what is no tensor."""
        if not isinstance(value, Tensor):
            return [value] * len(self.wholes)
        if value.ndim == 1:
            return list(value[:1].repeat(len(self.wholes)))
        known = self._cut.get(name)
        if known is None or known[0] is not value:
            known = self._cut[name] = value, self._pieces(value)
        return known[1]

    def _joined(self, name: str, values: list[Any]) -> Tensor | None:
        """The whole of these tensors, (k, *shape); or of numbers that are all the same, (k,)."""
        block = self._blocks.setdefault(name, Block())
        if values[0].ndim == 0:
            numbers = block.of(values, lambda: values[0].new_empty(len(values)))
            return numbers if numbers is not None and len(set(numbers.tolist())) == 1 else None
        whole = block.of(values, lambda: torch.empty_like(self._whole))
        if whole is None or (whole.shape, whole.stride()) != (self._whole.shape, self._whole.stride()):
            return None
        return whole


class JointStep:
    """The parameter groups of an optimizer while joints stand in for their parameters."""

    def __init__(self, optimizer: Optimizer, joints: Sequence[Joint]) -> None:
        self._optimizer = optimizer
        self._joints = list(joints)
        self._entered: list[Joint] = []
        self._own: list[tuple[dict[str, Any], list[Tensor]]] = []
        stand_in: dict[int, list[Tensor]] = {id(p): [] for joint in joints for p in joint.params}
        stand_in.update({id(joint.params[0]): joint.wholes for joint in joints})
        # Groups by index: those without a joint are the user's, who may change them between steps.
        self._lists = {
            i: [q for p in group["params"] for q in stand_in.get(id(p), [p])]
            for i, group in enumerate(optimizer.param_groups)
            if any(id(p) in stand_in for p in group["params"])
        }

    def enter(self) -> bool:
        """Let the optimizer see the joints; False, and nothing has changed, where it must see each parameter."""
        if not self._joints or not steps_elementwise(self._optimizer):
            return False
        for joint in self._joints:
            if not joint.enter():
                self.leave()
                return False
            self._entered.append(joint)
        for i, params in self._lists.items():
            group = self._optimizer.param_groups[i]
            self._own.append((group, group["params"]))
            group["params"] = params
        return True

    def leave(self) -> None:
        """Undo `enter`, if it has been."""
        for group, params in self._own:
            group["params"] = params
        for joint in self._entered:
            joint.leave()
        self._own, self._entered = [], []

    def dissolve(self) -> None:
        """Give every state its own memory again."""
        for joint in self._joints:
            joint.dissolve()
