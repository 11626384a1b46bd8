r"""XNNAttribution: x-features of any layer of any trained model, with a map and a signed contribution for each.

Conventions:
    N examples, K x-features. Targets are those of Captum: None, an int, or a tuple of ints that indexes the output's
    dimensions after the batch. A list or a 1-D tensor gives each example its own target.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021.
"""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from captum.attr import Attribution, LayerAttribution
from torch import Tensor, nn

from captum_xnn import _serialization
from captum_xnn._distributed import ALONE, Ranks
from captum_xnn.activations._activations import Activations, Asked, Outputs, check_positives
from captum_xnn.activations._batches import repeatable
from captum_xnn.activations._collecting import activations_of
from captum_xnn.activations._memmap import chunks
from captum_xnn.activations._unpacking import Unpack, first_of_batch, unpack_for
from captum_xnn.errors import NotFittedError
from captum_xnn.explainer import Explainer, Explainers
from captum_xnn.explanation import Contributions, Explanation, middle_cut
from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._feature_maps import EarlierCalls, Explained, FeatureMaps, backend_of
from captum_xnn.heatmaps._from_captum import as_heatmap
from captum_xnn.heatmaps._group_maps import ContributionMaps
from captum_xnn.heatmaps._heatmap import DefaultMaps, Heatmap
from captum_xnn.heatmaps._numbers import Examples
from captum_xnn.heatmaps._output_maps import OutputMaps
from captum_xnn.layers._arguments import as_int, batch_size, copied, like, refuse_too_many, refuse_uncallable
from captum_xnn.layers._fingerprint import WeightSamples, fingerprint
from captum_xnn.layers._forward_args import log_usage
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._read import OutputTransform
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._targets import Target, are_positive, one_target, per_example, targets_by_explainer
from captum_xnn.metrics._faithfulness import Faithfulness
from captum_xnn.models._base import Autoencoder
from captum_xnn.models._form import MakeForm, refuse_no_maker
from captum_xnn.training._checkpoint import Checkpoint
from captum_xnn.training._layer_fit import LayerFit, Log, is_exact
from captum_xnn.training._recipe import Recipe

__all__ = ["XNNAttribution"]


