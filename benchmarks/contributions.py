"""Groups of contributions beside the learned SRAE, network by network: is the default form the better one?

Every class is explained by both forms, fitted to the same examples. One class of one network is a line of
OUT/results.jsonl, and a run with the same OUT resumes where the last one stopped. Printed, and written to OUT, is the
mean over classes with its 95 % confidence interval:

F_reg        mean |surrogate - logit| on test examples, in logits, and the standard deviation of the logit
F_cls        share of test examples whose class stays
intervals    of the path integral, mean over test examples
O1           overlap of the x-features' drops when one patch of 4 x 4 is covered, weighted by contribution
patches      patch agreement of the default maps: rank correlation over the patches of the drops with the map,
             weighted by contribution; chance is of smooth random maps, mean over 20; one map is the agreement of the
             1-Heatmap by the same backend with the drops of the logit
identified   share of maps that fit the drops of their own x-feature better than those of the others; chance is 1 / K
eff          effective number of x-features, which describes them and does not judge them
halves       correlation on test examples of matched x-features from two fits, each to one half of the positives and
             all negatives; mixed is the same with the test examples of one fit shuffled
fit, explain processor seconds of a fit beyond collecting activations, and of explaining an image with maps, over all
             threads: other work on the machine does not count

``random groups`` are a random partition into as many groups: whatever is not better than theirs is no achievement of
the groups. Images have columns that other inputs lack. The SRAE's maps are by excitation backprop, which has no signs,
so its drops are turned to the side of the x-feature.

``--exactness`` fits nothing. Error and intervals are those of contributions, so any groups have them. Early layers take
hundreds of intervals, and a fit there takes hours. Its column *explain* has no maps.

``--curve`` measures the groups alone, from fewer positives and with other covers, on the same contributions. Images
above 64 x 64 are fitted to covered feature maps, to pixels, and to both, as by default:

5 x 5        O1 under patches of 5 x 5, which no fit covered: a fit to pixels of 4 x 4 has seen those that O1 covers
same         correlation on test examples with the matched x-features of the fit to most positives

``--tradeoff`` fits once, and measures divisions between the groups and none. *s shared* replaces weights a by
(1 - s) a + s / K: at 1 each x-feature is a K-th of the output. *no negative weights* sets them to 0 and scales the
others to a sum of 1; *one group each* gives every dimension to the group of its largest weight.

``--one-fit`` fits explainers of all chosen classes in one call. It prints the time, and the largest memory of the
process on Linux. Pass ``--one-fit --classes 100`` for a hundred.

    python -m benchmarks.contributions --networks digits-relu3 text --out DIR
    python -m benchmarks.contributions --networks birds-relu6 --root CUB_200_2011 --network FILE.py --out DIR
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from benchmarks import birds, conv_layers, digits, synthetic
from benchmarks.one_vs_all import N_FEATURES, effective, image_of
from benchmarks.runs import Column, Line, kept, measured, settings, summary, table, write
from captum_xnn import SRAE, ConvSRAE, XNNAttribution
from captum_xnn.activations import Activations, collect
from captum_xnn.activations._activations import Source
from captum_xnn.datasets import CUB200, Figures, load_digits
from captum_xnn.layers._state import untouched
from captum_xnn.layers._tail import Tail
from captum_xnn.metrics import (
    classification_faithfulness,
    drop_orthogonality,
    matched_features,
    patch_agreement,
    patch_drops,
    regression_faithfulness,
)
from captum_xnn.metrics._controls import random_maps, random_partition
from captum_xnn.metrics._patches import map_identification
from captum_xnn.models import ContributionGroups
from captum_xnn.models._srae import by_shape
from captum_xnn.training._contributions import SMALL

DRAWS, BATCH = 20, 64
POINTS = ((60, 8), (30, 8), (20, 8), (10, 8), (5, 8), (30, 6), (30, 4))
"""Positives at most and patches along a side, of the curve; the first is what the others are compared with."""
LARGE_POINTS: dict[str, dict[str, Any]] = {
    "8 x 8 of maps and 3 patches of pixels": {},
    "8 x 8 of maps": {"strongest": 0},
    "8 x 8 of maps and 1 patch of pixels": {"strongest": 1},
    "8 x 8 of maps and 8 patches of pixels": {"strongest": 8},
    "4 x 4 of pixels": {"covered": "images", "grid": 4},
}
"""The same for large images, whose feature maps can be covered: settings of each point; the first has the default's."""
FINER = 5
"""Patches along a side that no point has."""

