"""The settings of excitation backprop: all choices that the method leaves open, in one place.

:class:`Settings` has names, defaults and meanings. Constructors take the settings as ``**settings``, and
:func:`takes_settings` shows their names and defaults in the signature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args, get_type_hints

__all__ = ["Add", "BatchNorm", "Negative", "SettingNames", "Settings", "takes_settings"]

Negative = Literal["excitatory", "clamp", "raw"]
Add = Literal["signed", "excitatory"]
BatchNorm = Literal["sign", "pass"]

_Init = TypeVar("_Init", bound=Callable[..., None])


@dataclass(frozen=True)
class Settings:
    """Settings of excitation backprop where the method leaves a choice."""

    contrastive: bool = True
    """Whether to subtract the probabilities of the target's opposite (c-MWP), or not (MWP)."""
    negative: Negative = "excitatory"
    """Treatment of negative activations, see :mod:`captum_xnn.excitation_bp._shares`."""
    add: Add = "signed"
    """Whether residual branches share in proportion to their values, or to their positive parts."""
    batch_norm: BatchNorm = "sign"
    """Whether a negative scale after an affine layer flips the sign of that layer's weights, or is ignored."""
    strict: bool = False
    """Whether an operation without a rule raises an error instead of a warning."""

    def replaced(
        self, changes: Mapping[str, Any], *, owner: str = "ExcitationBP", others: tuple[str, ...] = ()
    ) -> Settings:
        """Return these settings with some changes.

        Args:
            changes: New values by name.
            owner: Name of the class that takes the settings, for the error.
            others: Further names that this class takes, for the error.

        Raises:
            TypeError: If a name is unknown.
            ValueError: If a value is unknown.

        Example:
            >>> Settings().replaced({"add": "excitatory"}).add
            'excitatory'
        """
        names = [field.name for field in fields(self)]
        if unknown := [name for name in changes if name not in names]:
            takes = ", ".join(sorted({*others, *names}))
            raise TypeError(f"{owner} has no setting {', '.join(map(repr, unknown))}; it takes: {takes}")
        changed = replace(self, **changes)
        for name, allowed in get_type_hints(Settings).items():
            choices = get_args(allowed)
            if choices and getattr(changed, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(changed, name)!r}; pass one of {', '.join(map(repr, choices))}, see the "
                    "documentation of ExcitationBP"
                )
        return changed


class SettingNames(TypedDict, total=False):
    """The fields of :class:`Settings` as keyword arguments, for type checkers."""

    contrastive: bool
    negative: Negative
    add: Add
    batch_norm: BatchNorm
    strict: bool


def takes_settings(init: _Init) -> _Init:
    """Show the names and defaults of all settings in the signature of a constructor with ``**settings``.

    Captum users read signatures, and :class:`captum_xnn.heatmaps.FromCaptum` sorts its settings by them.

    Args:
        init: The constructor.

    Example:
        >>> class Method:
        ...     @takes_settings
        ...     def __init__(self, model, **settings):
        ...         pass
        >>> list(inspect.signature(Method).parameters)
        ['model', 'contrastive', 'negative', 'add', 'batch_norm', 'strict']
    """
    signature = inspect.signature(init)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Settings)
    ]

    @functools.wraps(init)
    def constructor(*args: Any, **kwargs: Any) -> None:
        init(*args, **kwargs)

    shown: Any = constructor
    del shown.__wrapped__  # Sphinx would look for the defaults in the source of init
    shown.__signature__ = signature.replace(parameters=[*own, *added])
    return cast(_Init, constructor)
