r"""XNNAttribution: x-features of any layer of any trained model, with a map and a signed contribution for each.

Conventions:
    N examples, K x-features. Targets are what Captum takes: None, an int, a tuple of ints that indexes the output's
    dimensions after the batch, or one of these per example as a list or a 1-D tensor.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021.
"""

from __future__ import annotations

import copy
import inspect
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from captum.attr import Attribution, LayerAttribution
from torch import Tensor, nn

from captum_xnn import _serialization
from captum_xnn._distributed import ALONE, Ranks
from captum_xnn._targets import (
    Target,
    grouped,
    per_example,
    predicted_classes,
    select,
    select_each,
    single_target,
    target_groups,
)
from captum_xnn.activations import Activations, Source, Unpack, checked, collect_together, first_of_batch
from captum_xnn.activations._batches import Batches, repeatable
from captum_xnn.activations._collecting import Asked
from captum_xnn.activations._memmap import Rows, each, parts
from captum_xnn.activations._unpacking import unpack_for
from captum_xnn.errors import ExplainerFileError, ModelMismatchError, NotFittedError
from captum_xnn.explainer import Explainer, Form
from captum_xnn.explanation import Contributions, Explanation
from captum_xnn.heatmaps._backends import DefaultMaps, Heatmap, as_heatmap, rows_of_settings
from captum_xnn.heatmaps._batching import Part, copied, draw, in_shape_of, levels_up, like
from captum_xnn.heatmaps._contribution_network import ContributionNetwork
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.heatmaps._one_heatmap import OneHeatmap
from captum_xnn.layers._arguments import refuse_too_many
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._forward_args import log_usage
from captum_xnn.layers._layout import channel_dimension
from captum_xnn.layers._logits import Spread, no_logits
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._probe import refuse_whole_arguments
from captum_xnn.layers._read import EveryCall, OutputTransform, read_layer
from captum_xnn.layers._state import untouched
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._trace import Trace, trace
from captum_xnn.metrics._faithfulness import classification_faithfulness, error_floor, regression_faithfulness
from captum_xnn.models._base import Autoencoder
from captum_xnn.models._contribution_groups import ContributionGroups
from captum_xnn.models._srae import ConvSRAE
from captum_xnn.training import encode_all, fit_together
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._contributions import Evidence, fit_groups
from captum_xnn.training._directions import directions
from captum_xnn.training._problem import Recipe, Step

__all__ = ["Faithfulness", "XNNAttribution"]

MakeAutoencoder = Callable[..., Form]


class Faithfulness(NamedTuple):
    """How well the x-features give back the model's outputs on some data."""

    f_reg: float
    """Mean absolute difference between surrogate and prediction, in logits."""
    f_cls: float | None
    """Share of examples whose predicted class stays; None for models with a single output."""
    examples: int


