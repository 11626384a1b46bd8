r"""Share probability in linear layers, convolutions, other products, and attention.

:class:`_Matrix` computes the shares of :mod:`captum_xnn.excitation_bp._shares` for all operations with weights W:

1. Rectify the weights to :math:`W^+`.
2. Run the operation forward: :math:`Z = W^+ a`.
3. Divide: :math:`s = p / Z`.
4. Run the transposed operation: :math:`a \odot (W^+)^\top s`.

With ``negative="excitatory"``, negative activations take these steps with the negative part of W, and both parts add to
one Z. Subclasses define the operation and its transposed. The rest of the code is for speed: memory is reused, targets
share Z, and large operations work piece by piece.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.excitation_bp._kept_tensor import KeptTensor
from captum_xnn.excitation_bp._settings import Negative
from captum_xnn.excitation_bp._shares import Affine, Descent, Weighted, accurate, guarded, unbroadcast, without_zeros
from captum_xnn.excitation_bp._workspace import Workspace

__all__ = ["Attention", "Convolution", "Linear", "Product", "Turned"]

# Rows that linear layers hand down at once: one row takes as long as eight, because reading the weights dominates.
_ROWS = 8
# Float32 numbers in the widest vectors of a processor.
_VECTOR = 16


@dataclass(frozen=True)
class _Matrix(Weighted):
    """An affine operation with weights W."""

    weight: Tensor
    sign: Tensor | None = field(default=None, kw_only=True)
    """A factor for each row of the weights: a later batch norm may flip the sign of an output."""
    inverted: bool = field(default=False, kw_only=True)
    """Whether the weights are -W."""

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Compute the probabilities of the input. See :meth:`Affine.winners`."""
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
        """Add the probabilities of the input a to a sum for each target.

        Targets share Z, and are then computed one by one. A batch of targets takes hardly less time, except for a few
        rows of linear layers, and may round differently than a single target.
        """
        terms = _signed_parts(a, descent.negative, self.a.is_positive)
        for piece in self._pieces():
            W = self._rectified(piece, terms[-1].positive, a.dtype, descent.workspace)
            Z = self._forward(terms[-1].a, W)
            for term in terms[:-1]:
                W = self._rectified(piece, term.positive, a.dtype, descent.workspace)
                Z = Z.add_(self._forward(term.a, W))
            Z = without_zeros(Z, descent.negative == "raw")
            # The last quotients may overwrite Z.
            room = Z if len(p) == len(terms) == 1 else descent.workspace.like(Z, a.dtype, purpose="quotients")
            for i, term in enumerate(terms):
                if i > 0:
                    W = self._rectified(piece, term.positive, a.dtype, descent.workspace)
                self._add_shares(sums, [self._piece_of(one, piece) for one in p], Z, W, term.a, room)

    def _add_shares(
        self, sums: Sequence[_Sum], p: Sequence[Tensor], Z: Tensor, W: Tensor, a: Tensor, room: Tensor
    ) -> None:
        """Add the shares of an input of one sign to a sum for each target.

        Args:
            sums: The sums.
            p: Probabilities of the outputs of these weights, for each target.
            Z: Denominators of the outputs.
            W: Rectified weights.
            a: The input.
            room: Memory for quotients.
        """
        for one, total in zip(p, sums, strict=True):
            total.add(self._transposed(torch.div(one, Z, out=room), W, a), a)

    def opposite(self) -> Weighted:
        """Return the operation with the weights -W."""
        return replace(self, inverted=not self.inverted)

    def turned(self, sign: Tensor, shape: Sequence[int]) -> Weighted:
        """Multiply the operation by a constant. See :meth:`Weighted.turned`."""
        each = [1] * (len(shape) - sign.dim()) + list(sign.shape)
        rows = self._output_dimension(len(shape))
        if rows is not None and len(each) == len(shape):
            dim, count = rows
            if each[dim] in (1, count) and all(n == 1 for i, n in enumerate(each) if i != dim):
                sign = sign.sign().to(self.weight.dtype).reshape(-1).expand(count)
                return replace(self, sign=sign if self.sign is None else self.sign * sign)
        return Turned(self.a, self, sign.sign(), tuple(shape))

    def _output_dimension(self, dims: int) -> tuple[int, int] | None:
        """Return the dimension of the output that belongs to the rows of the weights, and its size."""
        return None

    def _examples(self, p: Tensor, a: Tensor) -> list[slice]:
        """Divide the examples into parts to work on at once."""
        return [slice(None)]

    def _pieces(self) -> list[slice]:
        """Divide the rows of the weights into parts to work on at once."""
        return [slice(None)]

    def _piece_of(self, p: Tensor, piece: slice) -> Tensor:
        """Return the probabilities of the outputs of some rows."""
        return p

    @abstractmethod
    def _forward(self, a: Tensor, W: Tensor) -> Tensor:
        """Run the operation on an input with given weights."""

    @abstractmethod
    def _transposed(self, s: Tensor, W: Tensor, a: Tensor) -> Tensor:
        """Run the transposed operation on s; the result has the shape of the input a."""

    def _rectified(self, piece: slice, positive: bool, dtype: torch.dtype, workspace: Workspace) -> Tensor:
        """Compute the positive or the negative part of some rows of the weights."""
        weight = self.weight[piece] if self.weight.dim() else self.weight
        out = workspace.like(weight, dtype)
        bounds = {"min": 0} if positive != self.inverted else {"max": 0}
        if self.sign is not None:
            torch.mul(weight, self._along_rows(self.sign)[piece], out=out).clamp_(**bounds)
        elif weight.dtype == dtype:
            torch.clamp(weight, **bounds, out=out)
        else:
            out.copy_(weight).clamp_(**bounds)
        return out.neg_() if self.inverted else out

    def _along_rows(self, sign: Tensor) -> Tensor:
        """Reshape factors of the rows so that they multiply the weights."""
        return sign.reshape(-1, *[1] * (self.weight.dim() - 1))


