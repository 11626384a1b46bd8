"""Explainer: a fitted form with the facts of its fit. Explainers: all explainers of an attribution."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_xnn.activations._activations import Activations
from captum_xnn.activations._batches import Batches, refuse_changed, refuse_lack
from captum_xnn.activations._memmap import chunks
from captum_xnn.errors import NotFittedError
from captum_xnn.heatmaps._numbers import Examples, Numbers, check_shape, numbers_of_network
from captum_xnn.layers._fingerprint import WeightSamples
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._state import untouched
from captum_xnn.layers._targets import Difference, Target, select_each
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._form import Choice, Form
from captum_xnn.training._history import Record

if TYPE_CHECKING:  # an explainer gets the reader of its layer, and makes none
    from captum_xnn.layers._reader import Reader

__all__ = ["Explainer", "Explainers"]

# Number of explainers, and of targets of one explainer, in a printed text.
_SHOWN = 5
# Batch size where contributions to collected outputs need the model to run again.
_AT_ONCE = 64


@dataclass(frozen=True)
class Explainer:
    """A fitted form for one output, or for several outputs jointly."""

    layer: str
    """Dotted name of the explained layer."""
    targets: tuple[Target, ...]
    """The explained outputs, in the order of the head's rows."""
    form: Form
    """The form: groups of contributions, or a learned network."""
    f_reg: float
    """Mean absolute error in logits. For groups, over the examples that they were learned from; for other forms, over
    all training data."""
    examples: int
    """Number of training examples."""
    positives: int | None
    """Number of training examples to which the model gives the class; None if the output is not a class."""
    floor: float | None = None
    """Lowest mean squared error, summed over outputs, that so few x-features can reach. None for groups, and with at
    least as many x-features as outputs."""
    history: tuple[Record, ...] = field(default=(), repr=False)
    """Records of gradient descent; empty for groups."""
    requested: int | None = None
    """Number of x-features that the fit was asked for; None if unknown."""
    weights: WeightSamples | None = field(default=None, repr=False, compare=False)
    """Some numbers of the model's weights when the explainer was fitted or loaded; None if unknown."""

    @property
    def is_exact(self) -> bool:
        """Whether the x-features add up to the output by construction, as groups of contributions do."""
        return isinstance(self.form, ContributionGroups)

    @property
    def shortfall(self) -> str:
        """Why there are fewer x-features than the fit was asked for, in a sentence; empty if there are as many."""
        left = self.form.n_features
        if self.requested is None or left >= self.requested:
            return ""
        return (
            f"The fit was asked for {self.requested} x-features and has {left}: the other "
            f"{'one' if self.requested - left == 1 else self.requested - left} held less than one percent of the "
            "contributions and went into these."
        )

    def covers(self, target: Target) -> bool:
        """Whether this explainer explains the target. For a model with one output, None and 0 are the same target.

        Groups that were fitted to an output also explain its difference from any other output. A learned network needs
        to be fitted to both outputs.

        Args:
            target: None, int, tuple of ints, or a difference.
        """
        if isinstance(target, Difference):
            return self.covers(target.target) and (self.is_exact or self.covers(target.against))
        return target in self.targets or (target in (None, 0) and self.targets in ((None,), (0,)))

    def output(self, target: Target) -> int:
        """Return the index of a covered output among the targets, which is also its row in a network's head.

        Args:
            target: None, int, tuple of ints, or a difference. A difference has the index of its first output.
        """
        target = target.target if isinstance(target, Difference) else target
        return self.targets.index(target) if target in self.targets else 0

    def choice(self, target: Target) -> Choice:
        """Return how this explainer explains a covered target.

        Args:
            target: None, int, tuple of ints, or a difference.
        """
        against = None
        if isinstance(target, Difference) and not self.is_exact:
            against = self.output(target.against)
        return Choice(self.form, self.output(target), target, against)

    def numbers(self, target: Target, activations: Activations, predictions: Tensor, reader: Reader) -> Numbers:
        """Compute the numbers of a covered target on collected activations, on the CPU and without slopes.

        A learned network reads the activations. Groups of contributions need the model, which runs on the inputs again.

        Args:
            target: None, int, tuple of ints, or a difference.
            activations: Activations of M examples.
            predictions: The explained output of each example, (M,).
            reader: Reader of the layer.

        Raises:
            ModelMismatchError: If the form was fitted to another shape of Z.
            ValueError: If groups are to be read from activations without inputs, or the inputs have changed.

        Example:
            >>> from captum_xnn.layers._reader import Reader
            >>> from captum_xnn.models._srae import SRAE
            >>> reader = Reader.of(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU()), "1")
            >>> activations = Activations(Z=torch.rand(9, 4), y_hat=torch.rand(9, 4), layer="1")
            >>> explainer = Explainer("1", (1,), SRAE(4, 2), f_reg=0.1, examples=9, positives=3)
            >>> explainer.numbers(1, activations, activations.y_hat[:, 1], reader).contributions.shape
            torch.Size([9, 2])
        """
        choice = self.choice(target)
        if isinstance(choice.form, ContributionGroups):
            chunks_of_numbers = _numbers_by_model(choice, activations, predictions, reader)
        else:
            chunks_of_numbers = _numbers_by_network(choice, activations)
        without_slopes = [numbers._replace(slopes=numbers.features[:, :0]) for numbers in chunks_of_numbers]
        return Numbers(*(torch.cat([value.cpu() for value in values]) for values in zip(*without_slopes, strict=True)))


