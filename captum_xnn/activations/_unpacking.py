"""Turn a batch of a loader into the arguments of a model, by the signature of its ``forward``.

The keys of a dict, such as a batch of Hugging Face, are names of arguments. A tuple or list has no names. Its first
entry is taken as the inputs, with one warning where the model could take further entries.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from captum_xnn.layers._lookup import unwrap
from captum_xnn.layers._stacklevel import levels_up

__all__ = ["ForModel", "Unpack", "first_of_batch", "unpack_for"]

Unpack = Callable[[Any], tuple[Any, Any]]

# Arguments from which a model computes its loss. They are answers, not inputs, and left out where they are optional.
_ANSWERS = frozenset(
    (
        "label",
        "labels",
        "label_ids",
        "target",
        "targets",
        "y",
        "start_positions",
        "end_positions",
        "next_sentence_label",
    )
)


def first_of_batch(batch: Any) -> tuple[Any, Any]:
    """Take the model's inputs and its additional arguments (here always None) from one batch of a loader.

    A tensor is the inputs. So is the first entry of a tuple or list; further entries (labels) are ignored. Several
    inputs are a tuple or list of their own as the first entry.

    Args:
        batch: A batch as a data loader yields it.

    Raises:
        TypeError: If the batch is of another type.

    Example:
        >>> import torch
        >>> first_of_batch([torch.zeros(2, 3), torch.tensor([0, 1])])[0].shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], (Tensor, tuple, list)):
        inputs = batch[0]
        return (tuple(inputs) if isinstance(inputs, list) else inputs), None
    own = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if isinstance(own, np.ndarray):
        raise TypeError(
            f"a batch has a numpy array {own.shape} of {own.dtype} where the inputs should be; let the data set give "
            "tensors in the dtype of the model, or pass unpack=lambda batch: (torch.from_numpy("
            f"{'batch' if own is batch else 'batch[0]'}).float(), None)"
        )
    if type(own).__module__.partition(".")[0] == "PIL":
        raise TypeError(
            "the data are images of PIL; turn each into a tensor, as torchvision.transforms.ToTensor() does, and pass "
            "them together, torch.stack(images), or as a torch.utils.data.Dataset with this transform"
        )
    raise TypeError(
        f"a batch must be a tensor or begin with the inputs, and this one is a {type(batch).__name__}; pass unpack=, "
        "a function from a batch to (inputs, additional_forward_args)"
    )


def unpack_for(model: nn.Module, unpack: Unpack) -> Unpack:
    """Choose the function that unpacks batches for a model: the user's own, or one by the model's signature.

    Args:
        model: The explained model.
        unpack: The user's function. The default :func:`first_of_batch` stands for the model's signature.

    Example:
        >>> unpack_for(nn.Linear(2, 1), lambda batch: (batch, None)).__name__
        '<lambda>'
    """
    return ForModel(model) if unpack is first_of_batch else unpack


