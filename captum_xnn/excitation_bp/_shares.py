r"""The shares by which a winning neuron passes its probability on to its children, the neurons it is computed from.

A neuron i of an affine layer wins with probability :math:`P_i`. Given that, its child j wins with

.. math::
    P(j|i) = \frac{a_j w^+_{ij}}{Z_i}, \qquad Z_i = \sum_k a_k w^+_{ik}, \qquad P_j = a_j \sum_i w^+_{ij} P_i / Z_i

with activations :math:`a \ge 0` and :math:`w^+ = \max(w, 0)`. The bias takes no share. Where :math:`Z_i = 0` no child
is active, and what i has won is lost. P is linear in what comes from above, so that signals can be added, subtracted
and batched.

Negative activations, as at the pixels or after GELU, count by one of three settings:

- ``excitatory``: every positive product counts, :math:`\max(a_j w_{ij}, 0)`, also that of two negative factors;
- ``clamp``: negative activations take no share;
- ``raw``: the formula as it stands; shares may be negative, and are large where products cancel.

Conventions:
    p is the probability of a layer's output, and has its shape. Half precision is computed in float32.

Reference:
    Zhang, Bargal, Lin, Brandt, Shen, Sclaroff, "Top-Down Neural Attention by Excitation Backprop", International
    Journal of Computer Vision, 2018, section 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_xnn.excitation_bp._settings import Negative

__all__ = [
    "Affine",
    "Attention",
    "Convolution",
    "Descent",
    "Kept",
    "Linear",
    "OverwrittenError",
    "Product",
    "Turned",
    "Weighted",
    "Workspace",
    "accurate",
    "guarded",
    "unbroadcast",
]

# So many numbers are worked on at once, 16 MiB: linear layers' rectified weights stay in the processor's cache for both
# products, and convolutions' results in memory that the process keeps.
_PIECE = 1 << 22
# Rows that linear layers hand down at once: one takes as long as eight, as reading the weights does.
_ROWS = 8
# Numbers in the widest vectors of a processor, in float32.
_VECTOR = 16


def guarded(p: Tensor, Z: Tensor, *, signed: bool = True) -> Tensor:
    """Return p / Z, and 0 where Z is 0: such a neuron has no active child.

    No epsilon is added, which would lose mass everywhere. A Z so small that the quotient could overflow counts as 0: in
    float32 below 8e-31, as the tail of a SiLU may give.

    Args:
        p: Probabilities.
        Z: Denominators, of the same shape.
        signed: Whether Z may be negative; it takes less time if not.

    Example:
        >>> guarded(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 2.0]))
        tensor([0.0000, 0.2500])
    """
    return p / _safe(Z if signed else Z.clone(), signed)


def _safe(Z: Tensor, signed: bool) -> Tensor:
    """Return Z with infinity for 0, overwriting Z if it is not signed."""
    least = float(torch.finfo(Z.dtype).tiny) * 2.0**26
    return Z.masked_fill(Z.abs() < least, math.inf) if signed else torch.threshold_(Z, least, math.inf)


def accurate(x: Tensor) -> Tensor:
    """Return x in the precision that shares are computed in, which is float32 for half precision.

    Args:
        x: Any floating-point tensor.

    Example:
        >>> accurate(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unbroadcast(p: Tensor, shape: Sequence[int]) -> Tensor:
    """Return p summed over the dimensions along which a tensor of the given shape was repeated.

    Args:
        p: Probabilities of the repeated tensor.
        shape: Shape of the tensor itself.

    Example:
        >>> unbroadcast(torch.ones(2, 3), (3,))
        tensor([2., 2., 2.])
    """
    ahead = p.dim() - len(shape)
    summed = [i for i in range(p.dim()) if i < ahead or (shape[i - ahead] == 1 and p.shape[i] != 1)]
    return p.sum(summed, keepdim=True).reshape(tuple(shape)) if summed else p


def _edge(tensor: Tensor) -> GradientEdge:
    node = tensor.grad_fn
    return get_gradient_edge(tensor) if node is None else GradientEdge(node, tensor.output_nr)


class OverwrittenError(RuntimeError):
    """Raised where the model overwrote a tensor that shares are computed from."""


class Kept:
    """A tensor of the forward pass that shares are computed from later.

    Args:
        tensor: What to keep, with its graph.
        copied: Whether to keep a copy, which nothing overwrites.
        is_positive: Whether it is known to have no negative elements, which need not be looked for then.
    """

    def __init__(self, tensor: Tensor, *, copied: bool = False, is_positive: bool = False) -> None:
        self.tensor = tensor
        # Where it stands in the graph now; the tensor stands elsewhere once it is modified in place.
        self.edge = _edge(tensor) if tensor.requires_grad else None
        self.is_positive = is_positive
        self._value = tensor.detach().clone() if copied else tensor.detach()
        self._version = self._value._version

    @property
    def intact(self) -> bool:
        """Whether the model has left the tensor as it was."""
        return self._value._version == self._version

    @property
    def value(self) -> Tensor:
        """The tensor, without its graph."""
        if not self.intact:
            raise OverwrittenError("a tensor that shares are computed from was modified in place")
        return self._value


class Workspace:
    """Memory for intermediate results, used by all layers in turn: fresh memory costs more than the work done in it."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._free: list[Tensor] = []

    def give(self, x: Tensor) -> None:
        """Takes the memory of a tensor that nothing uses any more.

        Args:
            x: The tensor.
        """
        # What is smaller the allocator keeps, and that of CUDA everything.
        if x.device.type == "cpu" and 4 * x.numel() >= _PIECE and x.is_contiguous():
            self._free.append(x.view(-1))

    def take(self, like: Tensor) -> Tensor:
        """Return memory of the shape, dtype and device of a tensor for a result, with undefined contents.

        Args:
            like: The tensor to have room for.
        """
        if not like.is_contiguous():
            return torch.empty_like(like)
        for i, x in enumerate(self._free):
            if x.numel() >= like.numel() and x.dtype == like.dtype and x.device == like.device:
                return self._free.pop(i)[: like.numel()].view(like.shape)
        self._free.clear()  # further down, tensors are rather larger
        return torch.empty_like(like)

    def like(self, x: Tensor, dtype: torch.dtype, *, purpose: str = "weights") -> Tensor:
        """Return memory of the shape and device of x, with undefined contents.

        Args:
            x: The tensor to have room for.
            dtype: The wanted dtype.
            purpose: There is one piece of memory for each purpose.
        """
        key = purpose, x.device, dtype
        memory = self._memory.get(key)
        if memory is None or memory.numel() < x.numel():
            memory = self._memory[key] = torch.empty(x.numel(), dtype=dtype, device=x.device)
        return memory[: x.numel()].view(x.shape)


@dataclass
class Descent:
    """What all operations share while probability is handed down a graph."""

    negative: Negative
    """What negative activations count."""
    workspace: Workspace = field(default_factory=Workspace)
    """Memory for intermediate results."""
    is_spent: bool = False
    """Whether nothing but the operation whose turn it is uses its p, so that it may overwrite it."""


class _Term(NamedTuple):
    """The activations of one sign, the others being 0, and whether they go with positive weights."""

    a: Tensor
    positive: bool


def _terms(a: Tensor, negative: Negative, is_positive: bool) -> list[_Term]:
    if is_positive or negative == "raw" or not a.numel() or float(a.amin()) >= 0:
        return [_Term(a, True)]
    above = _Term(a.clamp(min=0), True)
    return [above] if negative == "clamp" else [above, _Term(a.clamp(max=0), False)]


def _overwriting(spent: Tensor, like: Tensor) -> Tensor | None:
    """Return the memory of a spent tensor in the shape of another one, if it has room.

    Examples stay in order. Where those of the result take more room than those of the tensor, it is to be written from
    the last one on, else from the first, so that no example is overwritten before its turn.
    """
    room = spent.untyped_storage().nbytes() // spent.element_size() - spent.storage_offset()
    if room < like.numel() or spent.dtype != like.dtype or not (spent.is_contiguous() and like.is_contiguous()):
        return None
    return spent.as_strided(like.shape, like.stride())


class _Sum:
    """A sum of products, in the memory of its first one or in given memory.

    Args:
        value: Memory for it.
    """

    def __init__(self, value: Tensor | None) -> None:
        self.value = value
        self._is_empty = True

    def add(self, back: Tensor, a: Tensor) -> None:
        """Add the product of two tensors; the first one may be overwritten."""
        if self.value is None:
            self.value = back.mul_(a)
        elif self._is_empty:
            torch.mul(back, a, out=self.value)
        else:
            self.value.addcmul_(back, a)
        self._is_empty = False


@dataclass(frozen=True)
class Affine(ABC):
    """An affine operation as it ran, from its input a to its output."""

    a: Kept

    @abstractmethod
    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Return the probabilities of the input for each of K targets, in memory of their own.

        Args:
            p: Probabilities of the output for each target.
            descent: How, and with what memory.
        """


class Weighted(Affine):
    """An affine operation whose weights have either sign, so that it has an opposite."""

    @abstractmethod
    def opposite(self) -> Weighted:
        """Return the operation with the weights -W."""

    @abstractmethod
    def turned(self, sign: Tensor, shape: Sequence[int]) -> Weighted:
        """Return this operation times a constant, of which only the sign matters.

        Args:
            sign: The constant, of a shape that broadcasts with the output.
            shape: Shape of the output.
        """


@dataclass(frozen=True)
class Turned(Weighted):
    """An affine operation times a constant whose sign differs between places, or that repeats the output."""

    straight: Weighted
    sign: Tensor
    shape: tuple[int, ...]
    """Of the output of the operation itself."""

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Return the probabilities of the input. See :meth:`Affine.winners`."""

        def won(affine: Weighted, wins: Tensor) -> list[Tensor]:
            return affine.winners([unbroadcast(one * wins, self.shape) for one in p], descent)

        sides = won(self.straight, self.sign > 0), won(self.straight.opposite(), self.sign < 0)
        return [one + other for one, other in zip(*sides, strict=True)]

    def opposite(self) -> Turned:
        """Return the operation with the weights -W."""
        return replace(self, sign=-self.sign)

    def turned(self, sign: Tensor, shape: Sequence[int]) -> Turned:
        """Return this operation times a constant. See :meth:`Weighted.turned`."""
        return replace(self, sign=self.sign * sign.sign())


@dataclass(frozen=True)
class _Matrix(Weighted):
    """An affine operation with weights W.

    ``sign`` holds a factor for each row of the weights, as a later batch norm may turn an output around.
    """

    weight: Tensor
    sign: Tensor | None = field(default=None, kw_only=True)
    inverted: bool = field(default=False, kw_only=True)
    """Whether the weights are -W."""

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Return the probabilities of the input. See :meth:`Affine.winners`."""
        a = accurate(self.a.value)
        examples = self._examples(p[0], a)
        if len(examples) == 1:
            sums = [_Sum(None) for _ in p]
            self._add_winners(sums, p, a, descent)
            return [total.value for total in sums if total.value is not None]
        apart = len({one.untyped_storage().data_ptr() for one in p}) == len(p)
        is_spent = descent.is_spent and apart and (self.a.is_positive or descent.negative != "excitatory")
        over = [_overwriting(one, a) if is_spent else None for one in p]
        won = [descent.workspace.take(a) if room is None else room for room in over]
        for some in examples if a.numel() <= p[0].numel() else reversed(examples):
            self._add_winners([_Sum(each[some]) for each in won], [one[some] for one in p], a[some], descent)
        return won

    def _add_winners(self, sums: Sequence[_Sum], p: Sequence[Tensor], a: Tensor, descent: Descent) -> None:
        """Adds the probabilities of the input a to a sum for each target.

        Targets share the sums Z and go one by one from there: a batch of them takes hardly less time, but for a few
        rows of linear layers, and may round otherwise than its members.
        """
        terms = _terms(a, descent.negative, self.a.is_positive)
        for piece in self._pieces():
            part = self._rectified(piece, terms[-1].positive, a.dtype, descent.workspace)
            Z = self._forth(terms[-1].a, part)
            for term in terms[:-1]:
                part = self._rectified(piece, term.positive, a.dtype, descent.workspace)
                Z = Z.add_(self._forth(term.a, part))
            Z = _safe(Z, descent.negative == "raw")
            # The last quotients may overwrite Z.
            room = Z if len(p) == len(terms) == 1 else descent.workspace.like(Z, a.dtype, purpose="quotients")
            for i, term in enumerate(terms):
                if i > 0:
                    part = self._rectified(piece, term.positive, a.dtype, descent.workspace)
                self._add_shares(sums, [self._of(one, piece) for one in p], Z, part, term.a, room)

    def _add_shares(
        self, sums: Sequence[_Sum], p: Sequence[Tensor], Z: Tensor, part: Tensor, a: Tensor, room: Tensor
    ) -> None:
        """Adds what some weights give to an input of one sign to a sum for each target.

        Args:
            sums: The sums.
            p: Probabilities of the weights' outputs, for each target.
            Z: What they are divided by.
            part: The rectified weights.
            a: The input.
            room: Memory for quotients.
        """
        for one, total in zip(p, sums, strict=True):
            total.add(self._back(torch.div(one, Z, out=room), part, a), a)

    def opposite(self) -> Weighted:
        """Return the operation with the weights -W."""
        return replace(self, inverted=not self.inverted)

    def turned(self, sign: Tensor, shape: Sequence[int]) -> Weighted:
        """Return this operation times a constant. See :meth:`Weighted.turned`."""
        each = [1] * (len(shape) - sign.dim()) + list(sign.shape)
        rows = self._rows(len(shape))
        if rows is not None and len(each) == len(shape):
            dim, count = rows
            if each[dim] in (1, count) and all(n == 1 for i, n in enumerate(each) if i != dim):
                sign = sign.sign().to(self.weight.dtype).reshape(-1).expand(count)
                return replace(self, sign=sign if self.sign is None else self.sign * sign)
        return Turned(self.a, self, sign.sign(), tuple(shape))

    def _rows(self, dims: int) -> tuple[int, int] | None:
        """Return which of an output's dimensions counts outputs with weights of their own, and how many these are."""
        return None

    def _examples(self, p: Tensor, a: Tensor) -> list[slice]:
        """Return the examples to work on at once."""
        return [slice(None)]

    def _pieces(self) -> list[slice]:
        """Return the rows of the weights to work on at once."""
        return [slice(None)]

    def _of(self, p: Tensor, piece: slice) -> Tensor:
        return p

    @abstractmethod
    def _forth(self, a: Tensor, part: Tensor) -> Tensor:
        """Return the output for an input and weights."""

    @abstractmethod
    def _back(self, s: Tensor, part: Tensor, a: Tensor) -> Tensor:
        """Return the transposed operation on s, of the shape of the input a."""

    def _rectified(self, piece: slice, positive: bool, dtype: torch.dtype, workspace: Workspace) -> Tensor:
        """Return the positive, or negative, part of some rows of the weights."""
        weight = self.weight[piece] if self.weight.dim() else self.weight
        out = workspace.like(weight, dtype)
        bounds = {"min": 0} if positive != self.inverted else {"max": 0}
        if self.sign is not None:
            torch.mul(weight, self._broadcast(self.sign)[piece], out=out).clamp_(**bounds)
        elif weight.dtype == dtype:
            torch.clamp(weight, **bounds, out=out)
        else:
            out.copy_(weight).clamp_(**bounds)
        return out.neg_() if self.inverted else out

    def _broadcast(self, sign: Tensor) -> Tensor:
        """Return factors of the rows in a shape that multiplies the weights."""
        return sign.reshape(-1, *[1] * (self.weight.dim() - 1))


@dataclass(frozen=True)
class Linear(_Matrix):
    """y = W a + b along the last dimension, weight (outputs, inputs)."""

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Return the probabilities of the input. See :meth:`Affine.winners`."""
        some = [self._few(one) for one in p]
        others = [one for one, rows in zip(p, some, strict=True) if rows is None]
        won = iter(super().winners(others, descent) if others else ())
        return [
            next(won) if rows is None else self._only(rows).winners([one[..., rows]], descent)[0]
            for one, rows in zip(p, some, strict=True)
        ]

    def _few(self, p: Tensor) -> Tensor | None:
        """Return the outputs that have won anything, if these are few, as a classifier's are.

        What the others would share need not be known. Targets are looked at one by one, so that none depends on its
        neighbours.
        """
        rows = p.flatten(0, -2).any(0).nonzero()[:, 0]
        return rows if 0 < 8 * len(rows) <= self.weight.shape[0] else None

    def _only(self, rows: Tensor) -> Linear:
        """Return the operation with some of its outputs only."""
        return replace(self, weight=self.weight[rows], sign=None if self.sign is None else self.sign[rows])

    def _rows(self, dims: int) -> tuple[int, int]:
        return dims - 1, self.weight.shape[0]

    def _pieces(self) -> list[slice]:
        rows = max(1, _PIECE // max(1, self.weight.shape[1]))
        return [slice(i, i + rows) for i in range(0, self.weight.shape[0], rows)]

    def _of(self, p: Tensor, piece: slice) -> Tensor:
        return p[..., piece]

    def _add_shares(
        self, sums: Sequence[_Sum], p: Sequence[Tensor], Z: Tensor, part: Tensor, a: Tensor, room: Tensor
    ) -> None:
        count = _ROWS // max(1, a.numel() // max(1, a.shape[-1]))
        if count < 2:
            return super()._add_shares(sums, p, Z, part, a, room)
        # Weights are read once for so many targets, also where there are fewer: a product rounds by its shape, and on
        # some processors, where columns do not fill the last vector, by the place of a row as well.
        width = part.shape[1]
        if width % _VECTOR:
            part = torch.nn.functional.pad(part, (0, -width % _VECTOR))
        for first in range(0, len(p), count):
            some = p[first : first + count]
            s = Z.new_zeros(count, *Z.shape)
            for one, row in zip(some, s, strict=False):
                torch.div(one, Z, out=row)
            for back, total in zip(self._back(s, part, a)[..., :width], sums[first : first + count], strict=False):
                total.add(back, a)

    def _forth(self, a: Tensor, part: Tensor) -> Tensor:
        return a @ part.T

    def _back(self, s: Tensor, part: Tensor, a: Tensor) -> Tensor:
        return s @ part


@dataclass(frozen=True)
class Convolution(_Matrix):
    """A convolution, also a transposed one, of one to three spatial dimensions; examples first."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Return the probabilities of the input. See :meth:`Affine.winners`."""
        a = accurate(self.a.value)
        if self.transposed or self.groups > 1 or len(_terms(a, descent.negative, self.a.is_positive)) == 1:
            return super().winners(p, descent)
        # An input of either sign as two that are not negative. An image's 6 channels take hardly longer than its 3.
        halves = torch.cat([a.clamp(min=0), a.clamp(max=0).neg_()], 1)
        joined = replace(self, a=Kept(halves, is_positive=True), weight=torch.cat([self.weight, -self.weight], 1))
        return [won[:, : a.shape[1]] + won[:, a.shape[1] :] for won in joined.winners(p, descent)]

    def _examples(self, p: Tensor, a: Tensor) -> list[slice]:
        if a.device.type != "cpu" or not len(a):
            return [slice(None)]
        # The system takes back larger memory after each use, and clears it for the next.
        some = max(1, _PIECE * len(a) // max(1, a.numel(), p.numel()))
        return [slice(i, i + some) for i in range(0, len(a), some)]

    def _rows(self, dims: int) -> tuple[int, int]:
        return 1, self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def _is_pointwise(self) -> bool:
        """Whether it is a product of matrices at each place, which takes down to a quarter of a convolution's time."""
        units = (*self.weight.shape[2:], self.groups)
        return not self.transposed and not any(self.padding) and all(n == 1 for n in units)

    def _seen(self, a: Tensor) -> Tensor:
        """Return the places that a pointwise convolution reads."""
        places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        return a[places]

    def _forth(self, a: Tensor, part: Tensor) -> Tensor:
        if self._is_pointwise and a.is_contiguous():
            seen = self._seen(a)
            return (part.flatten(1) @ seen.flatten(2)).view(len(a), -1, *seen.shape[2:])
        return torch.convolution(
            a, part, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def _back(self, s: Tensor, part: Tensor, a: Tensor) -> Tensor:
        if self._is_pointwise and s.is_contiguous():
            product = (part.flatten(1).T @ s.flatten(2)).view(len(s), -1, *s.shape[2:])
            if all(step == 1 for step in self.stride):
                return product
            whole = torch.zeros_like(a)
            self._seen(whole).copy_(product)
            return whole
        beyond = [0] * len(self.stride) if self.transposed else self._unseen(s.shape[2:], part.shape[2:], a.shape[2:])
        return torch.convolution(
            s, part, None, self.stride, self.padding, self.dilation, not self.transposed, beyond, self.groups
        )

    def _unseen(self, output: Sequence[int], kernel: Sequence[int], size: Sequence[int]) -> list[int]:
        """Return how many cells at the far end of each dimension of the input no window reaches."""
        geometry = zip(output, kernel, size, self.stride, self.padding, self.dilation, strict=True)
        return [n - ((y - 1) * stride - 2 * pad + gap * (k - 1) + 1) for y, k, n, stride, pad, gap in geometry]

    def _broadcast(self, sign: Tensor) -> Tensor:
        if not self.transposed:
            return super()._broadcast(sign)
        # Weights of transposed convolutions are (inputs, outputs of one group, ...).
        inputs = self.weight.shape[0]
        each = sign.reshape(self.groups, 1, -1).expand(-1, inputs // self.groups, -1)
        return each.reshape(inputs, -1, *[1] * (self.weight.dim() - 2))


@dataclass(frozen=True)
class Product(_Matrix):
    """Any other product of an input with weights that is linear in both: of matrices, or an Einstein sum."""

    forth: Callable[[Tensor, Tensor], Tensor]
    """Return the output for an input and weights."""
    back: Callable[[Tensor, Tensor], Tensor]
    """Return the transposed product, for an output and weights."""

    def _forth(self, a: Tensor, part: Tensor) -> Tensor:
        return self.forth(a, part)

    def _back(self, s: Tensor, part: Tensor, a: Tensor) -> Tensor:
        return unbroadcast(self.back(s, part), a.shape)


@dataclass(frozen=True)
class Attention(Affine):
    """An average of values a with weights that themselves depend on the input, and are taken as constant.

    Values are signed, and so is their average: those on its side of 0 share what it has won. On nonnegative values this
    is the rule of averages with constant weights.
    """

    weights: Callable[[], Tensor]
    """Return the attention weights, such as (..., queries, keys), none of them negative."""
    forth: Callable[[Tensor, Tensor], Tensor]
    """Return the averages of values by weights."""
    back: Callable[[Tensor, Tensor], Tensor]
    """Return the transposed product, for an average and weights."""

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Return the probabilities of the values. See :meth:`Affine.winners`."""
        a, A = accurate(self.a.value), accurate(self.weights())
        y = self.forth(a, A)
        if descent.negative == "raw":
            sides = [(a, torch.ones_like(y))]
        else:
            sides = [(a.clamp(min=0), (y > 0).to(y)), (a.clamp(max=0), (y < 0).to(y))]
        return [self._won(one.to(a.dtype), A, sides) for one in p]

    def _won(self, p: Tensor, A: Tensor, sides: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return what the values win together, each side of 0 from the averages on the same side."""
        won = [
            side * unbroadcast(self.back(guarded(p * wins, self.forth(side, A)), A), side.shape) for side, wins in sides
        ]
        return won[0] if len(won) == 1 else won[0] + won[1]