class XNNAttribution(LayerAttribution):  # type: ignore[misc]
    r"""Attribution maps of a few x-features, whose signed contributions add up to the model's output.

    x-features E of one layer's output Z give :math:`\hat y = b + \sum_i v_i E_i`: by default to the error of a path
    integral, with a learned form approximately. Every x-feature gets a heatmap by any Captum method. :meth:`fit`
    learns, :meth:`attribute` gives the maps as Captum's classes do, :meth:`explain` the maps with all the numbers.

    Args:
        model: Any trained module that runs as Python code. It is never changed.
        layer: The layer to explain, by dotted name or as a module. Its **output** is Z. The closer to the model's
            output, the easier few x-features are faithful.
        n_features: x-features K for each explainer.
        heatmap: A Captum class, or a backend such as ``FromCaptum(DeepLift, baselines=...)``. By default gradient x
            activation for groups of contributions, and contrastive excitation backprop for learned networks:
            :class:`~captum_xnn.heatmaps.DefaultMaps`.
        autoencoder: Makes the explanation network from ``(shape of Z, n_features, n_outputs=...)``. By default
            :class:`~captum_xnn.models.ContributionGroups`, which is exact; ``SRAE``, the paper's
            learned form, ``functools.partial(ConvSRAE, hidden=(64,), pool=3)``, or one of the
            :mod:`~captum_xnn.models.baselines`.
        recipe: Settings of the training of learned networks.
        train_data: Data to fit targets on when they are first asked for, as :meth:`fit` takes them.
        unpack: Turns a batch of the training data into (inputs, additional_forward_args). By default a dict goes by the
            names of the model's arguments, and of a tuple or list the first entry is taken.
        output_transform: Turns the layer's raw output, such as a tuple or dict, into one tensor (N, ...).
        prediction_transform: The same for the model's output.
        seed: Seeds every fit.
        device_ids: As in Captum; the model's own device is used, and wrappers such as DataParallel are taken off.

    Raises:
        LayerNotFoundError: If the model has no such layer.
        TypeError: If the model is no module, or a scripted one, or the autoencoder cannot be called.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> data = torch.randn(300, 6)
        >>> xnn = XNNAttribution(model, "1", n_features=2, recipe=Recipe(steps=50)).fit(data, target=0, progress=False)
        >>> xnn.attribute(data[:4], target=0).shape
        torch.Size([4, 2, 6])
        >>> why = xnn.explain(data[:4], target=0)
        >>> torch.allclose(why.bias + why.contributions.sum(1), why.surrogate, atol=1e-5)
        True

    Reference:
        "Embedding Deep Networks into Visual Explanations", 2021.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module,
        n_features: int = 5,
        *,
        heatmap: type[Attribution] | Heatmap | None = None,
        autoencoder: MakeAutoencoder | None = None,
        recipe: Recipe | None = None,
        train_data: Any = None,
        unpack: Unpack = first_of_batch,
        output_transform: OutputTransform | None = None,
        prediction_transform: OutputTransform | None = None,
        seed: int = 0,
        device_ids: list[int] | None = None,
    ) -> None:
        module = find_layer(unwrap(model), layer)[1]
        LayerAttribution.__init__(self, model, module, device_ids)
        if not hasattr(n_features, "__index__"):
            raise TypeError(f"n_features is {n_features!r}, a {type(n_features).__name__}; pass an int, such as 5")
        if n_features < 1:
            raise ValueError(f"expected at least one x-feature, got n_features={n_features}; the paper uses 5")
        if autoencoder is not None and not callable(autoencoder):
            raise TypeError(
                "expected autoencoder as a class such as SRAE or captum_xnn.models.baselines.NN, or a function that "
                f"makes it, got {autoencoder!r}; pass the class itself"
            )
        self.model = model
        self.n_features = operator.index(n_features)
        self.heatmap = as_heatmap(heatmap)
        self.autoencoder = autoencoder
        self.recipe = recipe or Recipe()
        self.train_data = train_data
        self.unpack = unpack_for(model, unpack)
        self.output_transform = output_transform
        self.prediction_transform = prediction_transform
        self.seed = operator.index(seed)
        self.explainers_: dict[tuple[str, tuple[Target, ...]], Explainer] = {}

    @classmethod
    def get_name(cls) -> str:
        """Return the name for progress bars."""
        return "XNN Attribution"

    def has_convergence_delta(self) -> bool:
        """Return True: the delta is the unexplained part of the output."""
        return True

    def fit(
        self,
        data: Any,
        target: Any = None,
        *,
        joint: bool = False,
        positives: Tensor | None = None,
        store: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
        log: Log | None = None,
        distributed: bool = False,
        progress: bool = True,
    ) -> XNNAttribution:
        """Learn an explainer for each target, or one for all of them, and return this object.

        The data are run through the model once, whatever the number of targets, and explainers are learned together.
        No labels are used: positives are the examples to which the model itself gives the class; training draws them
        more often.

        Args:
            data: Inputs as a tensor (M, ...), a tuple of tensors for a model with several inputs, or an iterable of
                batches, such as a DataLoader, which hold the inputs first. Or activations that were collected before,
                in memory or on disk (:class:`~captum_xnn.activations.Activations`); the model is not run
                then.
            target: One output of the model (None, int, or tuple of ints), or a list or range of them, which get an
                explainer each.
            joint: Explain all targets of the list or tuple by one set of x-features.
            positives: Boolean (M,), instead of the model's own decisions. All True weights every example alike, as is
                right where the outputs are no classes.
            store: A folder to collect activations into and to learn from, where they do not fit in memory. Activations
                in it are not collected again (:func:`~captum_xnn.activations.collect`). It keeps
                contributions too: a later fit to the same outputs, with any ``n_features``, reads them and does not run
                the model.
            checkpoint: A folder that keeps how far the fit has come, every minute, or after every 16 outputs where
                groups of contributions are fitted. After an interruption the same call continues from there, with the
                same numbers as without the interruption.
            log: For learned forms: is called with the target, or the tuple of them, and every new record of the
                history (:mod:`captum_xnn.training._logs`). Beside a checkpoint, records come when that is written, so
                that a resumed fit repeats none.
            distributed: Whether the processes of the default group of ``torch.distributed`` do this together, as under
                torchrun. All make the same call with the same data, and get the same explainers; a store and a
                checkpoint are in a folder that all of them see.
            progress: Whether to show progress bars.

        Raises:
            ValueError: If data or outputs cannot be learned from; the message says why, and what to do.
            RuntimeError: If distributed is asked for outside of a group of processes.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
            >>> data = torch.randn(300, 6)
            >>> xnn = XNNAttribution(model, "1", n_features=3, recipe=Recipe(steps=50))
            >>> len(xnn.fit(data, target=[0, 1], progress=False).explainers_)
            2
        """
        groups = target_groups(target, joint)
        ranks = Ranks.here() if distributed else ALONE
        if self._is_exact and not isinstance(data, Activations):
            data = repeatable(data)
        if self._is_exact:
            self._tail()  # which refuses a layer's calls that contributions cannot be of
        of = data if isinstance(data, tuple) else (data,)
        if positives is not None and of and isinstance(of[0], Tensor):
            _check_positives(positives, len(of[0]))
        asked = [t for group in groups for t in group]
        found = self._collected(data, progress, store, ranks, Asked(asked, gradients=self._is_exact))
        outputs = _Outputs.of(found, asked)
        if ranks.first and (reason := no_logits(outputs.spread)) is not None:
            warnings.warn(reason, stacklevel=levels_up())
        kept = Checkpoint(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
        run = _Run(progress and ranks.first, kept, log, ranks)
        with torch.inference_mode(False):
            for some in {len(targets): None for targets in groups}:  # of one size, to be learned together
                alike = [targets for targets in groups if len(targets) == some]
                for explainer in self._fitted(found, outputs, alike, positives, run):
                    self.explainers_[explainer.layer, explainer.targets] = explainer
        return self

    def _collected(
        self,
        data: Any,
        progress: bool,
        store: str | os.PathLike[str] | None,
        ranks: Ranks,
        asked: Asked,
    ) -> Activations:
        """Collect the layer's activations and the model's outputs on some data."""
        if isinstance(data, Activations):
            if store is not None:
                raise ValueError(
                    "expected either data to collect into store=, or activations collected already, got both; "
                    "leave store= out"
                )
            model = unwrap(self.model)
            data.check(model, find_layer(model, self.layer)[0])
            return data
        return collect_together(
            self.model,
            self.layer,
            data,
            store=store,
            unpack=self.unpack,
            output_transform=self.output_transform,
            prediction_transform=self.prediction_transform,
            progress=progress,
            ranks=ranks,
            asked=asked,
        )

    def _fitted(
        self,
        found: Activations,
        outputs: _Outputs,
        groups: Sequence[tuple[Target, ...]],
        positives: Tensor | None,
        run: _Run,
    ) -> Iterator[Explainer]:
        """Fit explainers with the same number of outputs together, from collected activations, and yield them."""
        ys = [outputs.columns(targets) for targets in groups]
        if positives is None:
            marks = [_own_positives(outputs.classes, targets) for targets in groups]
        else:
            _check_positives(positives, len(ys[0]))
            marks = [positives for _ in groups]
        dtype = torch.float64 if found.Z.dtype == torch.float64 else torch.float32
        device = _device(unwrap(self.model))
        with torch.random.fork_rng(devices=[]):  # torch draws weights at construction; those of the fit come later
            make = self._maker(found)
            shape = tuple(found.Z.shape[1:])
            if not self._is_exact and run.ranks.first:
                one = partial(make, shape, self.n_features, n_outputs=len(groups[0]))
                _warn_of_size(one, shape, len(found.Z), found.layer)
            forms = [make(shape, self.n_features, n_outputs=len(of)).to(device, dtype) for of in groups]
        if isinstance(forms[0], ContributionGroups):
            yield from self._grouped(found, ys, groups, marks, forms, run)
        else:
            yield from self._learned(found, ys, groups, marks, forms, run)

    def _grouped(
        self,
        found: Activations,
        ys: Sequence[Tensor],
        groups: Sequence[tuple[Target, ...]],
        marks: Sequence[Tensor | None],
        forms: Sequence[Any],
        run: _Run,
    ) -> Iterator[Explainer]:
        """Yield explainers that are groups of contributions."""
        if run.log is not None:
            warnings.warn(
                "fit does not use log: groups of contributions are a closed form, without steps to record; leave it "
                "out, or fit with autoencoder=SRAE",
                stacklevel=levels_up(),
            )
        kept = [] if found.folder is None else [Checkpoint(found.folder / "contributions")]
        kept += [] if run.checkpoint is None else [run.checkpoint]
        read = fit_groups(
            forms,
            self._tail(),
            found.Z,
            ys,
            found.source,
            groups,
            marks=marks,
            kept=kept,
            model=_serialization.fingerprint(unwrap(self.model), found.layer) if kept else None,
            progress=run.progress,
            ranks=run.ranks,
        )
        for targets, form, y, marked, evidence in zip(groups, forms, ys, marks, read, strict=True):
            _warn_of_unexplained(form, evidence, targets, found.layer)
            yield Explainer(
                layer=found.layer,
                targets=targets,
                form=form.requires_grad_(False),
                f_reg=float(evidence.unexplained.double().abs().mean()),
                examples=len(y),
                positives=None if marked is None else int(marked.sum()),
            )

    def _tail(self) -> Tail:
        return Tail(
            self.model,
            self.layer,
            output_transform=self.output_transform,
            prediction_transform=self.prediction_transform,
        )

    @property
    def _is_exact(self) -> bool:
        """Whether explainers are groups of contributions."""
        made = self.autoencoder.func if isinstance(self.autoencoder, partial) else self.autoencoder
        return made is None or made is ContributionGroups

    def _learned(
        self,
        found: Activations,
        ys: Sequence[Tensor],
        groups: Sequence[tuple[Target, ...]],
        marks: Sequence[Tensor | None],
        xnns: Sequence[Any],
        run: _Run,
    ) -> Iterator[Explainer]:
        """Yield explainers that learn to imitate the model, together."""
        device, dtype = _device(unwrap(self.model)), xnns[0].dtype
        Z, ys = each(found.Z, lambda part: part.to(device, dtype)), [y.to(device, dtype) for y in ys]
        histories = fit_together(
            xnns,
            Z,
            ys,
            positives=marks,
            recipe=self.recipe,
            seed=self.seed,
            progress=run.progress,
            checkpoint=run.checkpoint,
            logs=[run.logging(targets) for targets in groups],
            ranks=run.ranks,
        )
        for targets, xnn, y, marked, history in zip(groups, xnns, ys, marks, histories, strict=True):
            xnn.requires_grad_(False)
            with torch.no_grad():
                error = regression_faithfulness(xnn.head(encode_all(xnn, Z)), y)
            if run.ranks.first and getattr(xnn, "anchored", False):
                _warn_of_few_directions(found, xnn.n_features, error / float(y.std(0).mean()))
            yield Explainer(
                layer=found.layer,
                targets=targets,
                form=xnn,
                f_reg=error,
                examples=len(y),
                positives=None if marked is None else int(marked.sum()),
                floor=_error_floor(y, self.n_features),
                history=tuple(history),
            )

    def _maker(self, found: Activations) -> MakeAutoencoder:
        """Return the function that makes explanation networks, with the dimension of channels where it takes one."""
        make = self.autoencoder or ContributionGroups
        told = isinstance(make, partial) and "channels" in make.keywords
        shape = tuple(found.Z.shape[1:])
        if told or found.source is None or len(shape) < 2 or isinstance(self.output_transform, EveryCall):
            return make
        if "channels" in inspect.signature(make).parameters:
            return partial(make, channels=self._channels(found.source, found.layer))
        made = make.func if isinstance(make, partial) else make
        if made is ConvSRAE and self._channels(found.source, found.layer) != 1:
            raise ValueError(
                f"layer {found.layer!r} gives {shape} values per example with channels last, and ConvSRAE takes "
                "(channels, H, W); pass output_transform=lambda output: output.movedim(-1, 1), or autoencoder=SRAE"
            )
        return make

    def _channels(self, source: Source, name: str) -> int:
        """Return the dimension of Z that holds channels, from the first batch of some data."""
        model = unwrap(self.model)
        first = Batches(source.data, 2, source.unpack).first()
        assert first is not None  # as activations were collected from it
        inputs, additional = first.on(_device(model))
        return channel_dimension(
            model,
            find_layer(model, self.layer)[1],
            (*inputs, *additional),
            name=name,
            output_transform=self.output_transform,
        )

    def explainer(self, target: Any = None) -> Explainer:
        """Return the fitted explainer of an output: its own one, or else a joint one that covers it.

        Args:
            target: None, int, or tuple of ints.

        Raises:
            NotFittedError: If there is none and no train_data to fit one on.
        """
        if isinstance(target, (list, range)) or (isinstance(target, Tensor) and target.numel() > 1):
            many = list(target) if isinstance(target, range) else target
            each = ", ".join(map(str, many.tolist() if isinstance(many, Tensor) else many))
            raise ValueError(
                f"target is the list of {each}, and every explainer has one target or a tuple of ints for one output; "
                "pass one at a time, as in {t: xnn.score(data, t) for t in targets}"
            )
        return self._explainers([single_target(target)])[0]

    def _explainers(self, targets: Sequence[Target]) -> list[Explainer]:
        """Find an explainer for each target; fit missing ones on train_data, if there are any."""
        name = find_layer(unwrap(self.model), self.layer)[0]
        missing = [t for t in dict.fromkeys(targets) if self._fitted_already(name, t) is None]
        if missing and self.train_data is not None:
            self.fit(self.train_data, missing)
        elif missing:
            fitted = sorted({str(t) for layer, ts in self.explainers_ for t in ts if layer == name})
            have = f"targets {', '.join(fitted)}" if fitted else "none yet"
            asked = missing[0] if len(missing) == 1 else missing
            raise NotFittedError(
                f"expected a fitted explainer of target {asked} at layer {name!r}, have {have}; call "
                f"xnn.fit(train_loader, target={asked}) first, or pass train_data= to XNNAttribution"
            )
        return [e for t in targets if (e := self._fitted_already(name, t)) is not None]

    def _fitted_already(self, layer: str, target: Target) -> Explainer | None:
        covering = [e for (at, _), e in self.explainers_.items() if at == layer and e.covers(target)]
        return min(covering, key=lambda e: len(e.targets), default=None)

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        feature: int | None = None,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        **heatmap_kwargs: Any,
    ) -> Any:
        r"""Draw one attribution map for each x-feature.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: Which output to explain, for all examples or for each, as everywhere in Captum.
            additional_forward_args: Further positional arguments of the model, not attributed to.
            feature: The one x-feature to draw, 0-based; all of them, if None.
            internal_batch_size: Maps computed at once, which bounds the memory.
            return_convergence_delta: Whether to return what the x-features fail to explain as well.
            heatmap_kwargs: Settings for this call of the heatmap backend, such as ``n_steps=64``.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, or 2-element tuple of **attributions**, **delta**:

            - **attributions**: (N, K, ...) for each input, or exactly the input's shape with ``feature``. Methods that
              explain a layer give (N, K, 1, H, W) for images and (N, K, 1, D, H, W) for volumes, of which ``feature``
              gives each channel an equal part; of token ids ``feature`` sums over dimensions. Detached, of the input's
              dtype and device.
            - **delta** (N,): :math:`\hat y - \bar y`, in logits.

        Raises:
            NotFittedError: If a target was not fitted and there are no train_data.
            ValueError: If a target or the x-feature is out of range, or a layer's maps do not fit in the input's shape.
        """
        tensors, explained = self._explained(inputs, target, additional_forward_args, internal_batch_size)
        with torch.inference_mode(False), untouched(unwrap(self.model)):
            maps = self._maps(tensors, explained, feature, internal_batch_size, heatmap_kwargs)
        result = like(inputs, maps)
        return (result, explained.prediction - explained.surrogate) if return_convergence_delta else result

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise NotImplementedError, as Captum's classes without futures do."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def compute_convergence_delta(
        self, attributions: Any, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        r"""Compute :math:`\hat y - \bar y` for each example, (N,), in logits: the part that x-features do not explain.

        Args:
            attributions: Not used; the delta is that of the surrogate, not of the maps.
            inputs: A tensor or a tuple of tensors.
            target: Which output is explained.
            additional_forward_args: Further positional arguments of the model.
        """
        del attributions
        explained = self._explained(inputs, target, additional_forward_args)[1]
        return explained.prediction - explained.surrogate

    def explain(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        one_heatmap: bool = False,
        internal_batch_size: int | None = None,
        **heatmap_kwargs: Any,
    ) -> Explanation:
        """Explain examples: maps, x-features, contributions, surrogate and prediction.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: Which output to explain, for all examples or for each, as everywhere in Captum.
            additional_forward_args: Further positional arguments of the model.
            one_heatmap: Whether to draw the map of the model's own output as well, as :meth:`one_heatmap` does;
                :meth:`Explanation.show <captum_xnn.Explanation.show>` then has it beside the image.
            internal_batch_size: Maps computed at once, which bounds the memory.
            heatmap_kwargs: Settings for this call of the heatmap backend.

        Raises:
            NotFittedError: If a target was not fitted and there are no train_data.
            ValueError: If a target is out of range.
        """
        tensors, explained = self._explained(inputs, target, additional_forward_args, internal_batch_size)
        with torch.inference_mode(False), untouched(unwrap(self.model)):
            maps = self._maps(tensors, explained, None, internal_batch_size, heatmap_kwargs)
        one = None
        if one_heatmap:
            one = self.one_heatmap(
                inputs, target, additional_forward_args, internal_batch_size=internal_batch_size, **heatmap_kwargs
            )
        return Explanation(
            inputs=inputs,
            maps=like(inputs, maps),
            features=explained.features,
            contributions=explained.contributions,
            bias=explained.bias,
            surrogate=explained.surrogate,
            prediction=explained.prediction,
            target=tuple(explained.targets),
            layer=explained.explainers[0].layer,
            one_heatmap=one,
        )

    def contributions(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        internal_batch_size: int | None = None,
    ) -> Contributions:
        """Return the numbers of :meth:`explain` without drawing maps.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: Which output to explain, for all examples or for each, as everywhere in Captum.
            additional_forward_args: Further positional arguments of the model.
            internal_batch_size: Examples at once, which bounds the memory.

        Raises:
            NotFittedError: If a target was not fitted and there are no train_data.
            ValueError: If a target is out of range.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
            >>> xnn = XNNAttribution(model, "1", n_features=2).fit(torch.randn(300, 6), target=0, progress=False)
            >>> made = xnn.contributions(torch.ones(1, 6), target=0)
            >>> torch.allclose(made.bias + made.contributions.sum(1), model(torch.ones(1, 6))[:, 0], atol=1e-5)
            True
        """
        found = self._explained(inputs, target, additional_forward_args, internal_batch_size)[1]
        return Contributions(found.features, found.contributions, found.bias, found.surrogate, found.prediction)

    def with_heatmap(self, heatmap: type[Attribution] | Heatmap | None) -> XNNAttribution:
        """Return a copy with the same explainers and another heatmap backend. Later fits of either serve both.

        Args:
            heatmap: A Captum class, a backend, or None for the default.
        """
        other = copy.copy(self)
        other.heatmap = as_heatmap(heatmap)
        return other

    def score(self, data: Any, target: Any = None, *, store: str | os.PathLike[str] | None = None) -> Faithfulness:
        """Measure the faithfulness of a target's explainer on some data: F_reg and F_cls.

        Args:
            data: As :meth:`fit` takes them.
            target: None, int, or tuple of ints.
            store: As in :meth:`fit`; a folder for these data, not that of the training data.

        Raises:
            NotFittedError: If the target was not fitted and there are no train_data.
        """
        explainer = self.explainer(target)
        target = single_target(target)
        found = self._collected(data, False, store, ALONE, Asked([target]))
        outputs = _Outputs.of(found, [target])
        y_bar = self._surrogates(found, explainer, target)
        f_cls = None
        if outputs.classes is not None and isinstance(target, int):
            f_cls = _same_classes(found.y_hat, y_bar, target)
        y_hat = outputs.columns((target,))[:, 0].to(y_bar.dtype)
        return Faithfulness(regression_faithfulness(y_bar, y_hat), f_cls, len(y_bar))

    def _surrogates(self, found: Activations, explainer: Explainer, target: Target) -> Tensor:
        """Return what bias and x-features give for all examples, (M,)."""
        form, output = explainer.form, explainer.output(target)
        if not isinstance(form, ContributionGroups):
            weight = form.head.weight
            with torch.no_grad():
                E = encode_all(form, each(found.Z, lambda part: part.to(weight.device, weight.dtype)))
                y_bar: Tensor = form.head(E)[:, output].cpu()
                return y_bar
        if found.source is None:
            raise ValueError(
                "these activations do not say which inputs they are of, and contributions need the inputs again; pass "
                "the data themselves"
            )
        made = []
        for batch in Batches(found.source.data, 64, found.source.unpack).those(lambda _first, _end: True):
            inputs, additional = batch.on(_device(unwrap(self.model)))
            numbers = self._explained(inputs, target, additional, explainers=[explainer] * batch.rows)[1]
            made.append(numbers.surrogate.cpu())
        return torch.cat(made)

    def _explained(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        additional_forward_args: Any,
        internal_batch_size: int | None = None,
        explainers: Sequence[Explainer] = (),
    ) -> tuple[tuple[Tensor, ...], _Explained]:
        """Return the inputs as a tuple and all numbers of an explanation, by given explainers or the fitted ones."""
        refuse_too_many(unwrap(self.model), inputs, "join them, torch.cat(batches)")
        tensors, additional = copied(inputs, additional_forward_args)
        n = len(tensors[0])
        targets = per_example(target, n)
        self._refuse_whole(tensors, additional)
        explainers = list(explainers)

        def numbers() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            for some in torch.split(torch.arange(n), internal_batch_size or n):
                Z, y_hat = self._read(tensors, additional, some)
                if not explainers:
                    for t in dict.fromkeys(targets):
                        select(y_hat, t)  # raises for a target out of range before another one is fitted
                    explainers.extend(self._explainers(targets))
                rows = some.tolist()
                asked = [(explainers[i], targets[i]) for i in rows]
                own = select_each(y_hat, [targets[i] for i in rows])
                made = self._numbers(Z, own, asked, *rows_of(tensors, additional, some))
                yield rows, (*made, own.to(made[0].dtype))

        return tensors, _Explained(targets, explainers, additional, *gathered(numbers(), n))

    def _numbers(
        self,
        Z: Tensor,
        own: Tensor,
        explainers: Sequence[tuple[Explainer, Target]],
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
    ) -> tuple[Tensor, ...]:
        """Return x-features, contributions, bias, surrogate and slopes of each example by its explainer.

        Slopes are (N, ...) as Z, or (N, 0) where no explainer has any.
        """
        most = max(explainer.form.n_features for explainer, _ in explainers)
        sloping = any(isinstance(explainer.form, ContributionGroups) for explainer, _ in explainers)

        def made() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            for (explainer, target), rows in grouped(explainers):
                _check_shape(Z, explainer)
                form = explainer.form.to(Z.device)
                if isinstance(form, ContributionGroups):
                    x, more = rows_of(inputs, additional, torch.tensor(rows))
                    numbers = self._of_groups(form, explainer.output(target), target, own[rows], x, more)
                else:
                    numbers = _of_network(form, Z[rows], explainer.output(target), sloping)
                yield rows, (*(_wide(n, most) for n in numbers[:2]), *numbers[2:])

        with torch.inference_mode(False), torch.no_grad(), torch.autocast(Z.device.type, enabled=False):
            return gathered(made(), len(Z))

    def _of_groups(
        self,
        form: ContributionGroups,
        output: int,
        target: Target,
        own: Tensor,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
    ) -> tuple[Tensor, ...]:
        """Return the numbers of some examples by groups of contributions."""
        scale = form.scale[output : output + 1]
        with untouched(unwrap(self.model)):
            made = form.integral(self._tail(), inputs, additional, [[target] * len(own)], own=own[None], scale=scale)
        E = form.features(form.contributions(made)[0])
        bias = made.start[0].to(E)
        return E, E, bias, bias + E.sum(1), made.slopes[0]

    def _read(
        self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read the outputs of layer and model for some of the examples."""
        model = unwrap(self.model)
        name, module = find_layer(model, self.layer)
        some, more = rows_of(inputs, additional, rows)
        with torch.inference_mode(False), untouched(model), torch.no_grad():
            Z, output = read_layer(
                model, module, (*some, *(more or ())), name=name, output_transform=self.output_transform
            )
            return checked(Z, output if self.prediction_transform is None else self.prediction_transform(output), name)

    def _refuse_whole(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None) -> None:
        """Raise where an additional argument has a row for each example by chance."""
        model = unwrap(self.model)
        name, module = find_layer(model, self.layer)

        def read(x: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
            copies, others = copied(x, more)
            arguments = (*copies, *(others or ()))
            Z, output = read_layer(model, module, arguments, name=name, output_transform=self.output_transform)
            return Z, output if self.prediction_transform is None else self.prediction_transform(output)

        with torch.inference_mode(False), untouched(model), torch.no_grad():
            refuse_whole_arguments(read, inputs, additional or ())

    def _maps(
        self,
        inputs: tuple[Tensor, ...],
        explained: _Explained,
        feature: int | None,
        internal_batch_size: int | None,
        settings: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """Draw the maps of all examples, with one network for each of their explainers."""
        widths = [explainer.form.n_features for explainer in explained.explainers]
        features = _features(feature, max(widths))
        model = unwrap(self.model)
        name, module = find_layer(model, self.layer)
        first = rows_of(inputs, explained.additional, torch.tensor([0]))
        ran = trace(model, module, (*first[0], *(first[1] or ())), name=name)

        def drawn() -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
            for width, rows in grouped(widths):  # as many maps of each example at once
                own = [k for k in features if k < width]
                some = [(explained.explainers[i], explained.targets[i]) for i in rows]
                x, more = rows_of(inputs, explained.additional, torch.tensor(rows))
                slopes = explained.slopes[torch.tensor(rows).to(explained.slopes.device)]
                parts = list(self._parts(some, own or [0], slopes, ran))
                maps = draw(self.heatmap, parts, x, more, internal_batch_size, _of_rows(settings, widths, rows))
                yield rows, tuple(_padded(m if own else m[:, :0], len(features)) for m in maps)

        maps = gathered(drawn(), len(widths))
        return maps if feature is None else in_shape_of(inputs, maps)

    def _parts(
        self, explainers: Sequence[tuple[Explainer, Target]], features: list[int], slopes: Tensor, ran: Trace
    ) -> Iterator[Part]:
        """Yield the networks that draw the maps of some examples."""
        model = unwrap(self.model)
        for (explainer, target), rows in grouped(explainers):
            form = explainer.form
            if isinstance(form, ContributionGroups):
                network: ExplanationNetwork = ContributionNetwork(form, self._tail(), target, trace=ran)
                yield Part(network, features, rows, slopes[rows])
            else:
                layer = find_layer(model, self.layer)[1]
                network = ExplanationNetwork(model, layer, form, trace=ran, output_transform=self.output_transform)
                yield Part(network, features, rows)

    def one_heatmap(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        feature: Literal[0] | None = None,
        internal_batch_size: int | None = None,
        **heatmap_kwargs: Any,
    ) -> Any:
        """Draw the 1-Heatmap: the single map of the model's own output, which the x-features' maps split.

        It comes from the same backend, needs no fit, and is what :class:`captum_xnn.OneHeatmap` gives.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: Which output to explain, for all examples or for each, as everywhere in Captum.
            additional_forward_args: Further positional arguments of the model.
            feature: 0 for a map in exactly the input's shape.
            internal_batch_size: Maps computed at once, which bounds the memory.
            heatmap_kwargs: Settings for this call of the heatmap backend.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, (N, 1, ...) for each input.
        """
        backend: Heatmap = self.heatmap
        if isinstance(backend, DefaultMaps):
            fitted = self.explainers_.values()
            exact = any(e.is_exact for e in fitted) if fitted else self._is_exact
            backend = backend.of_groups if exact else backend.of_networks
        one = OneHeatmap(self.model, backend, prediction_transform=self.prediction_transform)
        return one.attribute(
            inputs,
            target,
            additional_forward_args,
            feature=feature,
            internal_batch_size=internal_batch_size,
            **heatmap_kwargs,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save all fitted explainers of the current layer to a folder, overwrite its contents, and return its path.

        Saved are weights (safetensors), layer, targets, settings and a fingerprint of the model (JSON); not the model
        itself, the heatmap backend, or functions such as output_transform. A crash leaves the old files whole.

        Args:
            path: A folder; made if need be.

        Raises:
            NotFittedError: If nothing was fitted.
        """
        model = unwrap(self.model)
        name = find_layer(model, self.layer)[0]
        explainers = [e for (layer, _), e in self.explainers_.items() if layer == name]
        if not explainers:
            raise NotFittedError(
                f"expected fitted explainers of layer {name!r} to save, have none; call xnn.fit(data, target=...)"
            )
        manifest = {
            "layer": name,
            "n_features": self.n_features,
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "transforms": [k for k in _TRANSFORMS if getattr(self, k) is not None],
            "fingerprint": _serialization.fingerprint(model, name),
            "explainers": [e.entry() for e in explainers],
        }
        tensors = {f"{i}.{key}": t for i, e in enumerate(explainers) for key, t in e.form.state_dict().items()}
        return _serialization.write(path, manifest, tensors)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        strict: bool = True,
        forms: Sequence[type[Autoencoder]] = (),
        **settings: Any,
    ) -> XNNAttribution:
        """Load saved explainers onto the model they were fitted to.

        Args:
            path: The folder.
            model: The model, in which the layer is found by its name.
            strict: Whether a model that differs from the saved fingerprint is an error rather than a warning. A missing
                layer is an error in any case, and a layer whose output has another shape raises when it is explained.
            forms: Classes of explanation networks that are not this package's own, if some of the saved ones are of
                these. A file names its classes, but none is imported, as that would run foreign code.
            settings: Arguments of the constructor that are not saved: heatmap, train_data, unpack, output_transform,
                prediction_transform, device_ids.

        Raises:
            ExplainerFileError: If files are missing, truncated, or foreign.
            ModelMismatchError: If the model differs; the message says in what.
        """
        manifest, tensors = _serialization.read(path)
        try:
            saved = _Saved.of(manifest, tensors, forms)
        except ExplainerFileError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ExplainerFileError(
                f"expected a complete explainer in {str(path)!r}, got one with entries missing or damaged ({error}); "
                "save it anew with XNNAttribution.save"
            ) from error
        plain = unwrap(model)
        if saved.layer not in dict(plain.named_modules()):
            raise ModelMismatchError(
                f"expected a model with the explained layer {saved.layer!r}, got {type(plain).__name__} without it; "
                f"the explainers were fitted to a {saved.fingerprint['model_class']}"
            )
        without = [k for k in saved.transforms if settings.get(k) is None]
        if without:
            raise TypeError(
                f"expected {' and '.join(f'{k}=' for k in without)}, which these explainers were fitted with and "
                "which cannot be saved; pass the same function again to load"
            )
        _check_model(
            _serialization.differences(saved.fingerprint, _serialization.fingerprint(plain, saved.layer)), strict
        )
        # If the layer is the whole model, its name is empty and cannot be looked up.
        xnn = cls(model, saved.layer or plain, saved.n_features, recipe=saved.recipe, seed=saved.seed, **settings)
        device = _device(plain)
        for explainer in saved.explainers:
            explainer.form.to(device)
            xnn.explainers_[saved.layer, explainer.targets] = explainer
        return xnn


# Standard deviations of the output that contributions may miss without a warning.
_NOTABLE = 0.005

# Standard deviations of the output by which a surrogate errs when too many x-features are asked of a layer.
_OFF = 0.02

# Weights of an explanation network, in all and for each example, above which a fit warns of its size.
_MANY, _MANY_EACH = 20_000_000, 1000

_TRANSFORMS = ("output_transform", "prediction_transform")

Log = Callable[[Any, Step], None]


class _Run(NamedTuple):
    """Settings of a fit that do not change its result: progress, checkpoint, log, processes."""

    progress: bool
    checkpoint: Checkpoint | None
    log: Log | None
    ranks: Ranks

    def logging(self, targets: tuple[Target, ...]) -> Callable[[Step], None] | None:
        """Return the callback that receives the records of one explainer."""
        if self.log is None:
            return None
        return partial(self.log, targets[0] if len(targets) == 1 else targets)


class _Explained(NamedTuple):
    """All of an explanation but its maps."""

    targets: list[Target]
    explainers: list[Explainer]
    additional: tuple[Any, ...] | None
    features: Tensor
    contributions: Tensor
    bias: Tensor
    surrogate: Tensor
    slopes: Tensor
    prediction: Tensor


class _Saved(NamedTuple):
    """What a folder of saved explainers holds."""

    layer: str
    n_features: int
    seed: int
    recipe: Recipe
    transforms: list[str]
    fingerprint: dict[str, Any]
    explainers: list[Explainer]

    @classmethod
    def of(cls, manifest: dict[str, Any], tensors: dict[str, Tensor], forms: Sequence[type[Autoencoder]]) -> _Saved:
        """Parse a manifest. A damaged one raises errors of several kinds."""
        name, transforms, n_features = manifest["layer"], manifest["transforms"], manifest["n_features"]
        if not isinstance(name, str) or type(n_features) is not int or n_features < 1:
            raise ValueError(f"layer is {name!r} and n_features is {n_features!r}")
        if not isinstance(transforms, list) or any(k not in _TRANSFORMS for k in transforms):
            raise ValueError(f"transforms are {transforms!r}, expected some of {', '.join(_TRANSFORMS)}")
        _serialization.check_fingerprint(manifest["fingerprint"])
        explainers = []
        # torch draws weights at construction, and these are replaced.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            for i, entry in enumerate(manifest["explainers"]):
                own = {key.removeprefix(f"{i}."): t for key, t in tensors.items() if key.startswith(f"{i}.")}
                explainers.append(Explainer.restored(entry, own, name, forms=forms))
        return cls(
            layer=name,
            n_features=n_features,
            seed=int(manifest["seed"]),
            recipe=Recipe(**manifest["recipe"]),
            transforms=transforms,
            fingerprint=manifest["fingerprint"],
            explainers=explainers,
        )


def _check_model(told: list[str], strict: bool) -> None:
    """Raise or warn if a model differs from the one an explainer was fitted to."""
    if not told:
        return
    message = (
        f"expected the model that the explainers were fitted to, got one that differs: {'; '.join(told)}. "
        "Load that model's weights first, or fit anew"
    )
    if strict:
        raise ModelMismatchError(message + "; strict=False loads all the same")
    warnings.warn(message, stacklevel=3)


def _check_shape(Z: Tensor, explainer: Explainer) -> None:
    """Raise if a layer's output lacks the shape that an explainer was fitted to."""
    form, shape = explainer.form, explainer.form.config["shape"]
    fits = Z[0].numel() == shape if isinstance(shape, int) else list(Z.shape[1:]) == list(shape)
    if isinstance(form, ContributionGroups):  # the number of places is free
        fits = Z.dim() - 1 == form.base.dim() and all(
            size == own or own == 1 for size, own in zip(Z.shape[1:], form.base.shape, strict=True)
        )
    if not fits:
        raise ModelMismatchError(
            f"expected layer {explainer.layer!r} to give {shape} values per example, as when the explainer was fitted, "
            f"got {tuple(Z.shape[1:])}; pass inputs of the size it was fitted to, or fit anew"
        )


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _warn_of_unexplained(form: Any, evidence: Evidence, targets: tuple[Target, ...], layer: str) -> None:
    """Warn where contributions fail to add up although intervals have doubled as often as they may."""
    if form.dtype not in (torch.float32, torch.float64):
        return
    off = evidence.unexplained.double().abs() / form.scale[:, None].double().cpu()
    # A tolerance near rounding is the user's wish and not the integral's failure.
    missed = off > max(2 * form.config["tolerance"], _NOTABLE)
    if bool(missed.any()):
        warnings.warn(
            f"contributions to target {', '.join(map(str, targets))} at layer {layer!r} miss the output by up to "
            f"{float(off.max()):.1%} of its standard deviation, in {int(missed.any(0).sum())} of {missed.shape[1]} "
            f"examples, after {form.config['most']} intervals; choose a later layer, or pass "
            f"autoencoder=functools.partial(ContributionGroups, most={2 * form.config['most']})",
            stacklevel=levels_up(),
        )


def _warn_of_few_directions(found: Activations, K: int, error: float) -> None:
    """Warn if a form has over twice as many x-features as its layer has directions, and its surrogate is off."""
    if error < _OFF or K < 3 or (count := directions(found.Z)) * 2 >= K:
        return
    warnings.warn(
        f"n_features is {K}, and 99 % of the variance of layer {found.layer!r} lies in {count} "
        f"direction{'s' * (count > 1)}: more x-features follow what is left, and the surrogate is off by {error:.1%} "
        f"of the output's standard deviation. Pass n_features={count}, choose an earlier layer, or leave autoencoder= "
        "out, as contributions always add up",
        stacklevel=levels_up(),
    )


def _warn_of_size(make: Callable[[], Form], shape: tuple[int, ...], examples: int, layer: str) -> None:
    """Warn, before it takes the memory, of a network with far more weights than examples can teach."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            weights = sum(p.numel() for p in make().parameters())
    except Exception:
        return  # a form of the user's own, which may want real numbers
    if weights <= max(_MANY, _MANY_EACH * examples):
        return
    warnings.warn(
        f"the explanation network of layer {layer!r} has {weights / 1e6:.0f} million weights for {examples} examples, "
        f"about {16 * weights / 1e9:.1f} GB while it learns, as Z has {shape} numbers per example; leave autoencoder= "
        "out (groups of contributions weigh channels only), read one token or the mean, as in "
        "output_transform=lambda output: output[:, 0], or pass autoencoder=ConvSRAE for feature maps",
        stacklevel=levels_up(),
    )


def _of_network(form: Any, Z: Tensor, output: int, sloping: bool) -> tuple[Tensor, ...]:
    """Return the numbers of some examples by a learned network."""
    E = form.encode(Z.to(form.dtype))
    slopes = torch.zeros_like(Z, dtype=E.dtype) if sloping else E[:, :0]
    return E, form.contributions(E, output), form.head.bias[output].expand(len(E)), form.head(E)[:, output], slopes


def _padded(maps: Tensor, most: int) -> Tensor:
    """Return maps (N, K, ...) with empty ones for x-features that an explainer lacks, (N, most, ...)."""
    missing = most - maps.shape[1]
    return torch.cat([maps, maps.new_zeros(len(maps), missing, *maps.shape[2:])], 1) if missing else maps


def _of_rows(settings: dict[str, Any], all_rows: Sequence[Any], rows: list[int]) -> dict[str, Any]:
    return settings if len(rows) == len(all_rows) else rows_of_settings(settings, len(all_rows), rows)


def _wide(numbers: Tensor, most: int) -> Tensor:
    """Return numbers (N, K) with zeros for x-features that this explainer lacks, (N, most)."""
    return nn.functional.pad(numbers, (0, most - numbers.shape[1]))


def _features(feature: int | None, K: int) -> list[int]:
    if feature is None:
        return list(range(K))
    if not 0 <= operator.index(feature) < K:
        raise ValueError(f"expected an x-feature from 0 to {K - 1}, got {feature}; leave feature out for all of them")
    return [operator.index(feature)]


class _Outputs(NamedTuple):
    """What is learned of the model's outputs, from one pass over them: all of them may be too large for memory."""

    y: Tensor
    """The explained outputs, (M, C)."""
    targets: list[Target]
    """Which they are."""
    classes: Tensor | None
    """The class that the model gives each example, (M,); None where outputs are no classes."""
    spread: Spread
    """Whether all outputs look like logits."""

    @classmethod
    def of(cls, found: Activations, targets: list[Target]) -> _Outputs:
        targets, y_hat, asked = list(dict.fromkeys(targets)), found.y_hat, found.asked
        if asked is not None and asked.spread is not None:
            return cls(y_hat[:][:, [asked.targets.index(t) for t in targets]], targets, None, asked.spread)
        y, first, given, spread = torch.empty(len(y_hat), len(targets), dtype=y_hat.dtype), 0, [], Spread()
        for part in parts(y_hat):
            y[first : first + len(part)] = torch.stack([select(part, t) for t in targets], 1)
            first += len(part)
            classes = predicted_classes(part)
            given += [] if classes is None else [classes]
            spread.add(part)
        return cls(y, targets, torch.cat(given) if given else None, spread)

    def columns(self, targets: tuple[Target, ...]) -> Tensor:
        """Select some of the explained outputs, (M, C)."""
        return self.y[:, [self.targets.index(t) for t in targets]]


def _same_classes(y_hat: Tensor | Rows, y_bar: Tensor, target: int) -> float:
    """Compute F_cls, part by part."""
    first, same = 0, 0.0
    for part in parts(y_hat):
        given = y_bar[first : first + len(part)]
        same += classification_faithfulness(part, given, target) * len(part)
        first += len(part)
    return same / first


def _check_positives(positives: Any, M: int) -> None:
    if not isinstance(positives, Tensor):
        raise TypeError(
            f"positives are a {type(positives).__name__}; pass a boolean tensor ({M},), as in torch.tensor(positives)"
        )
    if positives.shape != (M,) or positives.dtype != torch.bool:
        raise ValueError(
            f"expected positives as a boolean tensor ({M},), got {positives.dtype} {tuple(positives.shape)}; mark each "
            "example of the class True"
        )


def _own_positives(given: Tensor | None, targets: tuple[Target, ...]) -> Tensor | None:
    """Mark the examples to which the model gives one of the classes, (M,); None if outputs are no classes."""
    if given is None or not all(isinstance(t, int) for t in targets):
        return None
    positives = torch.isin(given, torch.tensor(targets))
    if not bool(positives.any()):
        raise ValueError(
            f"expected examples that the model gives class {', '.join(map(str, targets))}, got none of {len(given)}; "
            "add such examples to the data, or, if the outputs are no classes, weight all examples alike with "
            f"positives=torch.ones({len(given)}, dtype=torch.bool)"
        )
    return positives


def _error_floor(y: Tensor, n: int) -> float | None:
    """Compute the least mean squared error, summed over outputs, of n x-features with a linear head, if C > n."""
    if y.shape[1] <= n:
        return None
    floor = error_floor(y, n)
    warnings.warn(
        f"expected at least as many x-features as jointly explained outputs, got {n} for {y.shape[1]}; no x-features "
        f"can bring the mean squared error below {floor:.3g}. Raise n_features to {y.shape[1]} or explain fewer",
        stacklevel=4,
    )
    return floor
