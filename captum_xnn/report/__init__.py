"""Reports: one HTML page about the x-features of a model, with a card for each x-feature.

:meth:`XNNAttribution.report <captum_xnn.XNNAttribution.report>` writes the page.
"""

from captum_xnn.report._options import ReportOptions

__all__ = ["ReportOptions"]
