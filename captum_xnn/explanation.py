"""Explanation of one batch: the maps, the contribution of every x-feature, and a check that they add up.

Conventions:
    N examples, K x-features. Arguments are indices and count from 0. So do the indices in front of printed lines. The
    printed names "x-feature 1" to "x-feature K" count from 1. Contributions, bias, surrogate and prediction are in the
    model's own units (logits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.layers._pixels import channels_by_size, channels_first
from captum_xnn.layers._targets import Difference, Target
from captum_xnn.plots._names import Names, resolve_names
from captum_xnn.plots._sentence import sentence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Explanation"]

# Examples, and characters in a line, of the short text of an explanation.
_SHOWN, _WIDTH = 10, 118


class Contributions(NamedTuple):
    """The numbers of an explanation, without its maps."""

    features: Tensor
    """x-features E, (N, K)."""
    contributions: Tensor
    """Contribution of each x-feature to the output, (N, K), in logits."""
    bias: Tensor
    """The output without the x-features, (N,), in logits."""
    surrogate: Tensor
    """Sum of bias and contributions, (N,), in logits."""
    prediction: Tensor
    """The model's output, (N,), in logits."""


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    r"""Explanation of a model's outputs: :math:`\hat y \approx \bar y = b + \sum_i v_i E_i`, with a map for each i.

    Raises:
        ValueError: If bias and contributions do not sum to the surrogate.

    Example:
        >>> import torch
        >>> why = Explanation(
        ...     inputs=torch.zeros(1, 4), maps=torch.zeros(1, 2, 4), features=torch.tensor([[1.0, 2.0]]),
        ...     contributions=torch.tensor([[3.0, 1.0]]), bias=torch.tensor([0.5]), surrogate=torch.tensor([4.5]),
        ...     prediction=torch.tensor([4.6]), target=(0,))
        >>> print(why)
        0: target 0: prediction +4.60 = x-feature 1 +3.00, x-feature 2 +1.00, bias +0.50, unexplained +0.10
        >>> why
        Explanation of 1 example: 2 x-features, maps (1, 2, 4)
          0: target 0 because of x-feature 1 (+3.00) and x-feature 2 (+1.00)
        >>> why.sentence(names=["golden feather"], target_name="European goldfinch")
        'European goldfinch because of golden feather (+3.00) and x-feature 2 (+1.00)'
    """

    inputs: Tensor | tuple[Tensor, ...]
    """The explained inputs, unchanged."""
    maps: Tensor | tuple[Tensor, ...]
    """Attribution maps, (N, K, ...), one tensor for each input tensor. A method that attributes to a layer gives
    (N, K, 1, H, W)."""
    features: Tensor
    """x-features E, (N, K). Groups of contributions give them in logits, other forms in standard deviations from the
    average."""
    contributions: Tensor
    """v_i E_i, (N, K), in logits."""
    bias: Tensor
    """The output without the x-features, (N,), in logits. For groups of contributions it is the output at the base, the
    mean activation over the training data. It then differs between examples if the output also depends on something
    other than the layer's output."""
    surrogate: Tensor
    """Sum of bias and contributions, (N,), in logits."""
    prediction: Tensor
    """The model's output, (N,), in logits."""
    target: tuple[Target, ...]
    """The explained output of each example. With ``against=`` it is a difference, printed as "46 rather than 112"."""
    layer: str | None = None
    """Dotted name of the explained layer, if known. A file of names must be made for the same layer."""
    one_heatmap: Tensor | tuple[Tensor, ...] | None = None
    """The 1-Heatmap: maps of the model's own output, (N, 1, ...), shaped like ``maps``. None unless requested."""
    is_positive: tuple[bool, ...] | None = None
    """For each example whether the model gives it the explained class. None if the outputs are not classes, or not all
    outputs were seen, as with an ``internal_batch_size`` below N. Sentences then do not contradict the model."""

    def __post_init__(self) -> None:
        total = self.bias.double() + self.contributions.double().sum(1)
        scale = 1 + self.contributions.double().abs().sum(1) + self.bias.double().abs()
        off = (total - self.surrogate.double()).abs() / scale
        if not bool((off < 1e-4).all()):
            worst = int(off.nan_to_num(nan=float("inf")).argmax())
            raise ValueError(
                f"bias and contributions of the example with index {worst} sum to {float(total[worst]):.6g}, but the "
                f"surrogate is {float(self.surrogate[worst]):.6g}; the explainer is damaged, fit it again"
            )

    def __len__(self) -> int:
        return len(self.surrogate)

    @property
    def unexplained(self) -> Tensor:
        """The unexplained part of the output: prediction minus surrogate, (N,), in logits."""
        return self.prediction - self.surrogate

    def describe(self, index: int, names: Names | None = None) -> str:
        """Describe one example's explanation as a sum of numbers, the largest contribution first.

        Args:
            index: Position of the example in the batch.
            names: Names of the x-features: a list, a mapping from their numbers, or the file that a report exports.

        Raises:
            ValueError: If there are more names than x-features, or a file of names is of another layer or target.
        """
        given = self.contributions[index].tolist()
        parts = [
            f"{name} {value:+.2f}"
            for value, name in sorted(zip(given, self._names(names, index), strict=True), reverse=True)
        ]
        return (
            f"target {self.target[index]}: prediction {float(self.prediction[index]):+.2f} = "
            f"{', '.join(parts)}, bias {float(self.bias[index]):+.2f}, "
            f"unexplained {float(self.unexplained[index]):+.2f}"
        )

    def sentence(
        self,
        index: int = 0,
        names: Names | None = None,
        *,
        target_name: str | None = None,
        share: float = 0.9,
        unexplained_share: float = 0.1,
    ) -> str:
        r"""Put one example's explanation into words: "European goldfinch because of golden feather (+63.1)".

        Args:
            index: Position of the example in the batch.
            names: Names of the x-features: a list, a mapping from their numbers, or the file that a report exports.
            target_name: Name of the output. Without it the sentence says "target 46".
            share: The sentence names x-features until they reach this share of the positive contributions, in [0, 1].
                If the negative contributions are larger, they are counted instead.
            unexplained_share: The sentence mentions the unexplained part if its size exceeds this share of
                :math:`\sum_i |v_i E_i|`.

        Raises:
            ValueError: If there are more names than x-features, a file of names is of another layer or target, or a
                share is out of range.
        """
        target = self.target[index]
        return sentence(
            self.contributions[index].tolist(),
            self._names(names, index),
            target_name=target_name or ("the output" if target is None else f"target {target}"),
            surrogate=float(self.surrogate[index]),
            prediction=float(self.prediction[index]),
            is_positive=None if self.is_positive is None else self.is_positive[index],
            share=share,
            unexplained_share=unexplained_share,
        )

    def sentences(
        self,
        names: Names | None = None,
        *,
        target_names: Mapping[Any, str] | Sequence[str] | None = None,
        share: float = 0.9,
        unexplained_share: float = 0.1,
    ) -> list[str]:
        """Put every example's explanation into words with :meth:`sentence`.

        Args:
            names: Names of the x-features: a list, a mapping from their numbers, or the file that a report exports.
            target_names: Names of the model's outputs: a list for all outputs in order, or a mapping by target.
            share: As in :meth:`sentence`.
            unexplained_share: As in :meth:`sentence`.

        Raises:
            ValueError: As in :meth:`sentence`.
        """
        return [
            self.sentence(
                i,
                names,
                target_name=None if target_names is None else _name_of(target, target_names),
                share=share,
                unexplained_share=unexplained_share,
            )
            for i, target in enumerate(self.target)
        ]

    def _names(self, names: Names | None, index: int) -> list[str]:
        target = self.target[index]
        own = target.target if isinstance(target, Difference) else target  # whose x-features divide the difference
        return resolve_names(names, self.contributions.shape[1], target=own, layer=self.layer)

    def __str__(self) -> str:
        return "\n".join(f"{i}: {self.describe(i)}" for i in range(len(self)))

    def __repr__(self) -> str:
        K, shown = self.contributions.shape[1], min(len(self), _SHOWN)
        of = "" if self.layer is None else f" at layer {middle_cut(self.layer, 40)!r}"
        maps = (self.maps,) if isinstance(self.maps, Tensor) else self.maps
        shapes = " and ".join(str(tuple(m.shape)) for m in maps[:2]) + ", ..." * (len(maps) > 2)
        head = (
            f"Explanation of {len(self)} example{'s' * (len(self) != 1)}{of}: {K} x-feature{'s' * (K != 1)}, "
            f"maps {shapes}"
        )
        lines = [f"  {i}: {self._said(i)}" for i in range(shown)]
        lines = [line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4].rpartition(' ')[0]} ..." for line in lines]
        more = [f"  ... and {len(self) - shown} more"] if shown < len(self) else []
        return "\n".join([head, *lines, *more])

    def _said(self, index: int) -> str:
        """Write a sentence about one example, or its numbers if its prediction is infinite."""
        try:
            return self.sentence(index=index)
        except ValueError:
            return self.describe(index)

    def show(self, index: int = 0, *, names: Names | None = None, **options: Any) -> Figure:
        """Draw one example: the input, a map for each x-feature in order of contribution, and the sum.

        For inputs that are not images, the figure shows the sum only. If the explanation contains the 1-Heatmap, it is
        drawn beside the image.

        Args:
            index: Position of the example in the batch.
            names: Names of the x-features: a list, a mapping from their numbers, or the file that a report exports.
            options: Options of :func:`captum_xnn.plots.show_explanation`, such as ``mean=`` and ``std=`` of
                the normalised inputs, ``scale=``, ``style=`` or ``axes=``. Without images, options of
                :func:`captum_xnn.plots.show_contributions`.
        """
        from captum_xnn.plots._explanation import show_contributions, show_explanation

        numbers: dict[str, Any] = {
            "bias": float(self.bias[index]),
            "surrogate": float(self.surrogate[index]),
            "prediction": float(self.prediction[index]),
            "names": self._names(names, index),
        }
        contributions = self.contributions[index].detach().cpu()
        image = self._image()
        if image is None:
            return show_contributions(contributions, **numbers, **options)
        if self.one_heatmap is not None:
            numbers["one_heatmap"] = self._shown(_first(self.one_heatmap))[index, 0].cpu()
        maps = self._shown(self.directed_maps())[index].cpu()
        return show_explanation(image[index].detach().cpu(), maps, contributions, **(numbers | options))

    def gallery(self, indices: Sequence[int] | None = None, *, names: Names | None = None, **options: Any) -> Figure:
        """Draw several examples as rows and x-features as columns, to help name each x-feature.

        Args:
            indices: Positions of the examples in the batch; all examples if None.
            names: Names of the x-features, as :meth:`show` takes them.
            options: Options of :func:`captum_xnn.plots.show_gallery`.

        Raises:
            ValueError: If the inputs are not images, or the names differ between the examples' targets.
        """
        from captum_xnn.plots._explanation import show_gallery

        image = self._image()
        if image is None:
            raise ValueError(
                f"inputs are {tuple(_first(self.inputs).shape)} and maps {tuple(_first(self.maps).shape)}, and a "
                "gallery needs images (N, C, H, W) with C = 1 or 3 and maps of them; use show"
            )
        rows = list(range(len(self))) if indices is None else list(indices)
        if self.one_heatmap is not None:
            options = {"one_heatmaps": self._shown(_first(self.one_heatmap))[rows, 0].cpu(), **options}
        return show_gallery(
            image[rows].detach().cpu(),
            self._shown(self.directed_maps())[rows].cpu(),
            self.contributions[rows].detach().cpu(),
            names=self._common_names(names, rows),
            **options,
        )

    def show_tokens(
        self,
        tokens: Sequence[Sequence[str]],
        indices: Sequence[int] | None = None,
        *,
        names: Names | None = None,
        **options: Any,
    ) -> Figure:
        """Draw texts whose words have the colours of the x-features that they drive.

        Args:
            tokens: The words of each text that is drawn, without padding.
            indices: Positions of these texts in the batch; all texts if None.
            names: Names of the x-features, as :meth:`show` takes them.
            options: Options of :func:`captum_xnn.plots.show_tokens`.

        Raises:
            ValueError: If the maps have fewer tokens than a text has words, or the names differ between the texts'
                targets.
        """
        from captum_xnn.plots._tokens import show_tokens

        rows = list(range(len(self))) if indices is None else list(indices)
        return show_tokens(
            tokens,
            self.directed_maps()[rows].detach().cpu(),
            self.contributions[rows].detach().cpu(),
            names=self._common_names(names, rows),
            **options,
        )

    def _common_names(self, names: Names | None, rows: Sequence[int]) -> list[str] | None:
        """Return the names of the x-features; raise if they differ between the examples."""
        if not rows:
            return None
        first, *others = (self._names(names, i) for i in rows)
        if any(other != first for other in others):
            raise ValueError(
                f"the examples' targets {', '.join(dict.fromkeys(str(self.target[i]) for i in rows))} have different "
                "names for the same x-feature; pick the examples of one target"
            )
        return first

    def directed_maps(self) -> Tensor:
        """Orient the first input's maps, (N, K, ...): positive where the input drives an x-feature to its value.

        An x-feature below the average training example has a negative value. A signed map (gradients, DeepLift) is then
        positive where the input pulls the x-feature up, against its value. The sign of such a map is flipped. If no
        map has a negative value, all maps are returned unchanged.
        """
        maps = _first(self.maps)
        if not bool((maps < 0).any()):
            return maps
        sign = torch.where(self.features < 0, -1, 1).to(maps)
        return maps * sign.reshape(*sign.shape, *[1] * (maps.dim() - 2))

    def _image(self) -> Tensor | None:
        """Return the first input if it consists of images and the maps belong to it, else None."""
        image = _first(self.inputs)
        if image.dim() != 4 or _first(self.maps).dim() != 5:
            return None
        image = image.movedim(channels_by_size(image), 1)
        return image if image.shape[1] in (1, 3) else None

    def _shown(self, maps: Tensor) -> Tensor:
        """Move the channels of maps to where plots want them, (N, K, C, H, W)."""
        return channels_first(maps, _first(self.inputs))


def middle_cut(text: str, width: int) -> str:
    """Shorten a text to a width: its first and its last characters, with "..." between them.

    Args:
        text: Any text, such as a layer's name.
        width: The most characters to keep, "..." included.
    """
    kept = (width - 3) // 2
    return text if len(text) <= width else f"{text[:kept]}...{text[-kept:]}"


def _first(tensors: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the first of several tensors, or the only one."""
    return tensors if isinstance(tensors, Tensor) else tensors[0]


def _name_of(target: Target, target_names: Mapping[Any, str] | Sequence[str]) -> str:
    """Look up the name of an output; raise if it has no name."""
    if isinstance(target, Difference):
        return f"{_name_of(target.target, target_names)} rather than {_name_of(target.against, target_names)}"
    key = 0 if target is None else target
    if isinstance(target_names, Mapping):
        found = target_names.get(target, target_names.get(key))
    else:
        found = target_names[key] if isinstance(key, int) and key < len(target_names) else None
    if found is None or isinstance(target_names, str):
        raise ValueError(
            f"target {target} has no name among the {len(target_names)} target_names; give the names of all outputs in "
            "order, or a mapping such as {46: 'European goldfinch'}"
        )
    return found