def _numbers_by_network(choice: Choice, activations: Activations) -> Iterator[Numbers]:
    """Yield the numbers of a learned network, chunk by chunk of the activations."""
    form = choice.form
    assert not isinstance(form, ContributionGroups)
    for Z in chunks(activations.Z):
        check_shape(form, Z, activations.layer)
        with torch.no_grad():
            yield numbers_of_network(form, choice, Z.to(form.head.weight.device), with_slopes=False)


def _numbers_by_model(
    choice: Choice, activations: Activations, predictions: Tensor, reader: Reader
) -> Iterator[Numbers]:
    """Run the model on the inputs again, and yield the numbers of groups of contributions, batch by batch.

    Raise where the inputs are not those of the activations, as far as the outputs show.
    """
    if activations.source is None:
        raise ValueError(
            "these activations do not say which inputs they belong to, and contributions need the inputs again; "
            "pass the data themselves"
        )
    count = 0
    for batch in Batches(activations.source.data, _AT_ONCE, activations.source.unpack).where(lambda _first, _end: True):
        rows = torch.arange(batch.first, batch.first + batch.rows, device="cpu")
        with torch.inference_mode(False), torch.no_grad(), untouched(reader.model):
            inputs, additional = batch.on(reader.device)
            Z, y_hat = reader.read((*inputs, *additional))
        again = select_each(y_hat, [choice.target] * batch.rows)
        refuse_changed(predictions[rows].cpu(), again.to(predictions.dtype).cpu(), rows)
        # Copies again, as a model may have worked in place.
        yield Examples([choice] * batch.rows, reader, *batch.on(reader.device)).numbers(Z, again)
        count += batch.rows
    refuse_lack(count, torch.arange(len(predictions), device="cpu"))