SHARED = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75)

EXACTNESS = (
    Column("f_reg", "F_reg"),
    Column("std", "std of the output", 2),
    Column("f_cls", "F_cls", 4),
    Column("intervals", "intervals", 0),
    Column("seconds_fit", "fit, s", 1),
    Column("seconds_explain", "explain, s", 3),
)
GROUPS = (
    Column("o1", "O1 of drops", 2),
    Column("patches", "patches", 2),
    Column("patches_chance", "chance", 2),
    Column("patches_one", "one map", 2),
    Column("identified", "identified", 2),
    Column("halves", "halves", 2),
    Column("mixed", "mixed", 2),
    Column("eff", "eff", 1),
)
CURVE = (
    Column("o1", "O1 of drops", 2),
    Column("o1_finer", "5 x 5", 2),
    Column("patches", "patches", 2),
    Column("identified", "identified", 2),
    Column("same", "same", 2),
    Column("mixed", "mixed", 2),
    Column("eff", "eff", 1),
    Column("seconds_fit", "fit, s", 1),
)
TRADEOFF = tuple(column for column in GROUPS if column.key in ("o1", "patches", "patches_one", "identified"))


class Problem(NamedTuple):
    """One class of a network."""

    model: nn.Module
    layer: str
    label: int
    train: Activations
    test: Tensor
    """Inputs to test on, (N, ...)."""
    learned: Any = by_shape
    """Makes the learned form."""

    @property
    def positives(self) -> Tensor:
        """Rows of the training examples to which the model gives the class."""
        found: Tensor = (self.train.y_hat[:].argmax(1) == self.label).nonzero()[:, 0]
        return found

    def without(self, rows: Tensor) -> Problem:
        """Returns the problem without some of the training examples."""
        left = torch.ones(len(self.train.y_hat), dtype=torch.bool).index_fill(0, rows, False).nonzero()[:, 0]
        source = self.train.source
        assert source is not None
        data = source.data
        data = data[left] if isinstance(data, Tensor) else loader(Subset(data.dataset, left.tolist()))
        train = self.train._replace(
            Z=self.train.Z[left], y_hat=self.train.y_hat[left], source=Source(data, source.unpack)
        )
        return self._replace(train=train)


class Network(NamedTuple):
    """What has classes to explain."""

    classes: Callable[[argparse.Namespace], list[int]]
    """Gives those to explain, by the options."""
    of: Callable[[argparse.Namespace, int], Problem]
    """Gives the problem of one of them."""


def loader(images: Any) -> DataLoader[Any]:
    """Returns small batches of birds, so that a fit that needs few images reads few."""
    return DataLoader(images, batch_size=8)


@lru_cache(maxsize=1)
def _birds(root: Path, file: Path) -> tuple[nn.Module, CUB200]:
    model, normalise = birds.network(file)
    return model, CUB200(root, size=(227, 227), transform=normalise)


def bird_classes(given: argparse.Namespace) -> list[int]:
    """Returns classes of birds, evenly spread."""
    return birds.some_classes(_birds(given.root, given.file)[1].labels, given.classes)


def of_birds(layer: str, given: argparse.Namespace, label: int) -> Problem:
    """Returns a class of birds: all images at the dense layer, some of the others at feature maps to bound memory."""
    model, images = _birds(given.root, given.file)
    dense = layer == "relu6"
    everything: Any = birds.Birds(model, layer, images, torch.empty(0), torch.empty(0))
    train, test = conv_layers.rows_of(everything, label, len(images) if dense else given.negatives)

    def read(some: Any) -> Any:
        return collect(model, layer, loader(some), unpack=image_of, progress=True)

    if dense:
        known = {"network": str(given.file.resolve()), "layer": layer, "size": 227, "images": len(images)}
        found = kept(given.activations or given.out / "activations.pt", known, lambda: read(images))
        Z, y_hat = found["Z"][train], found["y_hat"][train]
    else:
        Z, y_hat, *_ = read(Subset(images, train.tolist()))
    source = Source(loader(Subset(images, train.tolist())), image_of)
    shown = torch.stack([images[i].image for i in test[: given.test].tolist()])
    small = partial(ConvSRAE, hidden=(64, 32), pool=2)  # as benchmarks.conv_layers
    return Problem(model, layer, label, Activations(Z, y_hat, layer, source=source), shown, SRAE if dense else small)


