"""Make the forms of a layer and fit them to its activations, one form for each task.

Conventions:
    M examples.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn._distributed import Ranks
from captum_xnn.activations._activations import Activations, Task
from captum_xnn.activations._batches import Batches
from captum_xnn.activations._memmap import each
from captum_xnn.layers._fingerprint import fingerprint
from captum_xnn.layers._layout import channel_dimension
from captum_xnn.layers._read import EveryCall
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._stacklevel import levels_up
from captum_xnn.layers._targets import Target
from captum_xnn.metrics._faithfulness import error_floor, regression_faithfulness
from captum_xnn.models._base import encode_all
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._form import Form, MakeForm
from captum_xnn.models._srae import ConvSRAE
from captum_xnn.models.baselines._subspaces import DRSA
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._contributions import fit_groups
from captum_xnn.training._directions import directions
from captum_xnn.training._fitting import fit_together
from captum_xnn.training._history import Record
from captum_xnn.training._recipe import Recipe
from captum_xnn.training._subspaces import fit_subspaces

__all__ = ["Fitted", "LayerFit", "Log", "form_maker", "is_exact"]

# Weights of a learned form, in all and for each example, above which a fit warns of its size.
_MANY, _MANY_EACH = 20_000_000, 1000

Log = Callable[[Any, Record], None]
"""Receives a target, or a tuple of targets, and a record of the history."""

# Ratio of the output's standard deviations with and without a hundredth of the examples that warns of outliers.
_OUTLYING = 100
# Standard deviations of the output that contributions may miss without a warning.
_NOTABLE = 0.005
# Standard deviations of the output by which a surrogate errs when too many x-features are asked of a layer.
_OFF = 0.02


class Fitted(NamedTuple):
    """A fitted form, with the facts of its fit. The fields are those of :class:`captum_xnn.explainer.Explainer`."""

    targets: tuple[Target, ...]
    form: Form
    f_reg: float
    examples: int
    positives: int | None
    floor: float | None = None
    history: tuple[Record, ...] = ()
    requested: int | None = None


@dataclass(frozen=True)
class LayerFit:
    """Settings of the fits at one layer."""

    make: MakeForm | None
    """Makes forms; None makes groups of contributions."""
    n_features: int
    recipe: Recipe
    seed: int
    progress: bool
    checkpoint: Checkpoint | None
    log: Log | None
    ranks: Ranks

    def fit(self, tasks: Sequence[Task], activations: Activations, reader: Reader) -> Iterator[Fitted]:
        """Fit a form for each task; yield each as soon as it is fitted.

        Args:
            tasks: Tasks with the same number of outputs. Their forms are fitted together.
            activations: Activations of the layer.
            reader: Reader of the layer.

        Raises:
            ValueError: If activations or outputs cannot be learned from.
        """
        if 2 <= len(activations.Z) < self.n_features:  # a single example has an error of its own
            raise ValueError(
                f"n_features is {self.n_features}, and the data have only {len(activations.Z)} examples; pass as many "
                f"examples as x-features at least, better some hundred, or n_features={len(activations.Z)}"
            )
        forms = self._forms(len(tasks[0].targets), len(tasks), activations, reader)
        fit = self._fit_exact if isinstance(forms[0], ContributionGroups) else self._fit_learned
        yield from fit(forms, tasks, activations, reader)

    def _forms(self, outputs: int, count: int, activations: Activations, reader: Reader) -> list[Any]:
        """Make the forms, untrained, on the model's device."""
        dtype = torch.float64 if activations.Z.dtype == torch.float64 else torch.float32
        # torch draws weights at construction, on its default device; those of the fit come later
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            make = partial(
                form_maker(self.make, activations, reader),
                tuple(activations.Z.shape[1:]),
                self.n_features,
                n_outputs=outputs,
            )
            if self.ranks.first and not is_exact(self.make):
                _warn_of_size(make, activations)
            return [make().to(reader.device, dtype) for _ in range(count)]

    def _fit_exact(
        self, forms: Sequence[ContributionGroups], tasks: Sequence[Task], activations: Activations, reader: Reader
    ) -> Iterator[Fitted]:
        """Fit groups of contributions, or subspaces (DRSA)."""
        if self.log is not None:
            warnings.warn(
                "fit does not use log: groups of contributions are a closed form, without steps to record; leave it "
                "out, or fit with autoencoder=SRAE",
                stacklevel=levels_up(),
            )
        for task in tasks:
            _check_varies(task.y)
            if self.ranks.first:
                _warn_of_outliers(task)
        for task, form, off in zip(tasks, forms, self._fit_in_place(forms, tasks, activations, reader), strict=True):
            _warn_of_unexplained(form, off, task.targets, activations)
            yield _fitted(task, form, float(off.double().abs().mean()), self.n_features)

    def _fit_in_place(
        self, forms: Sequence[Any], tasks: Sequence[Task], activations: Activations, reader: Reader
    ) -> Iterator[Tensor]:
        """Fit each exact form in place, and yield the differences that its contributions leave unexplained."""
        ys, targets, marks = ([getattr(task, name) for task in tasks] for name in ("y", "targets", "positives"))
        tail = reader.tail()
        if isinstance(forms[0], DRSA):
            yield from fit_subspaces(
                forms,
                tail,
                activations.Z,
                ys,
                activations.source,
                targets,
                marks=marks,
                seed=self.seed,
                progress=self.progress,
            )
            return
        checkpoints = [] if activations.folder is None else [Checkpoint(activations.folder / "contributions")]
        checkpoints += [] if self.checkpoint is None else [self.checkpoint]
        evidence_of_each = fit_groups(
            forms,
            tail,
            activations.Z,
            ys,
            activations.source,
            targets,
            marks=marks,
            checkpoints=checkpoints,
            model=fingerprint(reader.model, activations.layer) if checkpoints else None,
            progress=self.progress,
            ranks=self.ranks,
        )
        for evidence in evidence_of_each:
            yield evidence.unexplained

    def _fit_learned(
        self, forms: Sequence[Any], tasks: Sequence[Task], activations: Activations, reader: Reader
    ) -> Iterator[Fitted]:
        """Fit networks that imitate the model."""
        device, dtype = reader.device, forms[0].dtype
        Z, ys = each(activations.Z, lambda part: part.to(device, dtype)), [task.y.to(device, dtype) for task in tasks]
        histories = fit_together(
            forms,
            Z,
            ys,
            positives=[task.positives for task in tasks],
            recipe=self.recipe,
            seed=self.seed,
            progress=self.progress,
            checkpoint=self.checkpoint,
            logs=[self._logging(task.targets) for task in tasks],
            ranks=self.ranks,
        )
        for task, form, y, history in zip(tasks, forms, ys, histories, strict=True):
            with torch.no_grad():
                error = regression_faithfulness(form.head(encode_all(form, Z)), y)
            if self.ranks.first and getattr(form, "anchored", False):
                _warn_of_few_directions(activations, form.n_features, error / float(y.std(0).mean()))
            floor = _error_floor(y, self.n_features)
            yield _fitted(task, form, error, self.n_features)._replace(floor=floor, history=tuple(history))

    def _logging(self, targets: tuple[Target, ...]) -> Callable[[Record], None] | None:
        """Return the callback that receives the records of one explainer."""
        if self.log is None:
            return None
        return partial(self.log, targets[0] if len(targets) == 1 else targets)


