"""One explanation of a batch: the maps, what every x-feature contributes, and whether it adds up.

Conventions:
    N examples, K x-features. Contributions, bias, surrogate and prediction are in the model's own units (logits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captum_xnn.plots.names import Names, resolve_names
from captum_xnn.plots.sentence import sentence
from captum_xnn.targets import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Contributions", "Explanation"]


class Contributions(NamedTuple):
    """The numbers of an explanation, without maps."""

    features: Tensor
    """x-features E, (N, K)."""
    contributions: Tensor
    """What each x-feature adds, (N, K), in logits."""
    bias: Tensor
    """What the output is without them, (N,), in logits."""
    surrogate: Tensor
    """Sum of bias and contributions, (N,), in logits."""
    prediction: Tensor
    """The model's output, (N,), in logits."""


@dataclass(frozen=True, eq=False)
class Explanation:
    r"""Why a model gave its outputs: :math:`\hat y \approx \bar y = b + \sum_i v_i E_i`, with a map for each i.

    Raises:
        ValueError: If bias and contributions do not sum to the surrogate.

    Example:
        >>> import torch
        >>> why = Explanation(
        ...     inputs=torch.zeros(1, 4), maps=torch.zeros(1, 2, 4), features=torch.tensor([[1.0, 2.0]]),
        ...     contributions=torch.tensor([[3.0, 1.0]]), bias=torch.tensor([0.5]), surrogate=torch.tensor([4.5]),
        ...     prediction=torch.tensor([4.6]), target=(0,))
        >>> print(why)
        example 0, target 0: prediction +4.60 = x-feature 1 +3.00, x-feature 2 +1.00, bias +0.50, unexplained +0.10
        >>> why.sentence(["golden feather"], target_name="European goldfinch")
        'European goldfinch because of golden feather (+3.00) and x-feature 2 (+1.00)'
    """

    inputs: Tensor | tuple[Tensor, ...]
    """What was explained, as it was given."""
    maps: Tensor | tuple[Tensor, ...]
    """Attribution maps, (N, K, ...), one tensor for each input tensor; (N, K, 1, H, W) from a layer's method."""
    features: Tensor
    """x-features E, (N, K): in logits of groups of contributions, else in standard deviations from the average."""
    contributions: Tensor
    """v_i E_i, (N, K), in logits."""
    bias: Tensor
    """What the output is at the base, the average of the training data, (N,), in logits. It differs between examples
    where something beside the layer's output reaches the model's."""
    surrogate: Tensor
    """What bias and x-features give together, (N,), in logits."""
    prediction: Tensor
    """What the model gives, (N,), in logits."""
    target: tuple[Target, ...]
    """Which output of the model is explained, for each example."""
    layer: str | None = None
    """Dotted name of the explained layer, where it is known; a file of names must be of the same one."""
    one_heatmap: Tensor | tuple[Tensor, ...] | None = None
    """Maps of the model's own output, (N, 1, ...) in the form of ``maps``, where they were asked for."""

    def __post_init__(self) -> None:
        total = self.bias.double() + self.contributions.double().sum(1)
        scale = 1 + self.contributions.double().abs().sum(1) + self.bias.double().abs()
        off = (total - self.surrogate.double()).abs() / scale
        if not bool((off < 1e-4).all()):
            worst = int(off.nan_to_num(nan=float("inf")).argmax())
            raise ValueError(
                f"expected bias and contributions to sum to the surrogate, got {float(total[worst]):.6g} against "
                f"{float(self.surrogate[worst]):.6g} in example {worst}; the explainer is damaged, fit it anew"
            )

    def __len__(self) -> int:
        return len(self.surrogate)

    @property
    def unexplained(self) -> Tensor:
        """What the x-features fail to explain, prediction minus surrogate, (N,), in logits."""
        return self.prediction - self.surrogate

    def describe(self, index: int, names: Names | None = None) -> str:
        """Returns one example's explanation as a sum of numbers, the largest contribution first.

        Args:
            index: Which example.
            names: Names of the x-features, as :func:`captum_xnn.plots.names.resolve_names` takes them.

        Raises:
            ValueError: If there are more names than x-features, or a file of names is of something else.
        """
        given = self.contributions[index].tolist()
        parts = [
            f"{name} {value:+.2f}"
            for value, name in sorted(zip(given, self._names(names, index), strict=True), reverse=True)
        ]
        return (
            f"example {index}, target {self.target[index]}: prediction {float(self.prediction[index]):+.2f} = "
            f"{', '.join(parts)}, bias {float(self.bias[index]):+.2f}, "
            f"unexplained {float(self.unexplained[index]):+.2f}"
        )

    def sentence(
        self,
        names: Names | None = None,
        index: int = 0,
        *,
        target_name: str | None = None,
        share: float = 0.9,
        residual_share: float = 0.1,
    ) -> str:
        r"""Returns one example's explanation in words, such as "European goldfinch because of golden feather (+63.1)".

        Args:
            names: Names of the x-features, as :func:`captum_xnn.plots.names.resolve_names` takes them.
            index: Which example.
            target_name: What the output stands for; "target 46" without.
            share: How much of the positive contributions the named x-features have to reach, in [0, 1]. Where the
                negative ones are larger, how much of these.
            residual_share: What is left unexplained is told where its size is above this share of
                :math:`\sum_i |v_i E_i|`.

        Raises:
            ValueError: If there are more names than x-features, a file of names is of something else, or a share is
                out of range.
        """
        target = self.target[index]
        return sentence(
            self.contributions[index].tolist(),
            self._names(names, index),
            target_name=target_name or ("the output" if target is None else f"target {target}"),
            surrogate=float(self.surrogate[index]),
            prediction=float(self.prediction[index]),
            share=share,
            residual_share=residual_share,
        )

    def sentences(
        self,
        names: Names | None = None,
        *,
        target_names: Mapping[Any, str] | Sequence[str] | None = None,
        share: float = 0.9,
        residual_share: float = 0.1,
    ) -> list[str]:
        """Returns :meth:`sentence` for every example.

        Args:
            names: Names of the x-features, as :func:`captum_xnn.plots.names.resolve_names` takes them.
            target_names: What the model's outputs stand for: names of all outputs in order, or by target.
            share: As in :meth:`sentence`.
            residual_share: As in :meth:`sentence`.

        Raises:
            ValueError: As in :meth:`sentence`.
        """
        return [
            self.sentence(
                names,
                i,
                target_name=None if target_names is None else _name_of(target, target_names),
                share=share,
                residual_share=residual_share,
            )
            for i, target in enumerate(self.target)
        ]

    def _names(self, names: Names | None, index: int) -> list[str]:
        return resolve_names(names, self.contributions.shape[1], target=self.target[index], layer=self.layer)

    def __str__(self) -> str:
        return "\n".join(self.describe(i) for i in range(len(self)))

    def show(self, index: int = 0, *, names: Names | None = None, **options: Any) -> Figure:
        """Returns a picture of one example: input, a map for each x-feature in order of contribution, and their sum.

        Inputs that are no images give the sum alone. Where the explanation holds the 1-Heatmap it stands beside the
        image.

        Args:
            index: Which example.
            names: Names of the x-features, as :func:`captum_xnn.plots.names.resolve_names` takes them: a list, a
                mapping, or the file that a report exports.
            options: Options of :func:`captum_xnn.plots.explanation.show_explanation`, such as ``mean=`` and ``std=`` of
                the normalised inputs, ``scale=``, ``style=`` or ``axes=``; without images those of
                :func:`captum_xnn.plots.explanation.show_contributions`.
        """
        from captum_xnn.plots import explanation as visualize

        numbers: dict[str, Any] = {
            "bias": float(self.bias[index]),
            "surrogate": float(self.surrogate[index]),
            "prediction": float(self.prediction[index]),
            "names": self._names(names, index),
        }
        contributions = self.contributions[index].detach().cpu()
        image = self._image()
        if image is None:
            return visualize.show_contributions(contributions, **numbers, **options)
        if self.one_heatmap is not None:
            numbers["one_heatmap"] = _first(self.one_heatmap)[index, 0].cpu()
        maps = self.directed_maps()[index].cpu()
        return visualize.show_explanation(image[index].detach().cpu(), maps, contributions, **(numbers | options))

    def gallery(self, indices: Sequence[int] | None = None, *, names: Names | None = None, **options: Any) -> Figure:
        """Returns a picture of several examples as rows, with the same x-feature in each column, to name it by.

        Args:
            indices: Which examples; all of them, if None.
            names: Names of the x-features, as :meth:`show` takes them.
            options: Options of :func:`captum_xnn.plots.explanation.show_gallery`.

        Raises:
            ValueError: If the inputs are no images, or names differ between the examples' targets.
        """
        from captum_xnn.plots import explanation as visualize

        image = self._image()
        if image is None:
            raise ValueError("expected images (N, C, H, W) with C = 1 or 3 and maps of them, got others; use show")
        rows = list(range(len(self))) if indices is None else list(indices)
        if self.one_heatmap is not None:
            options = {"one_heatmaps": _first(self.one_heatmap)[rows, 0].cpu(), **options}
        return visualize.show_gallery(
            image[rows].detach().cpu(),
            self.directed_maps()[rows].cpu(),
            self.contributions[rows].detach().cpu(),
            names=self._common_names(names, rows),
            **options,
        )

    def _common_names(self, names: Names | None, rows: Sequence[int]) -> list[str] | None:
        """Returns the names that x-features have in all of some examples."""
        if not rows:
            return None
        first, *others = (self._names(names, i) for i in rows)
        if any(other != first for other in others):
            raise ValueError(
                f"expected examples whose x-features have the same names, got targets "
                f"{', '.join(dict.fromkeys(str(self.target[i]) for i in rows))}, for which they differ; pick the "
                "examples of one target"
            )
        return first

    def directed_maps(self) -> Tensor:
        """Returns the first input's maps, (N, K, ...), positive where the input drives an x-feature to what it is.

        An x-feature below the average training example has a negative value. Signed maps (gradients, DeepLift) are
        then positive where the input pulls it up, against its value, and are turned round; maps that are never
        negative stay.
        """
        maps = _first(self.maps)
        if not bool((maps < 0).any()):
            return maps
        sign = torch.where(self.features < 0, -1, 1).to(maps)
        return maps * sign.reshape(*sign.shape, *[1] * (maps.dim() - 2))

    def _image(self) -> Tensor | None:
        """Returns the first input where it is images and the maps are of it."""
        image = _first(self.inputs)
        maps = _first(self.maps)
        return image if image.dim() == 4 and image.shape[1] in (1, 3) and maps.dim() == 5 else None


def _first(tensors: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Returns the first tensor of what may be several."""
    return tensors if isinstance(tensors, Tensor) else tensors[0]


def _name_of(target: Target, target_names: Mapping[Any, str] | Sequence[str]) -> str:
    """Returns the name of an output, or raises where there is none."""
    key = 0 if target is None else target
    if isinstance(target_names, Mapping):
        found = target_names.get(target, target_names.get(key))
    else:
        found = target_names[key] if isinstance(key, int) and key < len(target_names) else None
    if found is None or isinstance(target_names, str):
        raise ValueError(
            f"expected a name for target {target} in target_names, got none among {len(target_names)}; give the names "
            "of all outputs in order, or a mapping such as {46: 'European goldfinch'}"
        )
    return found
