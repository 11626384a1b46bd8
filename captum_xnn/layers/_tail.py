"""The rest of a model from one layer on, as a function of that layer's output.

A forward hook replaces the layer's output, and the model continues as usual. The result therefore includes skips across
the layer, further inputs and keyword arguments, and functional code, as in the model itself.

If the rest of the model depends on the layer's output alone, the hook returns many points for each example, and the
modules before the layer run once. If other values bypass the layer, as in a residual block, the inputs are repeated
instead. The tail finds out by a trial: it puts the layer's own output back, and compares the result with the model's
own output.

Conventions:
    N examples, S points for each, Z (N, ...) the layer's output. Points lie on the line from a base to Z; t = 0 is the
    base and t = 1 is Z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn.layers._batching import pieces, rows_of
from captum_xnn.layers._hooks import hooked
from captum_xnn.layers._lookup import find_layer, quantised, unwrap
from captum_xnn.layers._prefix import Prefix
from captum_xnn.layers._read import EveryCall, OutputTransform, not_reached, run_to_layer
from captum_xnn.layers._selection import Selection
from captum_xnn.layers._state import eager
from captum_xnn.layers._targets import Target, select_each

__all__ = ["Points", "Tail", "frozen"]

# Most bytes of Z, and most rows, that the model's rest takes at once; a bound on memory, not on speed.
_BYTES, _ROWS = 1 << 26, 1024
# Errors that a model raises where the number of points does not fit other values that bypass the layer.
_MISFITS = (RuntimeError, ValueError, IndexError, AssertionError)


class Points(NamedTuple):
    """Outputs at points between the base and Z, and their derivatives by the layer's output."""

    y: Tensor
    """Explained outputs, (C, S, N)."""
    gradient: Tensor
    """Weighted sum over the points of their derivatives by the layer's output, (C, N, ...)."""
    Z: Tensor
    """The layer's own output, (N, ...)."""


class _Line(NamedTuple):
    """The model's inputs, and the points on a line at which its layer's output is set."""

    inputs: tuple[Tensor, ...]
    additional: tuple[Any, ...] | None
    rows: Tensor
    """Rows of the inputs, (N,)."""
    base: Tensor
    ts: Tensor
    weights: Tensor
    targets: Sequence[Sequence[Target]]
    Z: Tensor | None
    """The layer's own output for these rows, if known."""


