"""Dataclasses of tensors: what holds for all that is composed of tensors and of one another."""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, Generic, Self, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

T = TypeVar("T")


class remembered(Generic[T]):
    """A property that is computed once. Unlike functools' it needs no lock, which torch.compile cannot trace."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, of: None, owner: type) -> "remembered[T]": ...
    @overload
    def __get__(self, of: object, owner: type) -> T: ...
    def __get__(self, of: object | None, owner: type) -> "remembered[T] | T":
        if of is None:
            return self
        value = self.compute(of)
        if not torch.compiler.is_compiling():
            of.__dict__[self.name] = value
        return value


class Tree:
    """A dataclass of tensors, other trees, tuples of these, and settings, never changed once made."""

    @remembered
    def parts(self) -> "tuple[Tensor | Tree, ...]":
        """The trees and floating-point tensors directly within, in order."""
        found: list[Tensor | Tree] = []
        for name in fields(type(self)):
            _gather(self.__dict__[name], found)
        return tuple(found)

    @remembered
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves that gradients flow to: every floating-point tensor within, in order."""
        found: list[Tensor] = []
        for part in self.parts:
            found += part.tensors if isinstance(part, Tree) else (part,)
        return tuple(found)

    @remembered
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, [part.dtype for part in self.parts])

    @remembered
    def device(self) -> torch.device:
        return (self.tensors or self.parts)[0].device

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """On tensors of its own; settings, which never change, are shared."""
        leaves = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in self.tensors]
        return self.refilled(iter(leaves))

    def refilled(self, tensors: Iterator[Tensor]) -> Self:
        """The same tree on other leaves, in the order of `tensors`."""
        made: Self = _refilled(self, tensors)
        return made

    def to(self, target: torch.dtype | torch.device | str) -> Self:
        """The same in another dtype (what is complex stays complex) or on another device."""
        moved: Self = _moved(self, target)
        return moved


def fields(kind: type) -> dict[str, Any]:
    """A dataclass's fields by name."""
    found: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    return found


def transformed(*tensors: Tensor) -> bool:
    """Whether values may not be looked at: under torch.compile, a `torch.func` transform or forward mode."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def known(condition: Tensor) -> bool:
    """Whether a condition holds everywhere and may be looked at."""
    return not transformed(condition) and bool(condition.all())


def same(a: Tree, b: Tree) -> bool:
    """Whether two trees are one composition on the same memory."""
    if a is b:
        return True
    if type(a) is not type(b) or len(a.tensors) != len(b.tensors) or transformed():
        return False
    views = zip(a.tensors, b.tensors, strict=True)
    return _settings(a) == _settings(b) and all(_same_view(x, y) for x, y in views)


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _gather(part: object, found: "list[Tensor | Tree]") -> None:
    if isinstance(part, Tree):
        found.append(part)
    elif isinstance(part, tuple):
        for item in part:
            _gather(item, found)
    elif isinstance(part, Tensor) and _inexact(part):
        found.append(part)


def _refilled(part: Any, supply: Iterator[Tensor]) -> Any:
    if isinstance(part, Tensor):
        return next(supply) if _inexact(part) else part
    if isinstance(part, Tree):
        new = object.__new__(type(part))
        for name in fields(type(part)):
            object.__setattr__(new, name, _refilled(getattr(part, name), supply))
        return new
    return tuple(_refilled(item, supply) for item in part) if type(part) is tuple else part


def _moved(part: Any, target: torch.dtype | torch.device | str) -> Any:
    if isinstance(part, Tree):
        new = object.__new__(type(part))
        for name in fields(type(part)):
            object.__setattr__(new, name, _moved(getattr(part, name), target))
        return new
    if type(part) is tuple:
        return tuple(_moved(item, target) for item in part)
    if not isinstance(target, torch.dtype):
        return (
            part.to(target)
            if isinstance(part, Tensor)
            else torch.device(target)
            if isinstance(part, torch.device)
            else part
        )
    kind = part.dtype if isinstance(part, Tensor) else part
    if not isinstance(kind, torch.dtype) or not (kind.is_floating_point or kind.is_complex):
        return part
    wanted = target.to_complex() if kind.is_complex and not target.is_complex else target
    return part.to(wanted) if isinstance(part, Tensor) else wanted


def _settings(part: object) -> object:
    """A tree without its floating-point tensors, for comparison."""
    if isinstance(part, Tensor):
        return None if _inexact(part) else (part.data_ptr(), part.shape, part.stride())
    if isinstance(part, Tree):
        return (type(part), *(_settings(getattr(part, name)) for name in fields(type(part)) if name != "claims"))
    return tuple(_settings(item) for item in part) if type(part) is tuple else part


def _same_view(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype, x.is_conj()) == (
        y.data_ptr(),
        y.shape,
        y.stride(),
        y.dtype,
        y.is_conj(),
    )
