"""Fingerprints: the identity of a model and one layer of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["WeightSamples", "check_fingerprint", "checksum", "differences", "fingerprint", "new_squashing"]

_SQUASHING = ("Softmax", "Softmax2d", "LogSoftmax", "Sigmoid", "LogSigmoid")
# These change nothing in evaluation mode, so a model with or without them is the same.
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def fingerprint(model: nn.Module, layer: str) -> dict[str, Any]:
    """Describe the identity of a model and one layer: classes, and shape, dtype and checksum of every tensor.

    The classes are those of model and layer, and of every module without tensors and parts, such as a softmax.

    Args:
        model: A plain module.
        layer: Dotted name of the layer.

    Example:
        >>> made = fingerprint(nn.Sequential(nn.Linear(2, 1)), "0")
        >>> made["layer_class"], sorted(made["tensors"])
        ('Linear', ['0.bias', '0.weight'])
    """
    tensors = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "checksum": checksum(t)}
        for name, t in model.state_dict().items()
        if isinstance(t, Tensor)
    }
    functions = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name not in ("", layer)
        and not isinstance(module, _IDLE)
        and not any((module._modules, module._parameters, module._buffers))
    }
    return {
        "model_class": type(model).__name__,
        "layer": layer,
        "layer_class": type(model.get_submodule(layer)).__name__,
        "functions": functions,
        "tensors": tensors,
    }


def check_fingerprint(saved: Any) -> None:
    """Raise where a fingerprint from a file is damaged.

    Args:
        saved: Contents of the file, in the form of :func:`fingerprint` unless damaged.

    Raises:
        ValueError: If an entry is missing or of another type.

    Example:
        >>> check_fingerprint(fingerprint(nn.Sequential(nn.Linear(2, 1)), "0"))
        >>> entries = {"model_class": "Sequential", "layer": "0", "layer_class": "Linear", "functions": {}}
        >>> check_fingerprint({**entries, "tensors": [1]})
        Traceback (most recent call last):
        ...
        ValueError: tensors of the fingerprint are a list, not the shape, dtype and checksum of each by name
    """
    for key in ("model_class", "layer", "layer_class"):
        if not isinstance(saved, dict) or not isinstance(saved.get(key), str):
            raise ValueError(f"the fingerprint has no {key}")
    functions, tensors = saved.get("functions"), saved.get("tensors")
    if not isinstance(functions, dict) or not all(isinstance(name, str) for name in functions.values()):
        raise ValueError(f"functions of the fingerprint are {functions!r:.80}, not the class of each by name")
    if not isinstance(tensors, dict):
        raise ValueError(
            f"tensors of the fingerprint are a {type(tensors).__name__}, not the shape, dtype and checksum of each by "
            "name"
        )
    for name, entry in tensors.items():
        has_all = isinstance(entry, dict) and {"shape", "dtype", "checksum"} <= entry.keys()
        if not has_all or not isinstance(entry["shape"], list) or not isinstance(entry["dtype"], str):
            raise ValueError(f"the fingerprint of tensor {name!r} is {entry!r}, not a shape, dtype and checksum")


def checksum(tensor: Tensor) -> str:
    """Compute the checksum of a tensor's values, 16 hexadecimal digits.

    Args:
        tensor: Any tensor; only its bytes count, not its shape.

    Example:
        >>> checksum(torch.zeros(3)) == checksum(torch.zeros(3)), checksum(torch.zeros(3)) == checksum(torch.ones(3))
        (True, False)
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()


