"""The colours of all pictures."""

from __future__ import annotations

from matplotlib.colors import LinearSegmentedColormap

__all__ = [
    "BARS",
    "BLUES",
    "CONTROL",
    "FEATURES",
    "FRAME",
    "INK",
    "LINE",
    "LOWERS",
    "NEUTRAL",
    "ORANGES",
    "POINT",
    "RAISES",
    "SINGLES",
    "STAGES",
]

# Each has a contrast above 4.5 as text on white.
RAISES, LOWERS, NEUTRAL, INK = "#b84300", "#0b5fa5", "#5c5c5c", "#222222"
# Maps: darker where a value is further from 0.
ORANGES = LinearSegmentedColormap.from_list("raises", ["#f98f2f", "#e8590c", "#a32f00"])
BLUES = LinearSegmentedColormap.from_list("lowers", ["#5aaeea", "#1f7ac4", "#063f7c"])
# Colours of x-features; they repeat after the last. None is near orange, blue, red or green, which readers take for
# signs. Each has a contrast of 3 to the light and the dark background of a report, whose style sheet has the same.
FEATURES = ("#8455f0", "#128f86", "#9c8420", "#c46bb9", "#bf1ccd", "#74717a")
# Lines that help to read numbers off, and frames.
LINE, FRAME = "#888888", "#bbbbbb"
# The bars of a waterfall that are no x-features.
BARS = {"bias": "#a8a8a8", "x-features": "#6e6e6e", "unexplained": "#c9a0c9", "model": "#2b2b2b"}
# A measured value, and its control.
POINT, CONTROL = "#1f7ac4", "#8a8a8a"
# The stages of a study, and more single maps, in a palette that the colour-blind tell apart (Okabe and Ito).
STAGES = {"none": "#8a8f98", "single": "#e69f00", "xnn": "#0072b2"}
SINGLES = ("#e69f00", "#cc79a7", "#009e73", "#d55e00")
