"""Command line: ``captum-xnn fit``, ``explain``, ``evaluate``, ``report``, ``demo`` and ``study``."""

from captum_xnn.cli.parser import main

__all__ = ["main"]