def is_exact(make: MakeForm | None) -> bool:
    """Whether a user's choice of form divides contributions that add up by construction.

    Args:
        make: A class of forms, a partial of it, or a function. None makes groups.

    Example:
        >>> is_exact(None), is_exact(partial(ContributionGroups, grid=4)), is_exact(ConvSRAE)
        (True, True, False)
    """
    form = _class_of(make)
    return form is None or (isinstance(form, type) and issubclass(form, ContributionGroups))


def form_maker(make: MakeForm | None, activations: Activations, reader: Reader) -> MakeForm:
    """Return the function that makes the forms of a layer. If it has a parameter ``channels``, find and bind its value.

    Args:
        make: A class of forms, a partial of it, or a function. None makes groups of contributions.
        activations: Activations of the layer.
        reader: Reader of the layer.

    Raises:
        ValueError: If the layer has channels last, and the form needs them first.
    """
    make_form = make or ContributionGroups
    bound = isinstance(make_form, partial) and "channels" in make_form.keywords
    shape = tuple(activations.Z.shape[1:])
    if bound or activations.source is None or len(shape) < 2 or isinstance(reader.output_transform, EveryCall):
        return make_form
    if "channels" in inspect.signature(make_form).parameters:
        return partial(make_form, channels=_channels(activations, reader))
    if _class_of(make_form) is ConvSRAE and _channels(activations, reader) != 1:
        raise ValueError(
            f"layer {activations.layer!r} gives {shape} values per example with channels last, and ConvSRAE takes "
            "(channels, H, W); pass output_transform=lambda output: output.movedim(-1, 1), or autoencoder=SRAE"
        )
    return make_form


def _class_of(make: MakeForm | None) -> MakeForm | None:
    """Return the class of forms, or the function, behind a partial."""
    return make.func if isinstance(make, partial) else make


def _channels(activations: Activations, reader: Reader) -> int:
    """Find the dimension of Z that holds channels, from the first batch of the data."""
    assert activations.source is not None
    first = Batches(activations.source.data, 2, activations.source.unpack).first()
    assert first is not None  # as activations were collected from it
    inputs, additional = first.on(reader.device)
    arguments, transform = (*inputs, *additional), reader.output_transform
    return channel_dimension(reader.model, reader.layer, arguments, name=reader.name, output_transform=transform)


