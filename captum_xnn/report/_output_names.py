"""Names of the model's outputs on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from captum_xnn.layers._targets import Difference, Target

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution

__all__ = ["ClassNames", "OutputNames"]

ClassNames = Mapping[int, str] | Sequence[str]


class OutputNames:
    """Names of the model's outputs.

    Args:
        names: Names of classes, if they are known.
        classes: Whether an output without a name is a class.
    """

    def __init__(self, names: ClassNames | None, *, classes: bool = True) -> None:
        pairs: Any = () if names is None else names.items() if isinstance(names, Mapping) else enumerate(names)
        self.names: dict[Any, str] = dict(pairs)
        self.classes = classes

    @classmethod
    def of_targets(cls, names: ClassNames | None, xnn: XNNAttribution, targets: Sequence[Target]) -> OutputNames:
        """Give outputs without a name the word "class" where a fit found classes.

        Args:
            names: Names of classes, if they are known.
            xnn: The explainers.
            targets: Fitted targets.
        """
        return cls(names, classes=any(xnn.explainer(t).positives is not None for t in targets))

    def of(self, target: Target) -> str:
        """Return the name of an output, or its number if it has no name."""
        if target is None:
            only = self.names.get(None, next(iter(self.names.values())) if len(self.names) == 1 else "the output")
            return str(only)
        if isinstance(target, Difference):
            return f"{self.of(target.target)} rather than {self.of(target.against)}"
        if target in self.names:
            return str(self.names[target])
        return f"class {target}" if self.classes and isinstance(target, int) else f"output {target}"
