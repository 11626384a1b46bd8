r"""Networks that classify the data sets of this folder: one set by hand, with known reasons, and two trained.

:func:`exact_network` classifies every drawn figure correctly. Its layer ``Z`` has a neuron for each look of each part.
The neuron is 1 if the image shows that look, and 0 otherwise. The output of a class is the number of its reasons that
the image shows, minus :math:`R - \tfrac{1}{2}`. The output for no class is 0. So the true x-features of a class, their
contributions and their pixels can be read off. The networks for figures and digits that learn from labels have unknown
reasons.

Conventions:
    N images: figures (3, 48, 48) with P = 6 parts, or digits (1, 28, 28). Outputs are logits. For figures of C classes
    they are (N, C + 1); the last output stands for no class.

Reference:
    The networks for figures are made for this library. The network for digits is the one in section 4.4 of Qi,
    Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from captum_xnn.datasets._figure_parts import LOOKS, PALETTE, PARTS, SIZE, template

__all__ = ["digits_cnn", "exact_network", "figures_cnn", "folded", "train"]

# One row (w, b) for each colour of the palette. 2 (w . rgb) + b is exactly 1 at that colour. It is at most 0 at the
# others and on the background, where channels are between 0.3 and 0.65.
_COLOURS = ((-1, -1, -1, 1), (0.5, 0.5, 0.5, -2), (1, 0, -1, -1), (-1, 0, 1, -1))


def exact_network(reasons: Tensor) -> nn.Sequential:
    r"""Build a network, set by hand, that classifies every figure correctly; its layer ``Z`` has a known meaning.

    Neuron :math:`4 p + l` of Z, (N, 24), is 1 where part p is shown in look l, else 0, and

    .. math:: \hat y_c = \sum_{p, l \in c} Z_{4p + l} - R_c + \tfrac{1}{2}, \qquad \hat y_C = 0.

    Layer ``colours`` has a map for each colour. Layer ``parts`` has a map for each look of each part, 1 at the part's
    point. All weights between the two layers are 0 or 1. Excitation backprop from a neuron of Z therefore reaches only
    the pixels of its part, and all of them equally.

    Args:
        reasons: The classes' table (C, P), as in ``Figures.reasons``.

    Example:
        >>> from captum_xnn.datasets import Figures
        >>> figures = Figures.draw(50)
        >>> torch.equal(exact_network(figures.reasons)(figures.images).argmax(1), figures.labels)
        True
    """
    drawn = [template(part) for part in range(len(PARTS))]
    height, width = (max(look.shape[d] for look in drawn) for d in (1, 2))
    kernel = torch.cat([_centred(looks, height, width) for looks in drawn])
    made = nn.Sequential(
        OrderedDict[str, nn.Module](
            to_colours=nn.Conv2d(3, len(PALETTE), 1),
            colours=nn.ReLU(),
            to_parts=nn.Conv2d(len(PALETTE), len(kernel), (height, width), padding=(height // 2, width // 2)),
            parts=nn.ReLU(),
            anywhere=nn.MaxPool2d(SIZE),
            Z=nn.Flatten(),
            outputs=nn.Linear(len(kernel), len(reasons) + 1),
        )
    )
    asked = F.one_hot(reasons + 1, len(LOOKS) + 1)[:, :, 1:].flatten(1).float()
    colours = torch.tensor(_COLOURS)
    values = {
        "to_colours.weight": 2 * colours[:, :3, None, None],
        "to_colours.bias": colours[:, 3],
        "to_parts.weight": kernel,
        "to_parts.bias": 1 - kernel.sum((1, 2, 3)),
        "outputs.weight": F.pad(asked, (0, 0, 0, 1)),
        "outputs.bias": F.pad(0.5 - asked.sum(1), (0, 1)),
    }
    made.load_state_dict(values)
    return made.requires_grad_(False).eval()


def _centred(looks: Tensor, height: int, width: int) -> Tensor:
    """Encode the colour of each pixel of a part as one-hot, (looks, colours, height, width); its point is central."""
    colours = F.one_hot(looks + 1, len(PALETTE) + 1)[..., 1:].movedim(3, 1).float()
    y, x = (height - looks.shape[1]) // 2, (width - looks.shape[2]) // 2
    return F.pad(colours, (x, x, y, y))


def figures_cnn(outputs: int, generator: torch.Generator) -> nn.Sequential:
    """Make a small network for figures, untrained, with batch norm. Its dense layer is ``relu4``, (N, 64).

    Args:
        outputs: Number of classes, and one for no class.
        generator: Draws the weights.

    Example:
        >>> figures_cnn(7, torch.Generator().manual_seed(0))(torch.zeros(2, 3, 48, 48)).shape
        torch.Size([2, 7])
    """
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights from the global generator
        cnn = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Conv2d(3, 16, 5, stride=2, padding=2),
                norm1=nn.BatchNorm2d(16),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(16, 32, 3, padding=1),
                norm2=nn.BatchNorm2d(32),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(32, 64, 3, padding=1),
                norm3=nn.BatchNorm2d(64),
                relu3=nn.ReLU(),
                pool3=nn.MaxPool2d(12),
                flatten=nn.Flatten(),
                fc1=nn.Linear(64, 64),
                relu4=nn.ReLU(),
                fc2=nn.Linear(64, outputs),
            )
        )
    return _drawn(cnn, generator)


def digits_cnn(generator: torch.Generator) -> nn.Sequential:
    r"""Make the paper's two-layer network for 28x28 digits, untrained, with named modules.

    Args:
        generator: Generator that draws the weights, uniform in :math:`\pm 1/\sqrt{fan}`.

    Example:
        >>> cnn = digits_cnn(torch.Generator().manual_seed(0))
        >>> cnn(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights from the global generator
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
    return _drawn(cnn, generator)


def _drawn(cnn: nn.Sequential, generator: torch.Generator) -> nn.Sequential:
    r"""Draw the weights of a network, uniform in :math:`\pm 1/\sqrt{fan}`, and return it."""
    with torch.no_grad():
        for module in cnn:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for p in module.parameters():
                    p.uniform_(-bound, bound, generator=generator)
    return cnn


def train(
    cnn: nn.Sequential,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    rate: float,
    generator: torch.Generator,
    progress: bool = False,
    **schedule: Any,
) -> nn.Sequential:
    """Train a network on labels by AdamW, and return it in eval mode.

    Args:
        cnn: The network.
        images: Images (N, ...).
        labels: Classes, (N,).
        epochs: Passes over the images.
        rate: Largest learning rate.
        generator: Draws the batches.
        progress: Whether to show a progress bar.
        schedule: Further settings of :class:`torch.optim.lr_scheduler.OneCycleLR`.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images, labels = torch.rand(64, 1, 28, 28, generator=generator), torch.arange(64) % 10
        >>> train(digits_cnn(generator), images, labels, epochs=1, rate=2e-3, generator=generator).training
        False
    """
    batches = [b for _ in range(epochs) for b in torch.split(torch.randperm(len(images), generator=generator), 64)]
    optimiser = torch.optim.AdamW(cnn.parameters())
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=len(batches) + 1, **schedule)
    for rows in tqdm(batches, "training the network", disable=not progress, leave=False):
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(cnn(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        one_cycle.step()
    return cnn.eval()


def folded(cnn: nn.Sequential) -> nn.Sequential:
    """Fold the batch norm of a network for figures into its convolutions; the function stays the same.

    Args:
        cnn: A network made by :func:`figures_cnn`, in eval mode.
    """
    layers = OrderedDict[str, nn.Module](cnn.named_children())
    for i in ("1", "2", "3"):
        conv, norm = cast(nn.Conv2d, layers[f"conv{i}"]), cast(nn.BatchNorm2d, layers.pop(f"norm{i}"))
        layers[f"conv{i}"] = fuse_conv_bn_eval(conv, norm)
    return nn.Sequential(layers).eval()
