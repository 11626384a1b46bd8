"""Human studies: from fitted explainers and images to a running study, and from its answers to figures and tests.

The commands below ``captum-xnn study`` run a study. From Python, :class:`StudyConfiguration` holds the settings of
``study.toml``, and :func:`prepare` draws and renders all pictures beforehand. It also takes heatmap backends of your
own, and images in memory. The extra ``study`` brings flask, pillow, statsmodels and waitress.
"""

# The modules, in the order of a study: _configuration (the settings), _preparation (all pictures), _prepared (the
# folder that it writes), _protocol (each participant's steps), _store (the database), _server (the running study),
# _static (the same page without a server), _export (a Psych-DS folder), _analysis, _figures and _findings (figures,
# tests and the page of results), _simulation (participants with known behaviour), _demo (a study to try out), _cli
# (the commands).

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from captum_xnn.study._configuration import Arm, DatasetSettings, Exclusions, StudyConfiguration

if TYPE_CHECKING:
    from captum_xnn.study._preparation import Material, prepare

__all__ = ["Arm", "DatasetSettings", "Exclusions", "Material", "StudyConfiguration", "prepare"]


def __getattr__(name: str) -> Any:
    """Import the preparation when it is first used: the command line's help does not wait for torch."""
    if name in ("Material", "prepare"):
        from captum_xnn.study import _preparation

        return getattr(_preparation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
