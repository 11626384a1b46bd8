"""Options of a report: texts, names, data for the cards, and what to compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from captum_xnn.plots._names import Names
from captum_xnn.report._cards import PlacesOfMaps
from captum_xnn.report._inputs import Texts
from captum_xnn.report._output_names import ClassNames

if TYPE_CHECKING:  # XNNAttribution.report calls the report
    from captum_xnn.attribution import XNNAttribution

__all__ = ["ReportOptions"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportOptions:
    """Options of :meth:`captum_xnn.XNNAttribution.report`.

    Example:
        >>> options = ReportOptions(title="Why a goldfinch?", class_names=["goldfinch", "cardinal"])
        >>> options.title, options.patches
        ('Why a goldfinch?', 0)
    """

    title: str | None = None
    """Heading of the page and its title in the browser."""
    notes: Sequence[tuple[str, str]] = ()
    """Extra sections, each a heading and plain text. Empty lines separate paragraphs."""
    data: Any = None
    """Data set for faithfulness and cards, as ``xnn.fit`` takes it. The report's own inputs if None."""
    captions: Sequence[str] | None = None
    """Caption of each input, such as its file name."""
    data_captions: Sequence[str] | None = None
    """Caption of each example of ``data``, for the cards. If ``data`` is None, ``captions`` are used."""
    class_names: ClassNames | None = None
    """Names of the model's outputs: a list in order, or a mapping by number. A single output has one name."""
    names: str | os.PathLike[str] | Mapping[Any, Names] | None = None
    """Names of x-features: a file that a report exported or :func:`captum_xnn.plots.write_names` wrote, or a mapping
    from targets to names."""
    display: Callable[[Tensor], Tensor] | None = None
    """Function that turns an image (C, H, W), as the model takes it, into an image in [0, 1], for example by undoing
    the normalisation. If None, values outside [0, 1] are stretched. Of a table it turns rows (N, D) into the values to
    show, in their own units, such as ``lambda z: z * std + mean``."""
    tokens: Texts | None = None
    """Texts of the tokens, for a page of texts: a list for each input, without padding, or a function of one input's
    ids (L,)."""
    input_names: Sequence[str] | None = None
    """Names of the input features, for a page about a table."""
    unit: str = "logits"
    """Unit of the model's output, such as "thousands of euros". With "log-odds", each output also stands as a
    probability: choose it where the logistic function of the output is one."""
    place_names: Sequence[str] = ()
    """Names of annotated parts or objects, in order. The cards then show the share of the maps on each. The samples of
    ``data`` need the fields ``points`` and ``box`` (:class:`~captum_xnn.datasets.CUB200`), or ``mask``
    (:class:`~captum_xnn.datasets.ADE20KScenes`)."""
    places: PlacesOfMaps | None = None
    """Function ``(batch, rows, maps)`` that computes these shares (n, K, P) from other annotations."""
    against: int | tuple[int, ...] | None = None
    """Output to compare with. Each example has a second sentence, why the target rather than this output, and the page
    can show the maps of the difference."""
    patches: int = 0
    """Number of positives to cover patch by patch, for the measures of :func:`captum_xnn.patch_scores.patch_scores`.
    An image has 16 patches, a text one for each token, and a row of a table one for each column. Each patch takes one
    explanation."""
    fill: Tensor | float | None = None
    """Values of a covered patch, such as the id of padding or of unknown words. By default the mean colour of each
    image, the mean embedding in place of a token, or the mean of each column over ``data``."""
    again: XNNAttribution | None = None
    """The same explanation fitted again, on other data or with another seed. The report says whether it has the same
    x-features."""
    internal_batch_size: int | None = None
    """Number of maps computed at once; smaller values need less memory."""
    cache: str | os.PathLike[str] | None = None
    """Folder that keeps maps and numbers. A later report on the same model, explainers, inputs and options reads them
    from there, also with other names, title and notes. If None, nothing is kept."""
    progress: bool = False
    """Whether to show progress bars."""
