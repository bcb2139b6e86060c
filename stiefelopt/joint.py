"""Parameters of one shape that the inner optimizer steps as one tensor.

Most of torch's optimizers are elementwise: what becomes of an entry depends on that entry, its gradient, its state and
the step count alone. So they may step a whole stack of parameters in the calls that one parameter takes. Each
parameter keeps its own state: its tensors are pieces of the stack's, its step count is the stack's.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def steps_elementwise(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's elementwise optimizers, and nothing around its step might look at parameters."""
    step = vars(optimizer).get("step")
    patched = step is not None and not getattr(
        step, "_wrapped_by_lr_sched", False
    )  # a scheduler counts, no more
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        getattr(torch_optimizer, "_global_optimizer_pre_hooks", None),
        getattr(torch_optimizer, "_global_optimizer_post_hooks", None),
    )
    compiling = torch.compiler.is_compiling()
    return type(optimizer) in ELEMENTWISE and not (patched or compiling or any(hooks))


def _alone(piece: Tensor) -> Tensor:
    """With memory of its own, so that whoever needs several side by side may move it."""
    return piece.clone(memory_format=torch.preserve_format)


class Joint:
    """Parameters of one group as one.

    Args:
        optimizer: whose state is theirs.
        params: k of them, of one shape.
        whole: (k, *shape), what the optimizer steps in their place.
        grad: like it.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], whole: Tensor, grad: Tensor) -> None:
        self.params, self.whole = params, whole.detach()
        self._optimizer, self._grad = optimizer, grad
        self._blocks: dict[str, Block] = {}
        self._lent: dict[str, Any] = {}

    def enter(self) -> bool:
        """Lend the whole its gradient and the state of the parameters; False where they have none in common."""
        lent = self._common([self._optimizer.state.get(p) or {} for p in self.params])
        if lent is None:
            return False
        self._lent = dict(lent)
        self._optimizer.state[self.whole] = lent
        self.whole.grad = self._grad
        return True

    def leave(self) -> None:
        """Give every parameter its piece of what the state has become."""
        self.whole.grad = None
        for name, value in self._optimizer.state.pop(self.whole, {}).items():
            known = name in self._lent and value is self._lent[name]
            if isinstance(value, Tensor) and value.ndim == 0:
                if known:
                    self._whole_of(name).fill_(value)
                else:
                    self._share(name, [value.clone() for _ in self.params])
            elif not known:
                apart = isinstance(value, Tensor) and value.shape == self.whole.shape
                self._share(name, map(_alone, value) if apart else repeat(value))
        self._lent = {}

    def dissolve(self) -> None:
        """Give every state its own memory again, before others are made of these parameters."""
        for block in self._blocks.values():
            block.dissolve()

    def _share(self, name: str, values: Any) -> None:
        for p, value in zip(self.params, values, strict=False):
            self._optimizer.state[p][name] = value

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

    def _joined(self, name: str, values: list[Any]) -> Tensor | None:
        """The whole of these tensors: a stack, or the one number that they all hold."""
        block = self._blocks.setdefault(name, Block())
        if values[0].ndim == 0:
            numbers = block.of(values, lambda: values[0].new_empty(len(values)))
            return numbers[0] if numbers is not None and bool((numbers == numbers[0]).all()) else None
        whole = block.of(values, lambda: torch.empty_like(self.whole))
        return whole if whole is not None and whole.shape == self.whole.shape else None

    def _whole_of(self, name: str) -> Tensor:
        whole = self._blocks[name].whole
        assert whole is not None
        return whole


class JointStep:
    """The parameter groups of an optimizer while joints stand in for their parameters."""

    def __init__(self, optimizer: Optimizer, joints: Sequence[Joint]) -> None:
        self._optimizer = optimizer
        self._joints = list(joints)
        self._entered: list[Joint] = []
        self._own: list[tuple[dict[str, Any], list[Tensor]]] = []
        stand_in: dict[int, Tensor | None] = {id(p): None for joint in joints for p in joint.params}
        stand_in.update({id(joint.params[0]): joint.whole for joint in joints})
        self._lists = [
            [q for p in group["params"] if (q := stand_in.get(id(p), p)) is not None]
            for group in optimizer.param_groups
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