def _tensors(model: nn.Module, layer: str, label: int, train: Tensor, test: Tensor) -> Problem:
    """Returns a problem whose inputs are in memory; those of the class come first among the test inputs."""
    with torch.no_grad():
        own = torch.cat([model(x).argmax(1) == label for x in test.split(BATCH)])
    return Problem(model, layer, label, collect(model, layer, train), test[(~own).long().argsort(stable=True)])


def of_digits(layer: str, given: argparse.Namespace, label: int) -> Problem:
    """Returns a digit at a layer of the demonstration's network."""
    cnn, found = digits.trained(0, None)
    rows = torch.arange(len(found.test_images))[: 3 * given.test]
    return _tensors(cnn, layer, label, found.train_images, found.test_images[rows])


def of_figures(name: str, given: argparse.Namespace, label: int) -> Problem:
    """Returns a class of the drawn figures."""
    seen = synthetic.explained(name, given.examples, 1000, 0, given.epochs)
    return _tensors(
        seen.model, seen.layer, label, seen.train.figures.images, seen.test.figures.images[: 3 * given.test]
    )


class Residual(nn.Module):
    """A block with a way around its two convolutions."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.around = nn.Conv2d(channels, out, 1, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Returns feature maps (N, out, H / stride, W / stride)."""
        inside = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(inside + self.around(x))  # type: ignore[no-any-return]


def residual_network(outputs: int) -> nn.Sequential:
    """Returns an untrained network of three residual blocks; ``2`` is the last one."""
    blocks = Residual(3, 16, 2), Residual(16, 32, 2), Residual(32, 64, 2)
    return nn.Sequential(*blocks, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, outputs))


