"""The command line: ``layers``, ``fit``, ``explain``, ``evaluate``, ``compare``, ``report``, ``demo``, ``study``.

Scripts can use its parts: :class:`Configuration` reads the file of a run, and :class:`ModelAndInputs` opens the model
and the inputs that it names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_xnn.cli._configuration import Configuration
    from captum_xnn.cli._model_and_inputs import ModelAndInputs

__all__ = ["Configuration", "ModelAndInputs"]


def __getattr__(name: str) -> Any:
    """Import the parts for scripts when they are first used: the command line's help does not wait for torch."""
    if name == "Configuration":
        from captum_xnn.cli._configuration import Configuration

        return Configuration
    if name == "ModelAndInputs":
        from captum_xnn.cli._model_and_inputs import ModelAndInputs

        return ModelAndInputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