class Explainers(dict[tuple[str, tuple[Target, ...]], Explainer]):
    """Explainers by the name of their layer and their targets.

    Example:
        >>> from captum_xnn.models._srae import SRAE
        >>> fitted = Explainers()
        >>> fitted["fc", (3, 4)] = Explainer("fc", (3, 4), SRAE(4, 2, n_outputs=2), f_reg=0.1, examples=9, positives=3)
        >>> fitted.covering("fc", 4).targets, fitted.covering("fc", 5)
        ((3, 4), None)
    """

    def at(self, layer: str) -> list[Explainer]:
        """List the explainers of a layer.

        Args:
            layer: Dotted name of the layer.
        """
        return [explainer for (name, _), explainer in self.items() if name == layer]

    @classmethod
    def only(cls, explainer: Explainer) -> Explainers:
        """Make a collection of one explainer.

        Args:
            explainer: The explainer.
        """
        return cls({(explainer.layer, explainer.targets): explainer})

    def covering(self, layer: str, target: Target) -> Explainer | None:
        """Find the explainer with the fewest targets that covers a target; None without such an explainer.

        Args:
            layer: Dotted name of the layer.
            target: None, int, tuple of ints, or a difference.
        """
        covering = [explainer for explainer in self.at(layer) if explainer.covers(target)]
        return min(covering, key=lambda explainer: len(explainer.targets), default=None)

    def fits_for(self, layer: str, missing: Sequence[Target], exact: bool) -> list[tuple[list[Target], bool]]:
        """List the fits that missing targets need: the targets of each fit, and whether it is joint.

        A difference needs groups of its first output (:meth:`Explainer.covers`), or a joint fit of both outputs.

        Args:
            layer: Dotted name of the layer.
            missing: Different targets that no explainer covers.
            exact: Whether a fit makes exact forms.
        """
        single: list[Target] = []
        joint: list[list[Target]] = []
        for t in missing:
            if not isinstance(t, Difference):
                single.append(t)
            elif exact and self.covering(layer, t.target) is None:
                single.append(t.target)
            else:
                joint.append([t.target, t.against])
        fits = [(pair, True) for pair in joint]
        if single:
            fits.append((list(dict.fromkeys(single)), False))
        return fits

    def not_fitted(self, layer: str, targets: Sequence[Target], joint: bool) -> NotFittedError:
        """Return the error for targets without an explainer, which names the call that fits one.

        Args:
            layer: Dotted name of the layer.
            targets: The targets of one fit.
            joint: Whether the fit is joint.
        """
        fitted = sorted({str(t) for explainer in self.at(layer) for t in explainer.targets})
        have = ", ".join(fitted) or "none"
        one = targets[0] if len(targets) == 1 else targets
        instead = f"pass target={fitted[0]}, or " if one is None and fitted else ""
        return NotFittedError(
            f"target {one} has no {'joint ' * joint}explainer at layer {layer!r} (fitted: {have}); {instead}call "
            f"xnn.fit(train_loader, target={one}{', joint=True' * joint}) first, or pass train_data= to "
            "XNNAttribution"
        )

    @staticmethod
    def warn_of_changed_weights(explainers: Sequence[Explainer], model: nn.Module) -> None:
        """Warn where the weights of the model have changed since explainers were fitted to it.

        Explainers of one fit share their samples of the weights, so one of them stands for all.

        Args:
            explainers: The explainers.
            model: A plain module.
        """
        one_of_each_fit = {id(explainer.weights): explainer for explainer in explainers}
        for explainer in one_of_each_fit.values():
            names = [] if explainer.weights is None else explainer.weights.changed(model)
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                targets = ", ".join(map(str, explainer.targets))
                warnings.warn(
                    f"{names[0]}{more} changed after the explainer of target {targets} was fitted: x-features are "
                    "those of the earlier weights, and predictions those of the model as it is now; fit again",
                    stacklevel=levels_up(),
                )

    def lines(self, layer: str) -> list[str]:
        """Describe the first few explainers of a layer, each in a line, and count the others.

        Args:
            layer: Dotted name of the layer.
        """
        fitted = self.at(layer)
        if not fitted:
            return ["not fitted: call fit(data, target=...)"]
        more = [f"... and {len(fitted) - _SHOWN:,} more"] if len(fitted) > _SHOWN else []
        return [_line(explainer) for explainer in fitted[:_SHOWN]] + more


def _line(explainer: Explainer) -> str:
    """Describe an explainer in a line."""
    targets, K = explainer.targets, explainer.form.n_features
    some = ", ".join(map(str, targets[:_SHOWN])) + ", ..." * (len(targets) > _SHOWN)
    return (
        f"target{'s' * (len(targets) != 1)} {some}: {type(explainer.form).__name__}, {K} x-feature{'s' * (K != 1)}, "
        f"fitted on {explainer.examples:,} examples"
    )
