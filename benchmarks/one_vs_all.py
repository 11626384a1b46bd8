"""Forms of explanation network, each fitted to one class against all others: the figures of Tables 1 and 2."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from benchmarks.runs import Column, Line, table
from captum_xnn import SRAE, ContributionGroups, OneHeatmap, XNNAttribution
from captum_xnn.activations import Activations
from captum_xnn.activations._activations import Source
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._state import untouched
from captum_xnn.layers._tail import Tail
from captum_xnn.layers._trace import trace
from captum_xnn.metrics import (
    classification_faithfulness,
    effective_number,
    orthogonality,
    regression_faithfulness,
)
from captum_xnn.metrics._localisation import mean_locality
from captum_xnn.models import Autoencoder
from captum_xnn.models._base import encode_all
from captum_xnn.models.baselines import CAE, NMF, NN, SAE, Lasso, RandomDecoder, RandomEncoder, SingleDimensions
from captum_xnn.training._fitting import fit

N_FEATURES, DIMENSIONS, SEED = 5, 20, 2021

COLUMNS = (
    Column("train", "F_reg train"),
    Column("test", "test"),
    Column("f_cls_train", "F_cls train", 4),
    Column("f_cls", "test", 4),
    Column("eff", "eff", 2),
    Column("o1", "O1", 2),
    Column("o2", "O2", 2),
    Column("locality", "locality", 2),
    Column("o1_weighted", "O1 weighted", 2),
    Column("o2_weighted", "O2 weighted", 2),
    Column("locality_weighted", "locality weighted", 2),
)


class Problem(NamedTuple):
    """What there is to explain of one class."""

    model: nn.Module
    layer: str
    label: int
    train: tuple[Tensor, Tensor]
    """Activations (M, ...) and all outputs (M, classes) to learn from."""
    test: tuple[Tensor, Tensor]
    """Others to test on."""
    images: Tensor
    """Of the class, to draw maps of, (N, 3, H, W)."""
    Z: Tensor
    """Their activations (N, ...)."""
    parts: Callable[[Tensor], Tensor]
    """Gives what maps (N, K, H, W) have of the parts or objects in these images, (N, K, P)."""
    train_images: Any = None
    """The images to learn from, for ``groups``, in batches with a field ``image``."""


def in_batches(images: Any, rows: Tensor) -> DataLoader[Any]:
    """Returns some images in small batches, so that a fit that needs few images reads few."""
    return DataLoader(Subset(images, rows.tolist()), batch_size=8)


def image_of(batch: Any) -> tuple[tuple[Tensor], None]:
    """Returns the images of a batch, as XNNAttribution.fit takes them."""
    return (batch.image,), None


def some_dimensions(shape: Any, n_features: int, *, n_outputs: int, label: int) -> Autoencoder:
    """Returns dimensions of Z drawn at random, of which the paper takes all."""
    del n_features
    width = math.prod(shape)
    drawn = torch.randperm(width, generator=torch.Generator().manual_seed(SEED + label))[:DIMENSIONS].tolist()
    return SingleDimensions(shape, len(drawn), dimensions=drawn, n_outputs=n_outputs)


METHODS: dict[str, Callable[..., Any] | None] = {
    "SRAE": SRAE,
    "NN": NN,
    "SAE": SAE,
    "Lasso": Lasso,
    "CAE": CAE,
    "Z": some_dimensions,
    "1-Heatmap": None,
    "RandomEncoder": RandomEncoder,
    "RandomDecoder": RandomDecoder,
    "single dimensions": SingleDimensions,
    "NMF": NMF,
    "groups": ContributionGroups,
}
"""The paper's methods in its order, then what it lacks; a single heatmap is drawn of the output itself."""


def fitted(method: str, Z: Tensor, y_hat: Tensor, label: int, seed: int, *, n: int = N_FEATURES) -> Autoencoder:
    """Returns an explanation network of one class, learned from activations (M, ...) and all outputs (M, classes)."""
    make = METHODS[method]
    assert make is not None
    if method == "Z":
        make = partial(make, label=label)
    xnn: Autoencoder = make(tuple(Z.shape[1:]), n, n_outputs=1)
    fit(xnn, Z, y_hat[:, label : label + 1], positives=y_hat.argmax(1) == label, seed=seed)
    return xnn.requires_grad_(False)


@torch.no_grad()
def faithfulness(xnn: Autoencoder, Z: Tensor, y_hat: Tensor, label: int) -> dict[str, float]:
    """Returns F_reg and F_cls; NaN without examples."""
    if not len(Z):
        return {"f_reg": math.nan, "f_cls": math.nan}
    y_bar = xnn.head(encode_all(xnn, Z))[:, 0]
    return {
        "f_reg": regression_faithfulness(y_bar, y_hat[:, label]),
        "f_cls": classification_faithfulness(y_hat, y_bar, label),
    }


def effective(contributions: Tensor) -> float:
    """Returns the effective number of x-features with contributions (N, n): of their mean absolute values."""
    return float(effective_number(contributions.abs().mean(0, keepdim=True)))


def excitation_maps(
    xnn: Autoencoder, model: nn.Module, layer: str, images: Tensor, *, maps_layer: str | None = None
) -> Tensor:
    """Returns the maps of all x-features (N, K, H, W) by the default backend."""
    module = find_layer(model, layer)[1]
    network = ExplanationNetwork(model, layer, xnn, trace=trace(model, module, (images[:1],)))
    (maps,) = ExcitationMaps(maps_layer)(network, (images,), range(xnn.n_features), internal_batch_size=20)
    return maps[:, :, 0]