def differences(saved: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Describe the differences between two fingerprints in words; the list is empty if they are the same.

    Args:
        saved: Fingerprint of the model to which an explainer was fitted.
        found: Fingerprint of the model with which the explainer is to be used.

    Example:
        >>> a, b = (fingerprint(nn.Sequential(nn.Linear(size, 1)), "0") for size in (2, 3))
        >>> differences(a, b)[0]
        'tensor 0.weight is float32 [1, 3], was float32 [1, 2]'
    """
    said = [
        f"{key.replace('_', ' ')} is {found[key]}, was {saved[key]}"
        for key in ("model_class", "layer", "layer_class")
        if saved[key] != found[key]
    ]
    was, now = saved["functions"], found["functions"]
    said += [f"{name} is new, a {now[name]}" for name in now if name not in was]
    said += [f"{name}, a {was[name]}, is missing" for name in was if name not in now]
    said += [f"{name} is a {now[name]}, was a {was[name]}" for name in now if name in was and now[name] != was[name]]
    old, new = saved["tensors"], found["tensors"]
    changed = []
    for name in (n for n in old if n in new and old[n] != new[n]):
        was, now = (f"{t['dtype']} {t['shape']}" for t in (old[name], new[name]))
        if was != now:
            said.append(f"tensor {name} is {now}, was {was}")
        else:
            changed.append(name)
    for what, names in (
        ("has other values", changed),
        ("is missing", [n for n in old if n not in new]),
        ("is new", [n for n in new if n not in old]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            said.append(f"{', '.join(names[:3])}{more} {what}")
    return said


class WeightSamples(NamedTuple):
    """A few numbers of every weight of a model, which tell later whether training went on.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> samples = WeightSamples.of(model)
        >>> _ = model.bias.data.add_(1)
        >>> samples.changed(model)
        ['bias']
    """

    numbers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> WeightSamples:
        """Take the samples.

        Args:
            model: A plain module.
        """
        return cls({name: _sample(weight).clone() for name, weight in _weights(model)})

    def changed(self, model: nn.Module) -> list[str]:
        """List the names of weights with other numbers than the samples.

        torch's own count of changes in place would take less time, but misses those of ``weight.data``.

        Args:
            model: The model as it is now, or a copy.
        """
        return [
            name
            for name, weight in _weights(model)
            if name not in self.numbers or not _equal(self.numbers[name], _sample(weight))
        ]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield weights and running statistics, which change by training alone; embeddings may be renormed in use."""
    renormed = {id(p) for m in model.modules() if vars(m).get("max_norm") is not None for p in m.parameters(False)}
    for name, p in model.named_parameters():
        if id(p) not in renormed and not p.is_inference() and not p.is_meta:
            yield name, p
    for of, module in model.named_modules():
        if isinstance(module, _NormBase):
            for name, b in module.named_buffers(of, recurse=False):
                if b.is_floating_point() and not b.is_inference() and not b.is_meta:
                    yield name, b


def _equal(before: Tensor, now: Tensor) -> bool:
    """Whether numbers are the same, NaN among them, in the coarser of both dtypes."""
    if before.dtype == now.dtype and torch.equal(before, now):
        return True
    if before.is_floating_point() and now.is_floating_point():
        coarse = max(before.dtype, now.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        before, now = before.to(coarse).nan_to_num(), now.to(coarse).nan_to_num()
    return torch.equal(before, now)


def _sample(weight: Tensor) -> Tensor:
    """Select up to 64 evenly spread numbers of a weight, on the CPU, in an order that no memory format changes."""
    weight, step = weight.detach(), max(1, weight.numel() // 64)
    if weight.is_contiguous():
        return weight.view(-1)[::step][:64].cpu()
    at = np.unravel_index(np.arange(0, weight.numel(), step)[:64], tuple(weight.shape))
    return weight[tuple(map(torch.from_numpy, at))].cpu()


def new_squashing(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Return the class of a softmax or sigmoid that only the second model has; None without one.

    Args:
        saved: Fingerprint of the model to which an explainer was fitted.
        found: Fingerprint of the model with which the explainer is to be used.

    Example:
        >>> logits, probabilities = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3), nn.Softmax(1))
        >>> new_squashing(fingerprint(logits, "0"), fingerprint(probabilities, "0"))
        'Softmax'
    """
    new = (name for key, name in found["functions"].items() if saved["functions"].get(key) != name)
    return next((name for name in new if name in _SQUASHING), None)