def _warn_of_size(make: Callable[[], nn.Module], activations: Activations) -> None:
    """Warn of a network with far more weights than examples can teach, before it takes the memory.

    Args:
        make: Makes the network.
        activations: Activations that it will learn from.
    """
    shape, examples = tuple(activations.Z.shape[1:]), len(activations.Z)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            weights = sum(p.numel() for p in make().parameters())
    except Exception:
        return  # a form of the user's own may need real numbers
    if weights <= max(_MANY, _MANY_EACH * examples):
        return
    warnings.warn(
        f"the explanation network of layer {activations.layer!r} has {weights / 1e6:.0f} million weights for "
        f"{examples} examples, about {16 * weights / 1e9:.1f} GB while it learns, as Z has {shape} numbers per "
        "example; leave autoencoder= out (groups of contributions weigh channels only), read one token or the mean, as "
        "in output_transform=lambda output: output[:, 0], or pass autoencoder=ConvSRAE for feature maps",
        stacklevel=levels_up(),
    )


def _fitted(task: Task, form: Form, f_reg: float, requested: int) -> Fitted:
    """Freeze a fitted form, and return it with the facts of its fit."""
    positives = None if task.positives is None else int(task.positives.sum())
    return Fitted(task.targets, form.requires_grad_(False), f_reg, len(task.y), positives, requested=requested)


def _check_varies(y: Tensor) -> None:
    """Raise if outputs (M, C) have fewer than two examples, or the same value for all."""
    if len(y) < 2:
        raise ValueError(f"learning needs at least two examples, not {len(y)}; pass more data, better a few hundred")
    if not bool((y.double().std(0) > y.double().mean(0).abs() * torch.finfo(y.dtype).eps * 4).all()):
        raise ValueError(
            "the output is the same for every example and needs no explanation; check the target and the inputs"
        )


def _warn_of_outliers(task: Task) -> None:
    """Warn where one example in a hundred decides the standard deviation, the unit in which contributions may err."""
    y = task.y.double()
    off = (y - y.median(0).values).abs()
    left_out = off.topk(len(y) // 100, 0).indices
    if not len(left_out):
        return
    for c, target in enumerate(task.targets):
        whole, rest = float(y[:, c].std()), float(_without(y[:, c], left_out[:, c]).std())
        if whole > _OUTLYING * rest > 0:
            row = int(off[:, c].argmax())
            warnings.warn(
                f"the standard deviation of output {target} is {whole:.3g}, and {rest:.3g} without {len(left_out)} of "
                f"{len(y)} examples, such as example {row} with output {float(y[row, c]):.3g}: contributions add up "
                "only to a hundredth of the first number, and count from a mean that these examples decide; check "
                "them, and leave out damaged ones",
                stacklevel=levels_up(),
            )


def _without(values: Tensor, rows: Tensor) -> Tensor:
    """Return the values (M,) of all rows but some."""
    kept = torch.ones(len(values), dtype=torch.bool, device=values.device)
    kept[rows] = False
    return values[kept]


def _warn_of_unexplained(form: Any, unexplained: Tensor, targets: tuple[Target, ...], activations: Activations) -> None:
    """Warn where contributions do not add up even with the largest number of intervals."""
    if form.dtype not in (torch.float32, torch.float64):
        return
    off = unexplained.double().abs() / form.scale[:, None].double().cpu()
    # A tolerance near rounding is the user's wish and not the integral's failure.
    missed = off > max(2 * form.config["tolerance"], _NOTABLE)
    if bool(missed.any()):
        more = f"functools.partial({type(form).__name__}, most={2 * form.config['most']})"
        fix = (
            f"choose a later layer, pass autoencoder={more}, or, where the rest of the model jumps, as rounding does, "
            "fit with autoencoder=SRAE"
        )
        if torch.float32 not in (activations.Z.dtype, activations.y_hat.dtype) and activations.Z.dtype != torch.float64:
            fix = f"run the model in float32, as {activations.Z.dtype} rounds its outputs by as much"
        warnings.warn(
            f"contributions to target {', '.join(map(str, targets))} at layer {activations.layer!r} miss the output by "
            f"up to {float(off.max()):.1%} of its standard deviation, in {int(missed.any(0).sum())} of "
            f"{missed.shape[1]} examples, after {form.config['most']} intervals; {fix}",
            stacklevel=levels_up(),
        )


def _warn_of_few_directions(activations: Activations, K: int, error: float) -> None:
    """Warn if a form has over twice as many x-features as its layer has directions, and its surrogate is off."""
    if error < _OFF or K < 3:
        return
    count = directions(activations.Z)
    if 2 * count >= K:
        return
    warnings.warn(
        f"n_features is {K}, and 99 % of the variance of layer {activations.layer!r} lies in {count} "
        f"direction{'s' * (count > 1)}: more x-features follow the remaining noise, and the surrogate is off by "
        f"{error:.1%} of the output's standard deviation. Pass n_features={count}, choose an earlier layer, or leave "
        "autoencoder= out, as contributions always add up",
        stacklevel=levels_up(),
    )


def _error_floor(y: Tensor, n: int) -> float | None:
    """Compute the lowest mean squared error, summed over outputs, of n x-features with a linear head, if C > n."""
    if y.shape[1] <= n:
        return None
    floor = error_floor(y, n)
    warnings.warn(
        f"{n} x-features explain {y.shape[1]} outputs jointly, and cannot bring the mean squared error below "
        f"{floor:.3g}. Raise n_features to {y.shape[1]} or explain fewer",
        stacklevel=levels_up(),
    )
    return floor
