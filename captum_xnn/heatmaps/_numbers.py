"""The numbers of a form on some examples: x-features, contributions, bias, surrogate and slopes.

Conventions:
    N examples, K x-features, Z (N, ...) the layer's output.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.errors import ModelMismatchError
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._prefix import Prefix
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Target, grouped
from captum_xnn.models._base import Autoencoder
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._form import Choice, Form

if TYPE_CHECKING:  # examples get the reader of their layer, and make none
    from captum_xnn.layers._reader import Reader
    from captum_xnn.layers._tail import Tail

__all__ = ["Examples", "Numbers", "check_shape", "numbers_of_network"]


class Numbers(NamedTuple):
    """The numbers of one output."""

    features: Tensor
    """x-features E, (N, K)."""
    contributions: Tensor
    """Contribution of each x-feature, (N, K), in logits."""
    bias: Tensor
    """The output without the x-features, (N,), in logits."""
    surrogate: Tensor
    """Sum of bias and contributions, (N,), in logits."""
    slopes: Tensor
    """Mean derivatives of the output from the base to Z, as Z; (N, 0) if not needed."""

    def padded(self, K: int) -> Numbers:
        """Pad features and contributions with zeros to K x-features.

        Args:
            K: Number of x-features, at least the present one.
        """
        more = (0, K - self.features.shape[1])
        pad = torch.nn.functional.pad
        return self._replace(features=pad(self.features, more), contributions=pad(self.contributions, more))


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples to explain, each with the form that explains it.

    Example:
        >>> from captum_xnn.layers._reader import Reader
        >>> from captum_xnn.models._srae import SRAE
        >>> reader, x = Reader.of(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU()), "1"), torch.rand(3, 2)
        >>> with torch.no_grad():
        ...     Z, y = reader.read((x,))
        >>> made = Examples([Choice(SRAE(4, 2), 0, 1)] * 3, reader, (x,)).numbers(Z, y[:, 1])
        >>> torch.allclose(made.bias + made.contributions.sum(1), made.surrogate, atol=1e-6)
        True
    """

    choices: Sequence[Choice]
    """The choice of each example."""
    reader: Reader
    """Reader of the explained layer."""
    inputs: tuple[Tensor, ...]
    """Tensors (N, ...)."""
    additional: tuple[Any, ...] | None = None
    """Further arguments of the model."""

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def targets(self) -> list[Target]:
        """The explained output of each example."""
        return [choice.target for choice in self.choices]

    def subset(self, rows: Tensor) -> Examples:
        """Copy some examples, as a model may work in place.

        Args:
            rows: Their indices, (n,).
        """
        x, more = rows_of(self.inputs, self.additional, rows)
        return Examples([self.choices[i] for i in rows.tolist()], self.reader, x, more)

    def numbers(
        self, Z: Tensor, predictions: Tensor, *, prefix: Prefix | None = None, whole: Examples | None = None
    ) -> Numbers:
        """Compute the numbers of each example by its form. x-features that a form lacks are zero.

        Args:
            Z: Activations (N, ...).
            predictions: The explained output of each example, (N,).
            prefix: If there is one example, the outputs of the modules up to the layer.
            whole: All examples of the call, which decide the shapes of the numbers; None if these are all.

        Raises:
            ModelMismatchError: If a form was fitted to another shape of Z.
        """
        forms = {choice.form for choice in (whole or self).choices}
        most = max(form.n_features for form in forms)
        with_slopes = any(isinstance(form, ContributionGroups) for form in forms)

        def numbers_by_rows() -> Iterator[tuple[list[int], Numbers]]:
            for choice, rows in grouped(self.choices):
                form = choice.form.to(Z.device)
                check_shape(form, Z, self.reader.name)
                if isinstance(form, ContributionGroups):
                    subset, tail = self.subset(torch.tensor(rows, device="cpu")), self.reader.tail(prefix)
                    numbers = _numbers_of_groups(
                        form, choice, Z[rows], predictions[rows], tail, (subset.inputs, subset.additional)
                    )
                else:
                    numbers = numbers_of_network(form, choice, Z[rows], with_slopes)
                yield rows, numbers.padded(most)

        with torch.inference_mode(False), torch.no_grad():
            return Numbers(*gathered(numbers_by_rows(), len(Z)))


def numbers_of_network(form: Autoencoder, choice: Choice, Z: Tensor, with_slopes: bool) -> Numbers:
    """Compute the numbers of a learned network.

    Args:
        form: The network.
        choice: The output.
        Z: Activations (N, ...).
        with_slopes: Whether to add slopes of 0, as other forms of the same examples have slopes.
    """
    with torch.autocast(Z.device.type, enabled=False):
        E = form.encode(Z.to(form.dtype))
        y_bar = form.head(E)
    slopes = torch.zeros_like(Z, dtype=E.dtype) if with_slopes else E[:, :0]
    bias, contributions = form.head.bias.expand(len(E), -1), form.contributions
    if choice.against is None:
        i = choice.output
        return Numbers(E, contributions(E, i), bias[:, i], y_bar[:, i], slopes)
    a, b = choice.output, choice.against
    divided = contributions(E, a) - contributions(E, b)
    return Numbers(E, divided, bias[:, a] - bias[:, b], y_bar[:, a] - y_bar[:, b], slopes)


def _numbers_of_groups(
    form: ContributionGroups,
    choice: Choice,
    Z: Tensor,
    predictions: Tensor,
    tail: Tail,
    arguments: tuple[tuple[Tensor, ...], tuple[Any, ...] | None],
) -> Numbers:
    """Compute the numbers of groups of contributions, where Z and the model's outputs are known."""
    targets, scale = [[choice.target] * len(predictions)], form.scale[choice.output : choice.output + 1]
    with untouched(tail.model):
        integral = form.integral(tail, *arguments, targets, predictions=predictions[None], Z=Z, scale=scale)
    E = form.features(form.contributions(integral)[0])
    bias = integral.start[0].to(E)
    if count := int((~E.isfinite().all(1)).sum()):
        warnings.warn(
            f"contributions at layer {tail.name!r} are NaN or infinite in {count} of {len(E)} examples: the rest of "
            "the model has no finite slope there, as a square root has none at 0; choose another layer, or add a small "
            "number within the root",
            stacklevel=levels_up(),
        )
    return Numbers(E, E, bias, bias + E.sum(1), integral.slopes[0])


def check_shape(form: Form, Z: Tensor, layer: str) -> None:
    """Raise if a layer's output lacks the shape that a form was fitted to.

    Args:
        form: The form.
        Z: The layer's output, (N, ...).
        layer: Name of the layer.

    Raises:
        ModelMismatchError: If the shapes differ.
    """
    shape = form.config["shape"]
    fits = Z[0].numel() == shape if isinstance(shape, int) else list(Z.shape[1:]) == list(shape)
    if isinstance(form, ContributionGroups):  # the number of places is free
        fits = Z.dim() - 1 == form.base.dim() and all(
            size == fitted or fitted == 1 for size, fitted in zip(Z.shape[1:], form.base.shape, strict=True)
        )
    if not fits:
        raise ModelMismatchError(
            f"layer {layer!r} gives {tuple(Z.shape[1:])} values per example, and gave {shape} when the explainer was "
            "fitted; pass inputs of the size it was fitted to, or fit anew"
        )