class Tail:
    """Runs the rest of a model on changed outputs of one layer.

    Args:
        model: The explained model, used in its present state; call within :func:`captum_xnn.layers._state.untouched`.
        layer: The layer, by dotted name or as a module.
        output_transform: Turns the layer's raw output into one tensor (N, ...). It may pick and rearrange numbers, but
            not calculate with them.
        prediction_transform: Turns the model's raw output into one tensor (N, ...).
        prefix: Outputs of the modules up to the layer for the one example that the tail is called with.

    Raises:
        LayerNotFoundError: If the model has no such layer.
        ValueError: If all calls of the layer are to be explained.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> tail, x = Tail(model, "0"), torch.ones(3, 2)
        >>> found = tail.along((x,), None, torch.zeros(2), torch.tensor([0.0, 1.0]), torch.ones(2), [[0] * 3])
        >>> torch.allclose(found.y[0, 1], model(x)[:, 0])
        True
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module,
        *,
        output_transform: OutputTransform | None = None,
        prediction_transform: OutputTransform | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.name, self.layer = find_layer(self.model, layer)
        if isinstance(output_transform, EveryCall):
            raise ValueError(
                f"EveryCall explains all calls of layer {self.name!r}, but groups of contributions explain one call; "
                "fit with autoencoder=SRAE, or choose a layer behind the calls"
            )
        self.output_transform = output_transform
        self.prediction_transform = prediction_transform
        self._given = prefix if prefix is not None and prefix.is_complete else None
        self._shapes: list[torch.Size] | None
        self.calls = 1
        """How often a pass calls the layer, as far as is known; the last call counts."""
        self.forget()

    def fresh(self) -> Tail:
        """Make a tail of the same layer that knows nothing about the model, for a trial."""
        return Tail(
            self.model,
            self.name,
            output_transform=self.output_transform,
            prediction_transform=self.prediction_transform,
        )

    def forget(self) -> None:
        """Forget findings about the model, so that the next numbers do not depend on earlier calls, bit for bit."""
        self._inputs_once: bool | None = None if self.output_transform is None else False
        self._bytes: int | None = None
        self.layer_decides: bool | None = None
        """Whether the layer's output alone decides the model's output; None while unknown."""
        self.prefix, self._shapes = self._given, None

    def keep_prefix(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None) -> None:
        """Keep the outputs of the modules before the layer on one example, so that later calls do not run them.

        They stand in for those of all examples of the same shape where Z is known. That is right where the layer's
        output alone decides the model's output.

        Args:
            inputs: Tensors (1, ...).
            additional: Further arguments of the model.
        """
        prefix = Prefix(self.model, self.layer)
        x, more = rows_of(inputs, additional, torch.tensor([0], device="cpu"))  # copies, as a model may work in place
        with prefix.kept():
            self._read(x, more)
        if prefix.is_complete:
            self.prefix, self._shapes = prefix, _shapes(inputs, additional)

    def activations(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None) -> Tensor:
        """Compute the layer's output Z, (N, ...).

        Args:
            inputs: Tensors (N, ...).
            additional: Further arguments of the model.
        """
        every = pieces(inputs, torch.arange(len(inputs[0]), device="cpu"))
        parts = [self._read(*rows_of(inputs, additional, rows)) for rows in every]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None) -> Tensor:
        """Run the modules up to the layer once, and return the layer's output."""
        with torch.no_grad():
            return run_to_layer(
                self.model,
                self.layer,
                (*inputs, *(additional or ())),
                calls=self.calls,
                name=self.name,
                output_transform=self.output_transform,
            ).detach()  # a view of a weight requires gradients even here

    def outputs(
        self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None, targets: Sequence[Sequence[Target]]
    ) -> Tensor:
        """Compute the model's own explained outputs, (C, N).

        Args:
            inputs: Tensors (N, ...).
            additional: Further arguments of the model.
            targets: For each of C outputs, the target of every example.
        """
        x, more = rows_of(
            inputs, additional, torch.arange(len(inputs[0]), device="cpu")
        )  # copies, as a model may work in place
        with torch.no_grad(), eager():
            output = self.model(*x, *(more or ()))
        y_hat = output if self.prediction_transform is None else self.prediction_transform(output)
        return torch.stack([select_each(y_hat, list(of)) for of in targets])

    def check_contributions(self, contributions: Tensor) -> None:
        """Raise if contributions to the model's output are not finite, or all are 0.

        Args:
            contributions: Contributions of the layer's output, in any shape.

        Raises:
            ValueError: If they cannot be grouped; the message says why, and what to do.
        """
        if not bool(contributions.isfinite().all()):
            raise ValueError(
                f"contributions at layer {self.name!r} are NaN or infinite; run the model in float32, add a "
                "small number within a square root, which has no finite slope at 0, or choose another layer"
            )
        if bool(contributions.any()):
            return
        if names := quantised(self.model):
            raise ValueError(
                f"layer {self.name!r} contributes nothing to the output of any example: {names[-1]!r} is quantised, "
                "and quantised layers have no gradients; explain the float model that was quantised, or fit with "
                "autoencoder=SRAE and draw with FromCaptum(FeatureAblation)"
            )
        raise ValueError(
            f"layer {self.name!r} contributes nothing to the output of any example, because no gradient reaches it; "
            "choose a layer on the path to this output, or, if the rest of the model is not differentiable, fit with "
            "autoencoder=SRAE"
        )

    def repeat_inputs(self) -> bool:
        """Repeat the inputs from now on; return True if they were not repeated before."""
        before, self._inputs_once = self._inputs_once, False
        return before is not False

    def along(
        self,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] | None,
        base: Tensor,
        ts: Tensor,
        weights: Tensor,
        targets: Sequence[Sequence[Target]],
        *,
        Z: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Points:
        """Evaluate outputs and gradients at points on the line from a base to the layer's output.

        Where the layer's output is known, the modules before the layer run on one example only. That is right if
        no other value bypasses the layer: the caller compares outputs at Z, and sets ``layer_decides``.

        Args:
            inputs: Tensors on the model's device, (N, ...), or (M, ...) with ``rows``.
            additional: Further arguments of the model.
            base: Beginning of the line, of a shape that expands to Z.
            ts: Places on the line, (S,), in [0, 1].
            weights: Weights of the gradients at these places in their sum, (S,).
            targets: For each of C explained outputs, the target of every example.
            Z: The layer's own output, (N, ...), if known.
            rows: Rows of the inputs to run on, (N,); all by default.

        Raises:
            ValueError: If the output does not depend on the layer in a differentiable way.
        """
        rows = torch.arange(len(inputs[0]), device="cpu") if rows is None else rows
        line = _Line(inputs, additional, rows, base, ts, weights, targets, None)
        if Z is not None and self._inputs_once is not False and self.layer_decides is not False:
            self._bytes = self._bytes or Z[0].numel() * Z.element_size()
            try:
                return self._in_chunks(line._replace(Z=Z))
            except _MISFITS:
                self.layer_decides = False
        return self._in_chunks(line)

    def _in_chunks(self, line: _Line) -> Points:
        """Run at as many points of a line at once as memory holds."""
        ys: list[Tensor] = []
        total = Z = None
        first = 0
        while first < len(line.ts):
            some = slice(first, first + self._points_at_once(len(line.rows)))
            points = self._with_all_calls(line._replace(ts=line.ts[some], weights=line.weights[some]))
            ys.append(points.y)
            total, Z = points.gradient if total is None else total.add_(points.gradient), points.Z
            first, self._bytes = some.stop, Z[0].numel() * Z.element_size()
        assert total is not None and Z is not None
        return Points(torch.cat(ys, 1), total, Z)

    def _points_at_once(self, n: int) -> int:
        """Compute how many points of each of n examples fit in memory at once; one while the size of Z is unknown."""
        return 1 if self._bytes is None else max(1, min(_ROWS, _BYTES // max(1, self._bytes)) // n)

    def _with_all_calls(self, line: _Line) -> Points:
        """Run at all points of a line, which replace the layer's output at its last call."""
        while True:
            try:
                return self._inputs_once_or_repeated(line)
            except _CalledAgain:
                self.calls += 1

    def _inputs_once_or_repeated(self, line: _Line) -> Points:
        """Run with the inputs once; run with repeated inputs where other values bypass the layer."""
        if line.Z is not None:
            return self._run(line, inputs_once=True)
        if self._inputs_once is not False:
            try:
                return self._run(line, inputs_once=True)
            except _MISFITS:
                self._inputs_once = False
        try:
            return self._run(line, inputs_once=False)
        except RuntimeError as error:
            if "used in the graph" not in str(error):
                raise
            raise ValueError(
                f"the model takes gradients in its own forward pass, by values ahead of layer {self.name!r}, and the "
                "layer's replaced output cuts them off; choose a layer that these gradients do not cross, or fit with "
                "autoencoder=SRAE"
            ) from error

    def _run(self, line: _Line, *, inputs_once: bool) -> Points:
        """Run the model once for all points of a line, and take the gradients."""
        n, S = len(line.rows), len(line.ts)
        rows = line.rows if inputs_once else line.rows.repeat(S)
        rows = rows if line.Z is None else rows[:1]
        inputs, additional = rows_of(line.inputs, line.additional, rows)  # copies, as a model may work in place
        swap = _Swap(self, line, inputs_once)
        returned = nullcontext() if line.Z is None else self._returned(inputs, additional)
        with frozen(self.model), swap.on(self.layer), torch.enable_grad(), eager(), returned:
            try:
                output = self.model(*inputs, *(additional or ()))
            except (RuntimeError, IndexError, AssertionError) as error:
                if inputs_once or S == 1 or type(error) not in (RuntimeError, IndexError, AssertionError):
                    raise
                raise type(error)(
                    f"{type(self.model).__name__} runs on a batch of {n}, but not on {S * n} rows, {S} points on the "
                    f"path of each example: {error}; let forward take any number of rows, or fit with autoencoder=SRAE"
                ) from error
            if swap.leaf is None and swap.misfit:
                raise ValueError(
                    f"layer {self.name!r} gives {swap.misfit} for each example, and its base is "
                    f"{tuple(line.base.shape)}; pass inputs of the size of the training data"
                )
            if swap.leaf is None or swap.Z is None:
                raise not_reached(self.model, self.name)
            swap.is_done = True
            y_hat = output if self.prediction_transform is None else self.prediction_transform(output)
            if not isinstance(y_hat, Tensor) or y_hat.dim() == 0 or len(y_hat) != S * n:
                raise ValueError(
                    f"the model returns {len(y_hat) if isinstance(y_hat, Tensor) and y_hat.dim() else 'no'} rows for "
                    f"{S * n} rows of layer {self.name!r}; choose a layer with a "
                    "row for each example"
                )
            ys = [select_each(y_hat, list(of) * S) for of in line.targets]
            gradients = self._gradients(ys, swap.leaf, swap.with_gradients)
        y = torch.stack([y.detach().reshape(S, n) for y in ys])
        dtype = torch.promote_types(swap.Z.dtype, torch.float32)
        w = line.weights.to(swap.Z.device, dtype)
        with torch.autocast(w.device.type, enabled=False):
            total = torch.stack([torch.tensordot(w, g.reshape(S, n, *g.shape[1:]).to(dtype), 1) for g in gradients])
        return Points(y, total, swap.Z)

    def _returned(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None) -> AbstractContextManager[None]:
        """Skip the modules before the layer in this context, if their outputs are kept for inputs of these shapes."""
        if self.prefix is None or self._shapes not in (None, _shapes(inputs, additional)):
            return nullcontext()
        return self.prefix.returned()

    def _gradients(self, ys: list[Tensor], leaf: Tensor, with_gradients: bool) -> list[Tensor]:
        """Compute the derivatives of each output by the layer's output."""
        if not all(y.requires_grad for y in ys):
            if not with_gradients:
                raise ValueError(
                    f"layer {self.name!r} runs without gradients: under torch.no_grad, or in a torch.utils.checkpoint "
                    "with use_reentrant=True; remove torch.no_grad, pass use_reentrant=False to the checkpoint, choose "
                    "a layer outside of both, or fit with autoencoder=SRAE"
                )
            raise ValueError(
                f"the model's output does not depend on layer {self.name!r} in a way that has gradients; choose a "
                "layer on the way to this output, remove torch.no_grad and argmax behind it, or fit with "
                "autoencoder=SRAE"
            )
        found = []
        for i, y in enumerate(ys):
            try:
                (g,) = torch.autograd.grad(y.sum(), leaf, retain_graph=i + 1 < len(ys), allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise ValueError(
                    f"a torch.utils.checkpoint with use_reentrant=True lies behind layer {self.name!r}, and gives no "
                    "gradients at a layer; pass use_reentrant=False to it, switch checkpoints off, as in "
                    "model.gradient_checkpointing_disable(), or fit with autoencoder=SRAE"
                ) from error
            found.append(torch.zeros_like(leaf) if g is None else g)
        return found


def _shapes(inputs: tuple[Tensor, ...], additional: tuple[Any, ...] | None) -> list[torch.Size]:
    """List the shapes of all tensors among the arguments of a model."""
    return [value.shape for value in (*inputs, *(additional or ())) if isinstance(value, Tensor)]


class _CalledAgain(BaseException):
    """Ends a pass that calls the layer more often than the tail assumed."""


class _Swap:
    """Replaces a layer's output by points on the line to it, and keeps the points as a leaf that takes gradients."""

    def __init__(self, tail: Tail, line: _Line, inputs_once: bool) -> None:
        self.tail, self.base, self.ts, self.n, self.inputs_once = tail, line.base, line.ts, len(line.rows), inputs_once
        self.known_Z = line.Z
        self.count = 0
        self.leaf: Tensor | None = None
        self.Z: Tensor | None = None
        self.with_gradients = True
        """Whether the layer ran with gradients."""
        self.misfit: tuple[int, ...] = ()
        """Shape of the last output that could be replaced, without the examples."""
        self.is_done = False
        """Whether the forward pass is over. Checkpoints run layers again in the backward pass."""

    @contextmanager
    def on(self, layer: nn.Module) -> Iterator[None]:
        """Replace the layer's output in this context."""

        def replace(_module: nn.Module, _inputs: Any, raw: Any) -> Any:
            if self.is_done:
                return self._again(raw)
            self.count += 1
            if self.count > self.tail.calls:
                raise _CalledAgain
            if self.count < self.tail.calls or not self._fits(raw):
                return None
            return self._replaced(raw)

        with hooked([layer], replace):
            yield

    def _fits(self, raw: Any) -> bool:
        """Whether a call gives the shape of the base. An earlier call of a shared module may give another one."""
        self.misfit = shape = tuple(Selection.of(raw, self.tail.output_transform, self.tail.name).Z.shape[1:])
        base = self.base.shape
        pairs = zip(reversed(base), reversed(shape), strict=False)
        return len(base) <= len(shape) and all(b in (1, size) for b, size in pairs)

    def _again(self, raw: Any) -> Any:
        """Replace the layer's output by the same points where a checkpoint runs the layer again."""
        assert self.leaf is not None
        if self.tail.calls > 1:
            raise ValueError(
                f"a checkpoint runs layer {self.tail.name!r} again in the backward pass, and the layer runs "
                f"{self.tail.calls} times in a forward pass; switch checkpoints off, as in "
                "model.gradient_checkpointing_disable()"
            )
        return Selection.of(raw, self.tail.output_transform, self.tail.name).put(self.leaf.clone())

    def _replaced(self, raw: Any) -> Any:
        """Put the points in place of the layer's raw output."""
        self.with_gradients = torch.is_grad_enabled()
        into = Selection.of(raw, self.tail.output_transform, self.tail.name)
        Z = into.Z.detach()
        if self.known_Z is not None:
            if self.known_Z.shape[1:] != Z.shape[1:]:
                raise ValueError(
                    f"the collected activations are {tuple(self.known_Z.shape)}, and the layer now gives "
                    f"{tuple(Z.shape)}; collect them again"
                )
            Z = self.known_Z.to(Z)
        self.Z = Z[: self.n].clone()
        t = self.ts.to(Z).reshape(-1, *[1] * Z.dim())
        own = Z[None] if self.inputs_once else Z.reshape(len(self.ts), self.n, *Z.shape[1:])
        base = self.base.to(Z)
        self.leaf = (base + t * (own - base)).flatten(0, 1).requires_grad_(True)
        # A copy: the rest of the model may work in place, which a leaf does not allow.
        return into.put(self.leaf.clone())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep weights from taking gradients in this context, so that no module before the layer keeps a graph.

    Args:
        model: A plain module.
    """
    taking = [p for m in model.modules() for p in m._parameters.values() if p is not None and p.requires_grad]
    try:
        for p in taking:
            p.requires_grad_(False)
        yield
    finally:
        for p in taking:
            p.requires_grad_(True)