@dataclass(frozen=True)
class Linear(_Matrix):
    """y = W a + b along the last dimension, weight (outputs, inputs)."""

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Compute the probabilities of the input. See :meth:`Affine.winners`."""
        some = [self._winning_rows(one) for one in p]
        others = [one for one, rows in zip(p, some, strict=True) if rows is None]
        won = iter(super().winners(others, descent) if others else ())
        return [
            next(won) if rows is None else self._with_rows(rows).winners([one[..., rows]], descent)[0]
            for one, rows in zip(p, some, strict=True)
        ]

    def _winning_rows(self, p: Tensor) -> Tensor | None:
        """Find the outputs with any probability, if they are few, as in a classifier; else return None.

        The shares of all other outputs are then not computed. The decision is made for each target alone, so that no
        result depends on other targets.
        """
        rows = p.flatten(0, -2).any(0).nonzero()[:, 0]
        return rows if 0 < 8 * len(rows) <= self.weight.shape[0] else None

    def _with_rows(self, rows: Tensor) -> Linear:
        """Restrict the operation to some of its outputs."""
        return replace(self, weight=self.weight[rows], sign=None if self.sign is None else self.sign[rows])

    def _output_dimension(self, dims: int) -> tuple[int, int]:
        return dims - 1, self.weight.shape[0]

    def _pieces(self) -> list[slice]:
        rows = max(1, Workspace.PIECE // max(1, self.weight.shape[1]))
        return [slice(i, i + rows) for i in range(0, self.weight.shape[0], rows)]

    def _piece_of(self, p: Tensor, piece: slice) -> Tensor:
        return p[..., piece]

    def _add_shares(
        self, sums: Sequence[_Sum], p: Sequence[Tensor], Z: Tensor, W: Tensor, a: Tensor, room: Tensor
    ) -> None:
        count = _ROWS // max(1, a.numel() // max(1, a.shape[-1]))
        if count < 2:
            return super()._add_shares(sums, p, Z, W, a, room)
        # Always multiply `count` rows, even for fewer targets: the rounding of a product depends on its shape. On some
        # processors it also depends on the position of a row, if columns do not fill the last vector.
        width = W.shape[1]
        if width % _VECTOR:
            W = torch.nn.functional.pad(W, (0, -width % _VECTOR))
        for first in range(0, len(p), count):
            some = p[first : first + count]
            s = Z.new_zeros(count, *Z.shape)
            for one, row in zip(some, s, strict=False):
                torch.div(one, Z, out=row)
            for back, total in zip(self._transposed(s, W, a)[..., :width], sums[first : first + count], strict=False):
                total.add(back, a)

    def _forward(self, a: Tensor, W: Tensor) -> Tensor:
        return a @ W.T

    def _transposed(self, s: Tensor, W: Tensor, a: Tensor) -> Tensor:
        return s @ W


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
        """Compute the probabilities of the input. See :meth:`Affine.winners`."""
        a = accurate(self.a.value)
        if self.transposed or self.groups > 1 or len(_signed_parts(a, descent.negative, self.a.is_positive)) == 1:
            return super().winners(p, descent)
        # Write an input of either sign as two nonnegative inputs: 6 channels take hardly longer than an image's 3.
        halves = torch.cat([a.clamp(min=0), a.clamp(max=0).neg_()], 1)
        joined = replace(self, a=KeptTensor(halves, is_positive=True), weight=torch.cat([self.weight, -self.weight], 1))
        return [won[:, : a.shape[1]] + won[:, a.shape[1] :] for won in joined.winners(p, descent)]

    def _examples(self, p: Tensor, a: Tensor) -> list[slice]:
        if a.device.type != "cpu" or not len(a):
            return [slice(None)]
        # The system takes back larger blocks of memory after each use, and clears them before the next use.
        some = max(1, Workspace.PIECE * len(a) // max(1, a.numel(), p.numel()))
        return [slice(i, i + some) for i in range(0, len(a), some)]

    def _output_dimension(self, dims: int) -> tuple[int, int]:
        return 1, self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def skips(self) -> tuple[int, ...]:
        """The stride along each dimension in which the convolution skips cells of its input, else 1."""
        if self.transposed:
            return (1,) * len(self.stride)
        geometry = zip(self.weight.shape[2:], self.stride, self.dilation, strict=True)
        return tuple(step if len({i * gap % step for i in range(k)}) < step else 1 for k, step, gap in geometry)

    @property
    def _is_pointwise(self) -> bool:
        """Whether it is a product of matrices at each place, which takes down to a quarter of a convolution's time."""
        units = (*self.weight.shape[2:], self.groups)
        return not self.transposed and not any(self.padding) and all(n == 1 for n in units)

    def _places_read(self, a: Tensor) -> Tensor:
        """Select the places that a pointwise convolution reads: with strides, not all places."""
        places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        return a[places]

    def _forward(self, a: Tensor, W: Tensor) -> Tensor:
        if self._is_pointwise and a.is_contiguous():
            seen = self._places_read(a)
            return (W.flatten(1) @ seen.flatten(2)).view(len(a), -1, *seen.shape[2:])
        return torch.convolution(
            a, W, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def _transposed(self, s: Tensor, W: Tensor, a: Tensor) -> Tensor:
        if self._is_pointwise and s.is_contiguous():
            product = (W.flatten(1).T @ s.flatten(2)).view(len(s), -1, *s.shape[2:])
            if all(step == 1 for step in self.stride):
                return product
            whole = torch.zeros_like(a)
            self._places_read(whole).copy_(product)
            return whole
        beyond = [0] * len(self.stride)
        if not self.transposed:
            beyond = self._cells_beyond_windows(s.shape[2:], W.shape[2:], a.shape[2:])
        return torch.convolution(
            s, W, None, self.stride, self.padding, self.dilation, not self.transposed, beyond, self.groups
        )

    def _cells_beyond_windows(self, output: Sequence[int], kernel: Sequence[int], size: Sequence[int]) -> list[int]:
        """Count the cells at the far end of each dimension of the input that no window reaches."""
        geometry = zip(output, kernel, size, self.stride, self.padding, self.dilation, strict=True)
        return [n - ((y - 1) * stride - 2 * pad + gap * (k - 1) + 1) for y, k, n, stride, pad, gap in geometry]

    def _along_rows(self, sign: Tensor) -> Tensor:
        if not self.transposed:
            return super()._along_rows(sign)
        # Weights of transposed convolutions are (inputs, outputs of one group, ...).
        inputs = self.weight.shape[0]
        each = sign.reshape(self.groups, 1, -1).expand(-1, inputs // self.groups, -1)
        return each.reshape(inputs, -1, *[1] * (self.weight.dim() - 2))


@dataclass(frozen=True)
class Product(_Matrix):
    """Any other product of an input and weights that is linear in both: of matrices, or an Einstein sum."""

    forward: Callable[[Tensor, Tensor], Tensor]
    """Function from an input and weights to the output."""
    transposed: Callable[[Tensor, Tensor], Tensor]
    """Function from an output and weights to the transposed product."""

    def _forward(self, a: Tensor, W: Tensor) -> Tensor:
        return self.forward(a, W)

    def _transposed(self, s: Tensor, W: Tensor, a: Tensor) -> Tensor:
        return unbroadcast(self.transposed(s, W), a.shape)


@dataclass(frozen=True)
class Attention(Affine):
    """An average of values a, with weights that depend on the input but count as constant.

    Values and their average are signed. The values on the average's side of 0 divide its probability. On nonnegative
    values this equals the rule of averages with constant weights.
    """

    weights: Callable[[], Tensor]
    """Function that computes the nonnegative attention weights, such as (..., queries, keys)."""
    forward: Callable[[Tensor, Tensor], Tensor]
    """Function from values and weights to the averages."""
    transposed: Callable[[Tensor, Tensor], Tensor]
    """Function from averages and weights to the transposed product."""

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Compute the probabilities of the values. See :meth:`Affine.winners`."""
        a, A = accurate(self.a.value), accurate(self.weights())
        y = self.forward(a, A)
        if descent.negative == "raw":
            sides = [(a, torch.ones_like(y))]
        else:
            sides = [(a.clamp(min=0), (y > 0).to(y)), (a.clamp(max=0), (y < 0).to(y))]
        return [self._won(one.to(a.dtype), A, sides) for one in p]

    def _won(self, p: Tensor, A: Tensor, sides: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Add the shares of the values on both sides of 0, each from the averages on the same side."""
        won = []
        for side, wins in sides:
            s = guarded(p * wins, self.forward(side, A))
            won.append(side * unbroadcast(self.transposed(s, A), side.shape))
        return won[0] if len(won) == 1 else won[0] + won[1]


@dataclass(frozen=True)
class Turned(Weighted):
    """An affine operation times a constant whose sign differs between places, or whose shape repeats the output."""

    straight: Weighted
    sign: Tensor
    shape: tuple[int, ...]
    """Shape of the output of the operation itself."""

    def winners(self, p: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """Compute the probabilities of the input. See :meth:`Affine.winners`."""

        def won(affine: Weighted, wins: Tensor) -> list[Tensor]:
            return affine.winners([unbroadcast(one * wins, self.shape) for one in p], descent)

        sides = won(self.straight, self.sign > 0), won(self.straight.opposite(), self.sign < 0)
        return [one + other for one, other in zip(*sides, strict=True)]

    def opposite(self) -> Turned:
        """Return the operation with the weights -W."""
        return replace(self, sign=-self.sign)

    def turned(self, sign: Tensor, shape: Sequence[int]) -> Turned:
        """Multiply the operation by a constant. See :meth:`Weighted.turned`."""
        return replace(self, sign=self.sign * sign.sign())


class _SignedPart(NamedTuple):
    """The activations of one sign, all others being 0, and whether they meet positive weights."""

    a: Tensor
    positive: bool


def _signed_parts(a: Tensor, negative: Negative, is_positive: bool) -> list[_SignedPart]:
    """Divide activations into the parts that count, by the setting ``negative``."""
    if is_positive or negative == "raw" or not a.numel() or float(a.amin()) >= 0:
        return [_SignedPart(a, True)]
    above = _SignedPart(a.clamp(min=0), True)
    return [above] if negative == "clamp" else [above, _SignedPart(a.clamp(max=0), False)]


class _Sum:
    """A sum of products, in given memory or in the memory of its first product.

    Args:
        value: Memory for the sum.
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


def _overwriting(spent: Tensor, like: Tensor) -> Tensor | None:
    """Return the memory of a spent tensor in the shape of another tensor, if there is room.

    Examples stay in order. If an example of the result is larger than an example of the tensor, write the last example
    first, otherwise the first. Then no example is overwritten before its turn.
    """
    room = spent.untyped_storage().nbytes() // spent.element_size() - spent.storage_offset()
    if room < like.numel() or spent.dtype != like.dtype or not (spent.is_contiguous() and like.is_contiguous()):
        return None
    return spent.as_strided(like.shape, like.stride())