class XNNAttribution(LayerAttribution):  # type: ignore[misc]
    r"""Attribution maps of a few x-features, whose signed contributions add up to the model's output.

    The x-features E of a layer's output Z add up to the prediction: :math:`\hat y = b + \sum_i v_i E_i`. For the
    default form the sum is exact up to the error of a path integral. For a learned form it is an approximation. Any
    Captum method can draw the heatmaps. :meth:`fit` learns the x-features. :meth:`attribute` draws their maps, as
    Captum's classes do. :meth:`explain` draws the maps and computes all numbers.

    Args:
        model: Any trained module that runs as Python code. The library leaves it unchanged.
        layer: The layer to explain, by dotted name or as a module. Its **output** is Z. A learned form with few
            x-features is more faithful at a layer closer to the model's output.
        n_features: Number of x-features K for each explainer.
        heatmap: A Captum class, or a backend such as ``FromCaptum(DeepLift, baselines=...)``. The default for groups of
            contributions shows the contribution of each place of the layer
            (:class:`~captum_xnn.heatmaps.ContributionMaps`), or gradient x activation at feature maps before it. The
            default for learned networks is contrastive excitation backprop
            (:class:`~captum_xnn.heatmaps.ExcitationMaps`).
        autoencoder: Makes the explanation network from ``(shape of Z, n_features, n_outputs=...)``. The default is
            :class:`~captum_xnn.models.ContributionGroups`, an exact form. Others are ``SRAE``, the paper's learned
            form, ``functools.partial(ConvSRAE, hidden=(64,), pool=3)``, and the :mod:`~captum_xnn.models.baselines`.
        recipe: Settings of the training of learned networks.
        train_data: Training data, as :meth:`fit` takes them. A target without an explainer is fitted on them when it is
            first explained.
        unpack: Turns a batch of the training data into (inputs, additional_forward_args). The default passes the
            entries of a dict to the model's arguments of the same names, and takes the first entry of a tuple or list.
        output_transform: Turns the layer's raw output, such as a tuple or dict, into one tensor (N, ...).
        prediction_transform: Turns the model's raw output into one tensor (N, ...).
        seed: Seeds every fit.
        device_ids: Accepted as in Captum, and not used: the model runs on its own device, without wrappers such as
            DataParallel.

    Raises:
        LayerNotFoundError: If the model has no such layer.
        TypeError: If the model is not a module, the model is scripted, or the autoencoder cannot be called.

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
        heatmap: type[Attribution] | Heatmap | DefaultMaps | None = None,
        autoencoder: MakeForm | None = None,
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
            raise ValueError(f"n_features is {n_features}; pass at least 1 x-feature (the paper uses 5)")
        refuse_no_maker(autoencoder)
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(
                f"recipe is {recipe!r}, a {type(recipe).__name__}; pass captum_xnn.Recipe(steps=...), or leave it out"
            )
        refuse_uncallable("unpack", unpack, "lambda batch: (batch[0], None)")
        refuse_uncallable("output_transform", output_transform, "lambda output: output[0]")
        refuse_uncallable("prediction_transform", prediction_transform, "lambda output: output['logits']")
        self.model = model
        self.n_features = operator.index(n_features)
        self.heatmap = _backends(heatmap)
        self.autoencoder = autoencoder
        self.recipe = recipe or Recipe()
        self.train_data = train_data
        self.unpack = unpack_for(model, unpack)
        self.output_transform = output_transform
        self.prediction_transform = prediction_transform
        self.seed = as_int("seed", seed, None, "0")
        self.explainers_ = Explainers()
        self._earlier = EarlierCalls()

    def __repr__(self) -> str:
        model = unwrap(self.model)
        name = find_layer(model, self.layer)[0]
        head = (
            f"XNNAttribution of a {type(model).__name__} at layer {middle_cut(name, 40)!r}: "
            f"{self.n_features} x-feature{'s' * (self.n_features != 1)} for each explainer"
        )
        return "\n  ".join([head, *self.explainers_.lines(name)])

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
        """Fit an explainer for each target, or one for all targets, and return this object.

        The model runs on the data once for all targets, and explainers are fitted together. A fit uses no labels.
        Positives are the examples to which the model itself gives the class. Learned forms train on them more often.

        Args:
            data: Inputs as a tensor (M, ...), as a tuple of tensors for a model with several inputs, as an iterable of
                batches that hold the inputs first, such as a DataLoader, or as a data set of such examples. Also
                activations that were collected before (:class:`~captum_xnn.activations.Activations`); the model then
                does not run on all data again.
            target: One output of the model (None, int, or tuple of ints), or a list or range of outputs. Each output of
                a list gets its own explainer.
            joint: Explain all targets of the list or tuple by one set of x-features.
            positives: Boolean (M,), in place of the model's own decisions. All True weights every example alike; use it
                where the outputs are not classes.
            store: A folder for activations that do not fit in memory. The fit collects into it and reads from it; it
                does not collect again what the folder holds (:func:`~captum_xnn.activations.collect`). The folder keeps
                contributions too. A later fit to the same outputs, with any ``n_features``, reads them and does not run
                the model.
            checkpoint: A folder for the state of the fit, written every minute, or after every 16 outputs for groups of
                contributions. After an interruption, the same call resumes the fit and gives the same numbers as an
                uninterrupted one.
            log: For learned forms: a function that the fit calls with the target, or the tuple of targets, and every
                new record of the history (:mod:`captum_xnn.training._logs`). Records are sent with each checkpoint, so
                a resumed fit never repeats one.
            distributed: Whether the processes of the default group of ``torch.distributed`` fit together, as under
                torchrun. All processes make the same call with the same data, and get the same explainers. Store and
                checkpoint must be in folders that all processes share.
            progress: Whether to show progress bars.

        Raises:
            ValueError: If a fit cannot use the data or the outputs, as after a softmax; the message says why, and what
                to do.
            RuntimeError: If ``distributed`` is set outside of a group of processes.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
            >>> data = torch.randn(300, 6)
            >>> xnn = XNNAttribution(model, "1", n_features=3, recipe=Recipe(steps=50))
            >>> len(xnn.fit(data, target=[0, 1], progress=False).explainers_)
            2
        """
        by_explainer = targets_by_explainer(target, joint)
        ranks = Ranks.here() if distributed else ALONE
        if is_exact(self.autoencoder):
            self._reader().tail()  # raises for a layer without contributions before all data run through the model
            data = data if isinstance(data, Activations) else repeatable(data)
        if positives is not None:
            check_positives(positives, data)
        asked = [t for targets in by_explainer for t in targets]
        activations = self._activations_of(
            data, store, Asked(asked, gradients=is_exact(self.autoencoder)), ranks, progress
        )
        outputs = Outputs.of(activations, asked)
        if self.prediction_transform is None:
            outputs.refuse_softmax()
        if ranks.first:
            outputs.warn_unless_logits()
        layer_fit = LayerFit(
            self.autoencoder,
            self.n_features,
            self.recipe,
            self.seed,
            progress=progress and ranks.first,
            checkpoint=Checkpoint(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint,
            log=log,
            ranks=ranks,
        )
        weights = WeightSamples.of(unwrap(self.model))
        with torch.inference_mode(False):
            # Explainers with the same number of outputs are fitted together.
            for size in dict.fromkeys(map(len, by_explainer)):
                tasks = [outputs.task(targets, positives) for targets in by_explainer if len(targets) == size]
                for fitted in layer_fit.fit(tasks, activations, self._reader()):
                    self.explainers_[activations.layer, fitted.targets] = Explainer(
                        activations.layer, **fitted._asdict(), weights=weights
                    )
        return self

    def _activations_of(
        self,
        data: Any,
        store: str | os.PathLike[str] | None,
        asked: Asked,
        ranks: Ranks = ALONE,
        progress: bool = False,
    ) -> Activations:
        """Collect the layer's activations and the model's outputs on some data, or check those collected before."""
        return activations_of(
            self._reader(), data, unpack=self.unpack, store=store, asked=asked, ranks=ranks, progress=progress
        )

    def _reader(self) -> Reader:
        """Make the reader of the explained layer."""
        return Reader.of(self.model, self.layer, self.output_transform, self.prediction_transform)

    def explainer(self, target: Any = None, *, against: Any = None) -> Explainer:
        """Find the explainer of an output: its own, or else a joint one that covers it. Fit it if it is missing.

        Args:
            target: None, int, or tuple of ints.
            against: The output to subtract, as in :meth:`attribute`.

        Raises:
            NotFittedError: If the output has no explainer, and there are no train_data to fit one on.
        """
        if isinstance(target, (list, range)) or (isinstance(target, Tensor) and target.numel() > 1):
            many = list(target) if isinstance(target, range) else target
            each = ", ".join(map(str, many.tolist() if isinstance(many, Tensor) else many))
            raise ValueError(
                f"target is the list of {each}, and every explainer has one target or a tuple of ints for one output; "
                "pass one at a time, as in {t: xnn.score(data, t) for t in targets}"
            )
        return self._found_or_fitted([one_target(target, against)])[0]

    def _found_or_fitted(self, targets: Sequence[Target]) -> list[Explainer]:
        """Find an explainer for each target; fit missing explainers on train_data, or raise without train_data."""
        name = find_layer(unwrap(self.model), self.layer)[0]
        missing = [t for t in dict.fromkeys(targets) if self.explainers_.covering(name, t) is None]
        if missing:
            for some, joint in self.explainers_.fits_for(name, missing, is_exact(self.autoencoder)):
                if self.train_data is None:
                    raise self.explainers_.not_fitted(name, some, joint)
                self.fit(self.train_data, some, joint=joint)
        covering = [self.explainers_.covering(name, t) for t in targets]
        return [explainer for explainer in covering if explainer is not None]  # by now, all targets are covered

    def _examples(self, inputs: Any, target: Any, additional_forward_args: Any, against: Any) -> Examples:
        """Copy the arguments of a call, and find the explainer of each example; fit missing explainers."""
        refuse_too_many(unwrap(self.model), inputs, "join them, torch.cat(batches)")
        tensors, additional = copied(inputs, additional_forward_args)
        targets, reader = per_example(target, len(tensors[0]), against), self._reader()
        reader.refuse_whole(tensors, additional)
        if any(self.explainers_.covering(reader.name, t) is None for t in dict.fromkeys(targets)):
            reader.refuse_targets(dict.fromkeys(targets), tensors, additional)  # before a fit, which takes long
        fitted = self._found_or_fitted(targets)
        Explainers.warn_of_changed_weights(fitted, reader.model)
        choices = [e.choice(t) for e, t in zip(fitted, targets, strict=True)]
        return Examples(choices, reader, tensors, additional)

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        against: Any = None,
        feature: int | None = None,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        **heatmap_kwargs: Any,
    ) -> Any:
        r"""Draw one attribution map for each x-feature.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: The output to explain: one for all examples, or one for each, as in Captum.
            additional_forward_args: Further positional arguments of the model. They get no maps.
            against: The output to subtract: one for all examples, or one for each. The explanation is then of the
                difference of both outputs: why the target rather than this output? Groups of contributions are those
                of the target. A learned network needs a joint fit of both outputs.
            feature: Index of the only x-feature to draw; None draws all.
            internal_batch_size: Number of maps computed at once; smaller values need less memory.
            return_convergence_delta: Whether to return the unexplained part of the output as well.
            heatmap_kwargs: Settings for this call of the heatmap backend, such as ``n_steps=64``.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, or 2-element tuple of **attributions**, **delta**:

            - **attributions**: (N, K, ...) for each input, or exactly the input's shape with ``feature``. Methods that
              explain a layer give (N, K, 1, H, W) for images and (N, K, 1, D, H, W) for volumes. With ``feature`` such
              a map is divided equally among the channels, and a map of token ids is summed over the embedding's
              dimensions. Maps are detached, and have the input's dtype and device.
            - **delta** (N,): :math:`\hat y - \bar y`, in logits.

        Raises:
            NotFittedError: If a target was not fitted and there are no train_data.
            ValueError: If a target or the x-feature is out of range, or a layer's maps do not fit in the input's shape.
        """
        size = batch_size(internal_batch_size)
        maps, explained = FeatureMaps(self.heatmap, self._earlier).explain(
            self._examples(inputs, target, additional_forward_args, against),
            feature=feature,
            internal_batch_size=size,
            settings=heatmap_kwargs,
        )
        return (like(inputs, maps), explained.unexplained) if return_convergence_delta else like(inputs, maps)

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise NotImplementedError, as Captum's classes without futures do."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def compute_convergence_delta(
        self,
        attributions: Any,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        against: Any = None,
    ) -> Tensor:
        r"""Compute the unexplained part :math:`\hat y - \bar y` of each example's output, (N,), in logits.

        Args:
            attributions: Not used, because the delta measures the surrogate and not the maps.
            inputs: A tensor or a tuple of tensors.
            target: The explained output.
            additional_forward_args: Further positional arguments of the model.
            against: The output to subtract, if any.
        """
        del attributions
        return Explained.of(self._examples(inputs, target, additional_forward_args, against)).unexplained

    def explain(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        against: Any = None,
        one_heatmap: bool = False,
        internal_batch_size: int | None = None,
        **heatmap_kwargs: Any,
    ) -> Explanation:
        """Explain examples: maps, x-features, contributions, surrogate and prediction.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: The output to explain: one for all examples, or one for each, as in Captum.
            additional_forward_args: Further positional arguments of the model.
            against: As in :meth:`attribute`: why the target rather than this output.
            one_heatmap: Whether to draw the map of the model's own output as well, as :meth:`one_heatmap` does.
                :meth:`Explanation.show <captum_xnn.Explanation.show>` then draws it beside the image.
            internal_batch_size: Number of maps computed at once; smaller values need less memory.
            heatmap_kwargs: Settings for this call of the heatmap backend.

        Raises:
            NotFittedError: If a target was not fitted and there are no train_data.
            ValueError: If a target is out of range.
        """
        internal_batch_size = batch_size(internal_batch_size)
        one = None
        if one_heatmap:
            one = self.one_heatmap(
                inputs,
                target,
                additional_forward_args,
                against=against,
                internal_batch_size=internal_batch_size,
                **heatmap_kwargs,
            )
        why, _ = self._explain_and_read(
            inputs, target, additional_forward_args, internal_batch_size, against=against, **heatmap_kwargs
        )
        return why if one is None else replace(why, one_heatmap=one)

    def _explain_and_read(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        internal_batch_size: int | None = None,
        *,
        against: Any = None,
        **heatmap_kwargs: Any,
    ) -> tuple[Explanation, Tensor]:
        """Explain examples, and return all outputs of the model that the same pass gave, (N, ...).

        With an ``internal_batch_size`` below N, the outputs are those of the first examples only.
        """
        examples = self._examples(inputs, target, additional_forward_args, against)
        maps, explained = FeatureMaps(self.heatmap, self._earlier).explain(
            examples, internal_batch_size=internal_batch_size, settings=heatmap_kwargs
        )
        numbers = explained.numbers
        why = Explanation(
            inputs=inputs,
            maps=like(inputs, maps),
            features=numbers.features,
            contributions=numbers.contributions,
            bias=numbers.bias,
            surrogate=numbers.surrogate,
            prediction=explained.prediction,
            target=tuple(examples.targets),
            layer=examples.reader.name,
            is_positive=are_positive(explained.reading.y_hat, examples.targets),
        )
        return why, explained.reading.y_hat

    def report(
        self, inputs: Any, path: str | os.PathLike[str] = "report.html", target: Any = None, **options: Any
    ) -> Path:
        """Write a report about some inputs as one HTML page, and return its path.

        Args:
            inputs: Inputs to explain: a tensor or an iterable of batches, as :meth:`fit` takes them, or a data set.
            path: Path of the page.
            target: The explained output, or a list of outputs.
            options: Fields of :class:`captum_xnn.report.ReportOptions`, such as ``class_names=`` or ``title=``.

        Raises:
            NotFittedError: If a target was not fitted and there are no train_data.
            ImportError: If jinja2 or pillow is missing.
            ValueError: If the path is a folder, an option does not fit the inputs, or the model gives the class to none
                of the data.
        """
        from captum_xnn.report._options import ReportOptions
        from captum_xnn.report._page import write_report

        return write_report(path, self, inputs, target, ReportOptions(**options))

    def contributions(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        against: Any = None,
        internal_batch_size: int | None = None,
    ) -> Contributions:
        """Compute the numbers of :meth:`explain` without drawing maps.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: The output to explain: one for all examples, or one for each, as in Captum.
            additional_forward_args: Further positional arguments of the model.
            against: As in :meth:`attribute`: why the target rather than this output.
            internal_batch_size: Number of examples explained at once; smaller values need less memory.

        Raises:
            NotFittedError: If a target was not fitted and there are no train_data.
            ValueError: If a target is out of range.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
            >>> xnn = XNNAttribution(model, "1", n_features=2).fit(torch.randn(300, 6), target=0, progress=False)
            >>> numbers = xnn.contributions(torch.ones(1, 6), target=0)
            >>> torch.allclose(numbers.bias + numbers.contributions.sum(1), model(torch.ones(1, 6))[:, 0], atol=1e-5)
            True
        """
        examples = self._examples(inputs, target, additional_forward_args, against)
        explained = Explained.of(examples, batch_size(internal_batch_size))
        return Contributions(*explained.numbers[:4], explained.prediction)

    def with_heatmap(self, heatmap: type[Attribution] | Heatmap | DefaultMaps | None) -> XNNAttribution:
        """Return a copy with the same explainers and another heatmap backend. Later fits of either serve both.

        Args:
            heatmap: A Captum class, a backend, or None for the default.
        """
        other = copy.copy(self)
        other.heatmap = _backends(heatmap)
        return other

    def score(
        self, data: Any, target: Any = None, *, against: Any = None, store: str | os.PathLike[str] | None = None
    ) -> Faithfulness:
        """Measure the faithfulness of a target's explainer on some data: F_reg and F_cls.

        Args:
            data: As :meth:`fit` takes them.
            target: None, int, or tuple of ints.
            against: The output to subtract, as in :meth:`attribute`. There is no F_cls of a difference.
            store: A folder for these data, as in :meth:`fit`. It must not be the folder of the training data.

        Raises:
            NotFittedError: If the target was not fitted and there are no train_data.
        """
        explainer, target = self.explainer(target, against=against), one_target(target, against)
        if explainer.is_exact and not isinstance(data, Activations):
            data = repeatable(data)
        activations = self._activations_of(data, store, Asked([target]))
        outputs = Outputs.of(activations, [target])
        predictions = outputs.columns([target])[:, 0]
        surrogate = explainer.numbers(target, activations, predictions, self._reader()).surrogate
        predictions = predictions.to(surrogate.dtype)
        if outputs.classes is None or not isinstance(target, int):
            return Faithfulness.of(surrogate, predictions)
        return Faithfulness.of(surrogate, predictions, chunks(activations.y_hat), target)

    def one_heatmap(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        against: Any = None,
        feature: Literal[0] | None = None,
        internal_batch_size: int | None = None,
        **heatmap_kwargs: Any,
    ) -> Any:
        """Draw the 1-Heatmap, the single map of the model's own output.

        The same backend draws it at the same layer. It needs no fit. Maps of gradient methods divide it, if everything
        passes through the layer. The default at a layer with feature maps
        (:class:`~captum_xnn.heatmaps.ContributionMaps`) does not: the 1-Heatmap is gradient x activation there, and the
        maps of x-features sum to the contributions. :class:`captum_xnn.OneHeatmap` draws the same map
        with ``before=`` this layer.

        Args:
            inputs: A tensor (N, ...) or a tuple of tensors, as the model takes them.
            target: The output to explain: one for all examples, or one for each, as in Captum.
            additional_forward_args: Further positional arguments of the model.
            against: The output to subtract, as in :meth:`attribute`.
            feature: 0 for a map in exactly the input's shape.
            internal_batch_size: Number of maps computed at once; smaller values need less memory.
            heatmap_kwargs: Settings for this call of the heatmap backend.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, (N, 1, ...) for each input.
        """
        fitted = self.explainers_.values()
        exact = any(e.is_exact for e in fitted) if fitted else is_exact(self.autoencoder)
        draws = OutputMaps(unwrap(self.model), backend_of(self.heatmap, exact), self.prediction_transform, self.layer)
        return draws.attribute(
            inputs,
            target,
            additional_forward_args,
            against=against,
            feature=feature,
            internal_batch_size=internal_batch_size,
            settings=heatmap_kwargs,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save all fitted explainers of the layer to a folder, overwrite its old explainers, and return its path.

        The folder gets the weights (safetensors), and layer, targets, settings and a fingerprint of the model (JSON).
        It gets neither the model nor the heatmap backend, and no functions such as output_transform. After a crash the
        old files are still whole.

        Args:
            path: The folder; created if it does not exist.

        Raises:
            NotFittedError: If the layer has no fitted explainers.
        """
        model = unwrap(self.model)
        name = find_layer(model, self.layer)[0]
        explainers = self.explainers_.at(name)
        if not explainers:
            raise NotFittedError(f"layer {name!r} has no fitted explainers to save; call xnn.fit(data, target=...)")
        Explainers.warn_of_changed_weights(explainers, model)
        return _serialization.SavedExplainers(
            layer=name,
            n_features=self.n_features,
            seed=self.seed,
            recipe=self.recipe,
            transforms=[k for k in _serialization.TRANSFORMS if getattr(self, k) is not None],
            fingerprint=fingerprint(model, name),
            explainers=explainers,
        ).write(path)

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
            strict: Whether to raise, rather than warn, if the model differs from the saved fingerprint. A missing layer
                always raises. A layer with an output of another shape raises when it is explained.
            forms: Your own classes of explanation network, if the folder holds networks of these classes. The file
                names its classes, but loading does not import them, because an import would run foreign code.
            settings: Arguments of the constructor that are not saved: heatmap, train_data, unpack, output_transform,
                prediction_transform, device_ids.

        Raises:
            ExplainerFileError: If files are missing, truncated, or not written by :meth:`save`.
            ModelMismatchError: If the model differs; the message lists the differences.
        """
        plain = unwrap(model)
        saved = _serialization.SavedExplainers.read(path, forms)
        saved.check(plain, settings, strict=strict)
        # If the layer is the whole model, its name is empty and cannot be looked up.
        xnn = cls(model, saved.layer or plain, saved.n_features, recipe=saved.recipe, seed=saved.seed, **settings)
        device, weights = xnn._reader().device, WeightSamples.of(plain)
        for explainer in saved.explainers:
            explainer.form.to(device)
            xnn.explainers_[saved.layer, explainer.targets] = replace(explainer, weights=weights)
        return xnn


def _backends(heatmap: type[Attribution] | Heatmap | DefaultMaps | None) -> Heatmap | DefaultMaps:
    """Turn the argument ``heatmap=`` into one backend for all forms, or into the default ones."""
    if heatmap is None:
        return DefaultMaps(ContributionMaps(), ExcitationMaps())
    return heatmap if isinstance(heatmap, DefaultMaps) else as_heatmap(heatmap)