def locations(maps: Tensor, S: Tensor, contributions: Tensor | None) -> Line:
    """Returns orthogonality and locality, plain and weighted.

    Args:
        maps: (N, K, H, W).
        S: What they have of each part (N, K, P).
        contributions: (N, K); None for a single map, which has nothing to overlap with.
    """
    found = {"locality": mean_locality(S)}
    if contributions is not None:
        plain, weighted = orthogonality(maps), orthogonality(maps, contributions=contributions)
        found |= {"o1": plain.o1, "o2": plain.o2, "o1_weighted": weighted.o1, "o2_weighted": weighted.o2}
        found["locality_weighted"] = mean_locality(S, contributions=contributions)
    return found


def divided(of: Problem, form: ContributionGroups, Z: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Returns contributions of groups (M, K) and the bias (M,), where activations alone decide the outputs."""
    tail, made = Tail(of.model, of.layer), []
    with untouched(of.model):
        for rows in torch.arange(len(Z)).split(64):
            stand_in = of.images[:1].expand(len(rows), *of.images.shape[1:])
            own = y_hat[rows, of.label][None]
            found = form.integral(tail, (stand_in,), None, [[of.label] * len(rows)], predictions=own, Z=Z[rows])
            made.append((form.features(form.contributions(found)[0]), found.start[0]))
    E, bias = zip(*made, strict=True)
    return torch.cat(E), torch.cat(bias)


def fitted_groups(of: Problem) -> XNNAttribution:
    """Returns the default form, learned from the training images of a class and of others."""
    data = Activations(*of.train, of.layer, source=Source(of.train_images, image_of))
    return XNNAttribution(of.model, of.layer, N_FEATURES).fit(data, of.label, progress=False)


def maps_of_groups(xnn: XNNAttribution, images: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Returns the maps (N, K, H, W) of the default backend and the contributions (N, K) of the default form.

    Maps are turned to the side that the x-feature is on, without what speaks against it.
    """
    why = xnn.explain(images, label, internal_batch_size=20)
    return why.directed_maps().sum(2).clamp(min=0), why.contributions


def measure_groups(of: Problem) -> Line:
    """Returns all figures of the default form on one class."""
    begin = time.perf_counter()
    xnn = fitted_groups(of)
    learned = time.perf_counter() - begin
    form: Any = xnn.explainer(of.label).form
    maps, contributions = maps_of_groups(xnn, of.images, of.label)
    figures = []
    for Z, y_hat in (of.train, of.test):
        if len(Z):
            E, bias = divided(of, form, Z, y_hat)
            surrogate = (E.sum(1) + bias).to(y_hat)
            figures.append((regression_faithfulness(surrogate, y_hat[:, of.label]),
                            classification_faithfulness(y_hat, surrogate, of.label)))  # fmt: skip
        else:
            figures.append((math.nan, math.nan))
    (train, f_cls_train), (test, f_cls) = figures
    return {
        "train": train,
        "test": test,
        "f_cls_train": f_cls_train,
        "f_cls": f_cls,
        **locations(maps, of.parts(maps), contributions),
        "eff": effective(contributions),
        "contributions": [round(c, 3) for c in contributions.mean(0).tolist()],
        "empty_maps": float((maps.flatten(2).sum(2) == 0).double().mean()),
        "seconds": time.perf_counter() - begin,
        "seconds_fit": learned,
    }


def measure(of: Problem, method: str, seed: int, *, maps_layer: str | None = None) -> Line:
    """Returns all figures of one method on one class."""
    if method == "groups":
        return measure_groups(of)
    begin = time.perf_counter()
    if METHODS[method] is None:
        maps = OneHeatmap(of.model, ExcitationMaps(maps_layer)).attribute(of.images, of.label)[:, :, 0]
        return locations(maps, of.parts(maps), None) | {"seconds": time.perf_counter() - begin}
    xnn = fitted(method, *of.train, of.label, seed)
    learned = time.perf_counter() - begin
    contributions = xnn.contributions(encode_all(xnn, of.Z))
    maps = excitation_maps(xnn, of.model, of.layer, of.images, maps_layer=maps_layer)
    found = locations(maps, of.parts(maps), contributions)
    if method == "Z":  # unrelated dimensions, which explain nothing together
        return {"locality": found["locality"], "seconds": time.perf_counter() - begin}
    seen, new = (faithfulness(xnn, *data, of.label) for data in (of.train, of.test))
    return {
        "train": seen["f_reg"],
        "test": new["f_reg"],
        "f_cls_train": seen["f_cls"],
        "f_cls": new["f_cls"],
        **found,
        "eff": effective(contributions),
        "contributions": [round(c, 3) for c in contributions.mean(0).tolist()],
        "empty_maps": float((maps.flatten(2).sum(2) == 0).double().mean()),
        "seconds": time.perf_counter() - begin,
        "seconds_fit": learned,
    }


def advantages(lines: Iterable[Line], over: str = "SRAE") -> list[Line]:
    """Returns, for every other method, its figures less one method's on the same class and seed."""
    by = {(line["method"], line["class"], line["seed"]): line for line in lines}
    return [
        {"against": name} | {c.key: line.get(c.key, math.nan) - one.get(c.key, math.nan) for c in COLUMNS}
        for (name, label, seed), line in by.items()
        if name != over and (one := by.get((over, label, seed))) is not None
    ]


def report(lines: list[Line], paper: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the table, and that of the differences to the SRAE, in Markdown."""
    order = list(METHODS)
    return "\n\n".join(
        [
            table(lines, "method", COLUMNS, paper=paper, order=order),
            "Other methods less the SRAE:",
            table(advantages(lines), "against", COLUMNS, order=order),
        ]
    )
