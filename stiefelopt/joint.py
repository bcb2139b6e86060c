"""Parameters of one shape that the inner optimizer steps as one tensor.

Most of torch's optimizers are elementwise: what becomes of an entry depends on that entry, its gradient, its state and
the step count alone. So they may step a whole stack of parameters in the calls that one parameter takes. Each
parameter keeps its own state: its tensors are pieces of the stack's, its step count is the stack's.
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
PIECE_BYTES = 2**18


def _most_at_once(like: Tensor) -> int:
    """How many parameters make a piece."""
    return PIECE_BYTES * torch.get_num_threads() // (like.numel() * like.element_size())


def steps_elementwise(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's elementwise optimizers, and nothing around its step might look at parameters."""
    step = vars(optimizer).get("step")
    # A scheduler patches the step to count it, no more.
    patched = step is not None and not getattr(step, "_wrapped_by_lr_sched", False)
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        getattr(torch_optimizer, "_global_optimizer_pre_hooks", None),
        getattr(torch_optimizer, "_global_optimizer_post_hooks", None),
    )
    compiling = torch.compiler.is_compiling()
    return type(optimizer) in ELEMENTWISE and not (patched or compiling or any(hooks))


def saves_calls(params: Sequence[Tensor]) -> bool:
    """Whether several of these fit into a piece; where none do, gathering the points anew would cost for nothing."""
    return len(params) > 1 and _most_at_once(params[0]) >= 2


class Joint:
    """Parameters of one group as one, or as a few pieces that fit the cache.

    Args:
        optimizer: whose state is theirs.
        params: k of them, of one shape.
        whole: (k, *shape), what the optimizer steps in their place.
        grad: like it.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], whole: Tensor, grad: Tensor) -> None:
        self.params = params
        self._optimizer, self._whole = optimizer, whole.detach()
        most = max(1, _most_at_once(whole[0]))
        self._pieces = [slice(i, min(i + most, len(params))) for i in range(0, len(params), most)]
        self.wholes = [self._whole[piece] for piece in self._pieces]
        self._grads = [grad[piece] for piece in self._pieces]
        self._blocks: dict[str, Block] = {}
        self._shared: dict[str, Any] = {}  # the common state
        self._cut: dict[str, tuple[Tensor, list[Tensor]]] = {}  # its tensors, and the pieces' parts of them
        self._lent: list[dict[str, Any]] = []  # what each piece was lent
        self.stepped: dict[str, Tensor] = {}  # those (k, *shape) that the last step has left in place

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
        self.stepped = {name: t for name, t in self._shared.items() if isinstance(t, Tensor) and t.ndim > 1}
        for piece, whole, lent in zip(self._pieces, self.wholes, self._lent, strict=True):
            whole.grad = None
            for name, value in self._optimizer.state.pop(whole, {}).items():
                known = name in lent and value is lent[name]
                if not known:
                    self.stepped.pop(name, None)
                self._return(name, value, piece, known=known)
        self._lent, self._shared = [], {}

    def dissolve(self) -> None:
        """Give every state its own memory again, before others are made of these parameters."""
        self._cut, self.stepped = {}, {}
        for block in self._blocks.values():
            block.dissolve()

    def _return(self, name: str, value: Any, piece: slice, *, known: bool) -> None:
        if not isinstance(value, Tensor):
            parts: Iterable[Any] = repeat(value)
        elif value.ndim == 0:
            if known:  # the first parameter's own number has been stepped, in place
                self._shared[name][piece].fill_(value)
                return
            parts = (value.clone() for _ in self.params[piece])
        elif known:
            return
        else:  # memory of their own: whoever needs several side by side moves them
            parts = (part.clone(memory_format=torch.preserve_format) for part in value)
        for p, part in zip(self.params[piece], parts, strict=False):
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
            elif any(isinstance(v, Tensor) or v != value for v in values):
                return None
            else:
                found[name] = value
        return found if all(len(state) == len(found) for state in states) else None

    def _parts(self, name: str, value: Any) -> list[Any]:
        """What each piece sees of a common state: its rows, its first number, or what is no tensor."""
        if not isinstance(value, Tensor):
            return [value] * len(self._pieces)
        known = self._cut.get(name)
        if known is None or known[0] is not value:
            known = value, [value[p.start] if value.ndim == 1 else value[p] for p in self._pieces]
            self._cut[name] = known
        return known[1]

    def _joined(self, name: str, values: list[Any]) -> Tensor | None:
        """The whole of these tensors, (k, *shape); or of numbers that are all the same, (k,)."""
        block = self._blocks.setdefault(name, Block())
        if values[0].ndim == 0:
            numbers = block.of(values, lambda: values[0].new_empty(len(values)))
            return numbers if numbers is not None and len(set(numbers.tolist())) == 1 else None
        whole = block.of(values, lambda: torch.empty_like(self._whole))
        return whole if whole is not None and whole.shape == self._whole.shape else None


class JointStep:
    """The parameter groups of an optimizer while joints stand in for their parameters."""

    def __init__(self, optimizer: Optimizer, joints: Sequence[Joint]) -> None:
        self._optimizer = optimizer
        self._joints = list(joints)
        self._entered: list[Joint] = []
        self._own: list[tuple[dict[str, Any], list[Tensor]]] = []
        stand_in: dict[int, list[Tensor]] = {id(p): [] for joint in joints for p in joint.params}
        stand_in.update({id(joint.params[0]): joint.wholes for joint in joints})
        self._lists = [
            [q for p in group["params"] for q in stand_in.get(id(p), [p])] for group in optimizer.param_groups
        ]

    def enter(self) -> bool:
        """Let the optimizer see the joints; False, and nothing has changed, where it must see each parameter."""
        if not self._joints or not steps_elementwise(self._optimizer):
            return False
        for joint in self._joints:
            if not joint.enter():
                self.leave()
                return False
            self._entered.append(joint)
        for group, params in zip(self._optimizer.param_groups, self._lists, strict=True):
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