class ForModel:
    """Unpacks batches by the signature of a model's ``forward``.

    The entries of a dict that are named like parameters become arguments; labels are left out where they are
    optional. The first entry of a tuple or list becomes the inputs (:func:`first_of_batch`).

    Args:
        model: The explained model.

    Example:
        >>> import torch
        >>> class Masked(nn.Module):
        ...     def forward(self, ids, scale=1.0, mask=None):
        ...         return ids
        >>> ForModel(Masked())({"mask": torch.ones(2), "ids": torch.zeros(2), "labels": torch.zeros(2)})
        (tensor([0., 0.]), (1.0, tensor([1., 1.])))
    """

    def __init__(self, model: nn.Module) -> None:
        plain = unwrap(model)
        self.name = type(plain).__name__
        try:
            parameters = list(inspect.signature(plain.forward).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        empty = inspect.Parameter.empty
        self.names = [p.name for p in parameters if p.kind in positional]
        self.defaults = {p.name: p.default for p in parameters if p.kind in positional and p.default is not empty}
        self.keyword_only = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        self._told = False

    def __call__(self, batch: Any) -> tuple[Any, Any]:
        """Take inputs and additional arguments from a batch.

        Args:
            batch: A batch as a data loader yields it.

        Raises:
            TypeError: If the batch lacks arguments that the model needs, or is of another type.
        """
        entries = batch if isinstance(batch, (tuple, list)) else (batch,)
        if entries and isinstance(entries[0], Mapping):
            return self._named(entries[0])
        inputs, additional = first_of_batch(batch)
        if not isinstance(batch, Tensor):
            self._compare(inputs if isinstance(inputs, tuple) else (inputs,), batch[1:])
        return inputs, additional

    def _compare(self, taken: tuple[Any, ...], left: Any) -> None:
        """Raise where the model needs more inputs than are taken from a batch; warn where it could take more."""
        required = [name for name in self.names if name not in self.defaults]
        if len(taken) < len(required):
            raise TypeError(
                f"forward of {self.name} needs {', '.join(required)}, and only the first of a batch's {1 + len(left)} "
                "entries is passed to it; say which entries are arguments, as in "
                f"unpack=lambda batch: (tuple(batch[:{len(required)}]), None)"
            )
        free = [n for n in self.names[len(taken) :] if self.defaults.get(n, 0) is None and n not in _ANSWERS]
        tensors = [x for x in left if isinstance(x, Tensor)]
        # One entry with a number for each example is the label.
        if free and (len(tensors) > 1 or (tensors and tensors[0].dim() > 1)):
            self._tell(
                f"only the first of a batch's {1 + len(left)} entries is passed to {self.name}, and its forward could "
                f"also take {', '.join(free)}; say which entries are arguments, as in "
                "unpack=lambda batch: (batch[0], batch[1]), or silence this by unpack=lambda batch: (batch[0], None)"
            )

    def _named(self, batch: Mapping[Any, Any]) -> tuple[Any, Any]:
        """Take the entries of a batch that are named like forward's parameters, in the order of the parameters."""
        optional_answers = {n for n in _ANSWERS if n in self.defaults}
        given = {n: batch[n] for n in self.names if n in batch and n not in optional_answers}
        missing = [n for n in self.names if n not in self.defaults and n not in batch]
        keyword_only = [n for n in self.keyword_only if n in batch and n not in _ANSWERS]
        keys = ", ".join(map(str, batch))
        if missing or not given or not isinstance(next(iter(given.values())), Tensor):
            names = ", ".join(self.names) or "no names"
            raise TypeError(
                f"a batch has the keys {keys}, and forward of {self.name} takes {names}"
                f"{'; it lacks ' + ', '.join(missing) if missing else ''}: give the batch those names, or pass "
                "unpack=, a function from a batch to (inputs, additional_forward_args)"
            )
        if keyword_only:
            raise TypeError(
                f"forward of {self.name} takes {', '.join(keyword_only)} of a batch by keyword only, and explained "
                "models get their arguments by position; wrap the model in one that takes them by position"
            )
        other = [str(k) for k, v in batch.items() if k not in given and k not in _ANSWERS and isinstance(v, Tensor)]
        free = [n for n in self.names if n not in given and self.defaults.get(n, 0) is None and n not in _ANSWERS]
        if other and free:
            self._tell(
                f"forward of {self.name} takes no argument named {', '.join(other)}, as in the batch, but could take "
                f"{', '.join(free)}; rename the entries, or pass unpack="
            )
        last = max(self.names.index(n) for n in given)
        arguments = [given.get(n, self.defaults.get(n)) for n in self.names[: last + 1]]
        return _divided(arguments)

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(text, stacklevel=levels_up())


def _divided(arguments: list[Any]) -> tuple[Any, Any]:
    """Divide arguments: leading tensors up to the last floating-point one are inputs, the rest additional."""
    count = 0
    while count < len(arguments) and isinstance(arguments[count], Tensor):
        count += 1
    while count > 1 and not arguments[count - 1].is_floating_point():
        count -= 1
    if not count:  # a default stands first
        return arguments[0], tuple(arguments[1:])
    inputs = arguments[0] if count == 1 else tuple(arguments[:count])
    return inputs, tuple(arguments[count:]) or None