class Tokens(nn.Module):
    """A transformer on tokens: patches of images, or words."""

    def __init__(self, embed: nn.Module, length: int, outputs: int, width: int = 48) -> None:
        super().__init__()
        self.embed = embed
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        one = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(one, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (N, outputs)."""
        return self.head(self.norm(self.encoder(self.embed(x) + self.positions)).mean(1))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """Embeds the patches of images."""

    def __init__(self, channels: int, size: int, width: int = 48) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Returns tokens (N, T, width)."""
        return self.conv(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def trained(make: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, epochs: int, rate: float = 5e-3) -> Any:
    """Returns a network trained on labels, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        batches = [rows for _ in range(epochs) for rows in torch.randperm(len(inputs)).split(BATCH)]
    optimiser = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=len(batches) + 1)
    for rows in batches:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def _residual(examples: int, epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    train, test = Figures.draw(examples, seed=0), Figures.draw(1000, seed=1)
    outputs = len(train.reasons) + 1
    return (
        trained(lambda: residual_network(outputs), train.images, train.labels, epochs),
        train.images,
        test.images,
    )


@lru_cache(maxsize=1)
def _vision_transformer(epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    found = load_digits()
    model = trained(lambda: Tokens(Patches(1, 7), 16, 10), found.train_images, found.train_labels, 2 * epochs)
    return model, found.train_images, found.test_images


def draw_texts(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns texts (n, 16) of word numbers, and the topic of each: two of its three words are there, one of another.

    Words 0 to 11 are those of four topics, three each; the other 40 say nothing.
    """
    topics = torch.randint(0, 4, (n,), generator=generator)
    words = torch.randint(12, 52, (n, 16), generator=generator)
    first = torch.rand(n, 3, generator=generator).argsort(1)[:, :2]  # two different words of the topic
    other = (topics + torch.randint(1, 4, (n,), generator=generator)) % 4
    told = torch.cat([3 * topics[:, None] + first, 3 * other[:, None] + first[:, :1]], 1)
    places = torch.rand(n, 16, generator=generator).argsort(1)[:, :3]
    return words.scatter(1, places, told), topics


@lru_cache(maxsize=1)
def _text(epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    (words, topics), (test, _) = draw_texts(4000, generator), draw_texts(1000, generator)
    return trained(lambda: Tokens(nn.Embedding(52, 48), 16, 4), words, topics, epochs), words, test


@lru_cache(maxsize=1)
def _tabular(epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    from sklearn.datasets import load_breast_cancer

    values, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.from_numpy(values).float(), torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = ((x - x.mean(0)) / x.std(0))[order], y[order]

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))

    return trained(make, x[:400], y[:400], 3 * epochs), x[:400], x[400:]


def _small(make: Callable[..., Any], layer: str, *options: str) -> Callable[[argparse.Namespace, int], Problem]:
    """Returns what gives a class of a network that takes seconds to train."""

    def of(given: argparse.Namespace, label: int) -> Problem:
        model, train, test = make(*(getattr(given, name) for name in options))
        return _tensors(model, layer, label, train, test[: 3 * given.test])

    return of


def _first(classes: list[int]) -> Callable[[argparse.Namespace], list[int]]:
    return lambda given: classes[: given.classes]


FIGURES = [0, 2, 3, 5]
NETWORKS: dict[str, Network] = {
    "birds-relu6": Network(bird_classes, partial(of_birds, "relu6")),
    "birds-pool": Network(bird_classes, partial(of_birds, "pool")),
    "birds-features.11": Network(bird_classes, partial(of_birds, "features.11")),
    "birds-features.6": Network(bird_classes, partial(of_birds, "features.6")),
    "digits-relu3": Network(_first(list(range(10))), partial(of_digits, "relu3")),
    "digits-pool2": Network(_first(list(range(10))), partial(of_digits, "pool2")),
    "figures-by-hand": Network(_first(FIGURES), partial(of_figures, "exact")),
    "figures-trained": Network(_first(FIGURES), partial(of_figures, "trained")),
    "residual": Network(_first(FIGURES), _small(_residual, "2", "examples", "epochs")),
    "inside-a-block": Network(_first(FIGURES), _small(_residual, "2.relu1", "examples", "epochs")),
    "vision-transformer": Network(_first(list(range(10))), _small(_vision_transformer, "encoder.layers.0", "epochs")),
    "text": Network(_first(list(range(4))), _small(_text, "encoder.layers.0", "epochs")),
    "tabular": Network(_first([0, 1]), _small(_tabular, "1", "epochs")),
}
"""Networks by name; one of your own is an entry."""


def fitted(of: Problem, form: Any) -> tuple[XNNAttribution, float]:
    """Returns an explainer of the class, and the processor seconds of its fit beyond collecting activations."""
    xnn = XNNAttribution(of.model, of.layer, N_FEATURES, autoencoder=form)
    begin = time.process_time()
    xnn.fit(of.train, of.label, progress=False)
    return xnn, time.process_time() - begin


class Exact(NamedTuple):
    """Contributions of all dimensions to the output in some inputs, which any groups divide."""

    c: Tensor
    """(N, D)."""
    bias: Tensor
    """(N,)."""
    intervals: Tensor
    """Intervals of the integral, (N,)."""


def by_dimension(of: Problem, form: ContributionGroups, inputs: Tensor) -> Exact:
    """Returns the contributions of all dimensions."""
    tail = Tail(of.model, of.layer)
    made = []
    with untouched(of.model):
        for x in inputs.split(BATCH):
            found = form.integral(tail, (x,), None, [[of.label] * len(x)])
            made.append((form.contributions(found)[0], found.start[0], found.intervals[0]))
    return Exact(*map(torch.cat, zip(*made, strict=True)))


class Shown(NamedTuple):
    """Test inputs, and what covering a patch of some images of the class takes from the logit."""

    y_hat: Tensor
    """All outputs, (N, classes)."""
    images: Tensor | None
    """Of the class; None where inputs are no images."""
    rows: Tensor
    """Rows of the test inputs of the class, which the images are the first of."""
    lost: Tensor | None
    """What the logit loses, (images, 1, patches)."""


def shown(of: Problem, images: int) -> Shown:
    """Returns the test inputs with the drops of the logit in some images."""
    with torch.no_grad():
        y_hat = torch.cat([of.model(x) for x in of.test.split(BATCH)])
    rows = (y_hat.argmax(1) == of.label).nonzero()[:, 0]
    if of.test.dim() != 4:
        return Shown(y_hat, None, rows, None)
    some = of.test[rows[:images]]
    lost = patch_drops(lambda x: of.model(x)[:, of.label : of.label + 1], some)
    return Shown(y_hat, some, rows, lost)


def judged(of: Problem, by: Shown, xnn: XNNAttribution, E: Tensor, bias: Tensor, drops: Tensor | None) -> Line:
    """Returns the figures of an explainer.

    Args:
        of: What is explained.
        by: What it is tested on.
        xnn: The explainer.
        E: Contributions of its x-features in the test inputs, (N, K).
        bias: The surrogate less these, (N,).
        drops: What they lose in the images, (images, K, patches).
    """
    surrogate = (bias + E.sum(1)).to(by.y_hat)
    line: Line = {
        "f_reg": regression_faithfulness(surrogate, by.y_hat[:, of.label]),
        "std": float(by.y_hat[:, of.label].std()),
        "f_cls": classification_faithfulness(by.y_hat, surrogate, of.label),
        "eff": effective(E[by.rows]),
        "x_features": E.shape[1],
    }
    if by.images is None or drops is None or by.lost is None:
        return line
    begin = time.process_time()
    why = xnn.explain(by.images, of.label, internal_batch_size=BATCH)
    seconds = (time.process_time() - begin) / len(by.images)
    assert isinstance(why.maps, Tensor)
    maps, values = why.maps.sum(2), E[by.rows[: len(by.images)]]
    if not xnn.explainer(of.label).is_exact:
        drops = drops * values.sign()[:, :, None]
    one = xnn.one_heatmap(by.images, of.label, internal_batch_size=BATCH).sum(2)
    side = values.sign()[:, :, None] if xnn.explainer(of.label).is_exact else torch.ones(())
    return line | {
        "o1": drop_orthogonality(drops, contributions=values).o1,
        "patches": patch_agreement(maps, drops, contributions=values),
        "patches_chance": sum(
            patch_agreement(random_maps(maps, seed=draw), drops, contributions=values) for draw in range(DRAWS)
        )
        / DRAWS,
        "patches_one": patch_agreement(one, by.lost),
        "identified": map_identification(maps * side[..., None], drops * side),
        "seconds_explain": seconds,
    }


def halved(of: Problem) -> Iterator[Problem]:
    """Yields the problem with each half of its positives."""
    for half in (0, 1):
        yield of.without(of.positives[1 - half :: 2])


def agreement(E_a: Tensor, E_b: Tensor) -> Line:
    """Returns how far matched x-features of two fits correlate, and how far shuffled ones do."""
    mixed = E_b[torch.randperm(len(E_b), generator=torch.Generator().manual_seed(0))]
    return {"halves": matched_features(E_a, E_b).mean, "mixed": matched_features(E_a, mixed).mean}


def _contributions(of: Problem, form: ContributionGroups, inputs: Tensor) -> Tensor:
    """Returns the contributions of all dimensions, (N, D)."""
    return by_dimension(of, form, inputs).c


def _dimensions(of: Problem, by: Shown, form: ContributionGroups) -> tuple[Exact, Tensor | None]:
    """Returns contributions of all dimensions in the test inputs, and what they lose in the images."""
    exact = by_dimension(of, form, of.test)
    if by.images is None:
        return exact, None
    return exact, patch_drops(partial(_contributions, of, form), by.images).double()


def measure(of: Problem, given: argparse.Namespace) -> Line:
    """Returns the figures of both forms and of random groups on one class."""
    by, found = shown(of, given.images), {}
    xnn, seconds = fitted(of, ContributionGroups)
    form: Any = xnn.explainer(of.label).form
    exact, drops = _dimensions(of, by, form)
    learned: Line = {"seconds_fit": seconds}
    if not given.no_halves:
        halves: list[Any] = [fitted(part, ContributionGroups)[0].explainer(of.label).form for part in halved(of)]
        # Groups of both halves divide the same contributions.
        learned |= agreement(*(exact.c.double() @ half.groups.double() for half in halves))
    drawn = random_partition(len(form.groups), form.n_features, torch.Generator().manual_seed(of.label)).to(form.groups)
    for name, a, more in (("groups", form.groups, learned), ("random groups", drawn, {})):
        form.groups = a
        E = exact.c.double() @ a.double()
        lost = None if drops is None else torch.einsum("ndp,dk->nkp", drops, a.double())
        own = {"intervals": float(exact.intervals.double().mean())}
        found[name] = judged(of, by, xnn, E, exact.bias, lost) | own | more
    if not given.no_learned:
        xnn, seconds = fitted(of, of.learned)
        made = xnn.contributions(of.test, of.label, internal_batch_size=BATCH)
        lost = None
        if by.images is not None:
            lost = patch_drops(lambda x: xnn.contributions(x, of.label).contributions, by.images)
        found["SRAE"] = judged(of, by, xnn, made.contributions, made.bias, lost) | {"seconds_fit": seconds}
        if not given.no_halves:
            found["SRAE"] |= agreement(
                *(
                    fitted(part, of.learned)[0].contributions(of.test, of.label, internal_batch_size=BATCH).features
                    for part in halved(of)
                )
            )
    return {"methods": found, "tests": len(of.test), "positives": len(of.positives)}


def points(of: Problem) -> dict[str, dict[str, Any]]:
    """Returns the settings of each point of the curve."""
    if of.test.dim() == 4 and of.test.shape[2:].numel() > SMALL:
        return LARGE_POINTS
    return {
        f"{positives} positives, {grid} x {grid}": {"positives": positives, "grid": grid} for positives, grid in POINTS
    }


def exactness(of: Problem, given: argparse.Namespace) -> Line:
    """Returns the error and the intervals of contributions on the test inputs of one class, by any groups."""
    form = ContributionGroups(tuple(of.train.Z.shape[1:]), N_FEATURES)
    form.base.copy_(form.mean_of([of.train.Z[:]], len(of.train.Z)))
    form.scale.copy_(of.train.y_hat[:, [of.label]].double().std(0))
    begin = time.process_time()
    exact, _ = _dimensions(of, Shown(torch.empty(0), None, torch.empty(0), None), form)
    seconds = (time.process_time() - begin) / len(of.test)
    with torch.no_grad():
        y_hat = torch.cat([of.model(x) for x in of.test.split(BATCH)])
    surrogate = (exact.bias + exact.c.double().sum(1)).to(y_hat)
    line: Line = {
        "f_reg": regression_faithfulness(surrogate, y_hat[:, of.label]),
        "std": float(y_hat[:, of.label].std()),
        "f_cls": classification_faithfulness(y_hat, surrogate, of.label),
        "intervals": float(exact.intervals.double().mean()),
        "seconds_explain": seconds,
    }
    return {"methods": {"any groups": line}, "tests": len(of.test), "positives": len(of.positives)}


def curve(of: Problem, given: argparse.Namespace) -> Line:
    """Returns the figures of groups from fewer positives and other covers, on one class."""
    by, found = shown(of, given.images), {}
    exact = drops = finer = first = None
    for name, settings_of_point in points(of).items():
        xnn, seconds = fitted(of, partial(ContributionGroups, **settings_of_point))
        form: Any = xnn.explainer(of.label).form
        if exact is None:  # the base is that of all fits
            exact, drops = _dimensions(of, by, form)
            finer = None if by.images is None else patch_drops(partial(_contributions, of, form), by.images, grid=FINER)
        a = form.groups.double()
        E = exact.c.double() @ a
        first = E if first is None else first
        lost = None if drops is None else torch.einsum("ndp,dk->nkp", drops, a)
        same = agreement(first, E)
        found[name] = (
            judged(of, by, xnn, E, exact.bias, lost)
            | {"seconds_fit": seconds}
            | {"same": same["halves"], "mixed": same["mixed"]}
        )
        if finer is not None and by.images is not None:
            values = E[by.rows[: len(by.images)]]
            lost = torch.einsum("ndp,dk->nkp", finer.double(), a)
            found[name]["o1_finer"] = drop_orthogonality(lost, contributions=values).o1
    return {"points": found}


def divisions(a: Tensor) -> dict[str, Tensor]:
    """Returns weights (D, K) between groups a and none, all with rows that sum to 1."""
    K, positive = a.shape[1], a.clamp(min=0)
    return {
        **{f"{share:.2f} shared" if share else "groups": (1 - share) * a + share / K for share in SHARED},
        "no negative weights": positive / positive.sum(1, keepdim=True),
        "one group each": F.one_hot(a.argmax(1), K).to(a),
    }


def tradeoff(of: Problem, given: argparse.Namespace) -> Line:
    """Returns the figures of divisions between the groups and none, and of random groups, on one class."""
    by = shown(of, given.images)
    xnn, _ = fitted(of, ContributionGroups)
    form: Any = xnn.explainer(of.label).form
    exact, drops = _dimensions(of, by, form)
    drawn = random_partition(len(form.groups), form.n_features, torch.Generator().manual_seed(of.label))
    found = {}
    for name, a in {**divisions(form.groups), "random groups": drawn.to(form.groups)}.items():
        form.groups = a
        E = exact.c.double() @ a.double()
        lost = None if drops is None else torch.einsum("ndp,dk->nkp", drops, a.double())
        found[name] = judged(of, by, xnn, E, exact.bias, lost)
    return {"points": found}


def one_fit(name: str, given: argparse.Namespace) -> str:
    """Returns the time of one fit of all classes beyond collecting activations, and the memory of the process."""
    classes = NETWORKS[name].classes(given)
    of = NETWORKS[name].of(given, classes[0])
    xnn = XNNAttribution(of.model, of.layer, N_FEATURES)
    begin, clock = time.process_time(), time.perf_counter()
    xnn.fit(of.train, classes, progress=False)
    seconds = time.process_time() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{name}: {len(classes)} explainers in one fit of {len(of.train.y_hat):,} examples: {seconds:.0f} s of the "
        f"processor, {time.perf_counter() - clock:.0f} s on the clock, {torch.get_num_threads()} threads; "
        f"{seconds / len(classes):.2f} s of the processor each; at most {memory:,.0f} MiB in memory"
    )


def flat(lines: list[Line], key: str) -> list[Line]:
    """Returns a line for each form, or each point of the curve, of every class; those of one network together."""
    found = [
        {"explained": f"{line['network']}, {name}", "class": line["class"], **of}
        for line in lines
        for name, of in line.get(key, {}).items()
    ]
    order = list(NETWORKS)
    return sorted(found, key=lambda line: order.index(line["explained"].split(", ")[0]))


KINDS: dict[str, tuple[Callable[[Problem, argparse.Namespace], Line], tuple[tuple[Column, ...], ...]]] = {
    "forms": (measure, (EXACTNESS, GROUPS)),
    "curve": (curve, (CURVE,)),
    "tradeoff": (tradeoff, (TRADEOFF,)),
    "exactness": (exactness, (EXACTNESS,)),
}
"""What can be measured of a class, and the columns of the tables."""


def main(given: argparse.Namespace) -> None:
    """Measures what OUT lacks, and writes the table."""
    what = next((kind for kind in KINDS if getattr(given, kind, False)), "forms")
    measure_one, tables = KINDS[what]
    if given.one_fit:
        for name in given.networks:
            print(one_fit(name, given), flush=True)
        return
    jobs = [
        {"network": name, "what": what, "class": label}
        for name in given.networks
        for label in NETWORKS[name].classes(given)
    ]

    def of(job: Line) -> Line:
        return measure_one(NETWORKS[job["network"]].of(given, job["class"]), given)

    lines = measured(given.out, jobs, of, title="classes", under=settings(given))
    found = flat(lines, "points" if what in ("curve", "tradeoff") else "methods")
    text = "\n\n".join(table(found, "explained", columns) for columns in tables)
    write(given.out, text, summary(found, "explained", [column for columns in tables for column in columns]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", required=True, choices=list(NETWORKS))
    parser.add_argument("--classes", type=int, default=4, help="of each network")
    parser.add_argument("--curve", action="store_true", help="fewer positives and coarser covers, in an OUT of its own")
    parser.add_argument(
        "--tradeoff", action="store_true", help="one fit, weights mixed with none, in an OUT of its own"
    )
    parser.add_argument("--exactness", action="store_true", help="no fits: error and intervals, in an OUT of its own")
    parser.add_argument("--one-fit", action="store_true", help="only the time of one fit of all chosen classes")
    parser.add_argument("--no-learned", action="store_true", help="no SRAE, whose fit to large feature maps takes long")
    parser.add_argument("--no-halves", action="store_true", help="no fits to halves of the positives")
    parser.add_argument("--root", type=Path, help="folder of the birds with images.txt")
    parser.add_argument("--network", dest="file", type=Path, help="Python file with load(), MEAN and STD, for birds")
    parser.add_argument("--activations", type=Path, help="file that keeps the birds' activations at relu6")
    parser.add_argument("--negatives", type=int, default=1000, help="other birds to train on at feature maps")
    parser.add_argument("--examples", type=int, default=6000, help="figures to learn from")
    parser.add_argument("--epochs", type=int, default=6, help="of training small networks")
    parser.add_argument("--test", type=int, default=300, help="birds to test on; three times as many small inputs")
    parser.add_argument("--images", type=int, default=10, help="of the class to cover, at most")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, from which a run resumes")
    main(parser.parse_args())
