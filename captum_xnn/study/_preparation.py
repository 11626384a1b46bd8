r"""Draw images and render all that a study shows, so that no model runs while people take part.

Images are drawn from those to which the model gives one of the chosen classes, and divided into disjoint batches, as
balanced as possible: ten images of four classes are 3, 3, 2 and 2 of each. The classes with 3 images change from batch
to batch. Purity is measured against the model's classes, as in the paper.

The value above a map is the contribution's share,

.. math:: \frac{v_i E_i}{\sum_j |v_j E_j|},

in [-1, 1], of the class that the model gives the image. The raw contributions sum with the bias to the surrogate; they
are kept in ``study.json``.

Explanations at test time would reveal the model's answer, so the prediction task shows maps on its examples only.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor
from tqdm import tqdm

from captum_xnn._files import replace_file
from captum_xnn.attribution import XNNAttribution
from captum_xnn.cli._configuration import CONFIGURATION_FILE, Configuration
from captum_xnn.cli._model_and_inputs import ModelAndInputs, heatmap_named
from captum_xnn.heatmaps._excitation_maps import ExcitationMaps
from captum_xnn.heatmaps._from_captum import FromCaptum
from captum_xnn.heatmaps._heatmap import DefaultMaps, Heatmap
from captum_xnn.heatmaps._one_heatmap import OneHeatmap
from captum_xnn.layers._pixels import channels_first
from captum_xnn.plots._scales import own_scale
from captum_xnn.report._thumbnails import displayable, overlay, photo
from captum_xnn.study._configuration import Arm, DatasetSettings, StudyConfiguration, heatmap_of
from captum_xnn.study._prepared import MEDIA_FOLDER, STUDY_FILE, PreparedStudy
from captum_xnn.study._store import ANSWERS_FILE

__all__ = ["Material", "practice_batch", "prepare", "read_material"]

# Examples of each class that tasks other than sorting show beforehand.
_EXAMPLES = 2
_SMALL = 64
_MAP = 96
_OUTPUTS_AT_ONCE = 64
_MAPS_AT_ONCE = 16


@dataclass(frozen=True)
class Material:
    """One data set's images with the explainers of their classes."""

    xnn: XNNAttribution
    """With fitted explainers of the classes; a joint one gives all classes the same x-features."""
    inputs: Tensor
    """(N, C, H, W), as the model takes them."""
    shown: Tensor
    """(N, C, H, W), as people see them, in [0, 1]."""
    names: tuple[str, ...]
    """N names, such as files."""
    class_names: tuple[str, ...]
    """Of the chosen classes."""
    labels: tuple[int | None, ...] | None = None
    """N true classes as outputs of the model, where they are known."""


Backends = Mapping[str, type[Attribution] | Heatmap]


def prepare(
    configuration: StudyConfiguration,
    material: Sequence[Material] | None = None,
    *,
    heatmaps: Backends | None = None,
) -> PreparedStudy:
    """Write a prepared study into the folder that the configuration names.

    Args:
        configuration: All settings.
        material: Images and explainers of each data set. None opens those that the configuration names.
        heatmaps: Backends by the name in a stage such as ``single:GradCam``, for example ``{"GradCam":
            FromCaptum(LayerGradCam, layer="features.34")}``. Other names are looked up in the configuration's
            ``backends`` and in ``captum.attr``.

    Raises:
        ValueError: If images are too few, the folder holds a study that has begun, an explainer is missing, or there is
            no backend of a name.
    """
    named = {heatmap_of(stage) for arm in configuration.arms for stage in arm.stages} - {None}
    wanted = {str(name) for name in named} | {settings.heatmap for settings in configuration.datasets}
    backends = {name: _backend(name, configuration.backends) for name in sorted(wanted - set(heatmaps or ()))}
    backends |= heatmaps or {}
    folder = Path(configuration.out)
    if (folder / ANSWERS_FILE).exists():
        raise ValueError(f"a study has begun in {str(folder)!r}; prepare into another folder with --out")
    (folder / MEDIA_FOLDER).mkdir(parents=True, exist_ok=True)
    for old in (folder / MEDIA_FOLDER).glob("m-*.json"):
        old.unlink()
    (folder / STUDY_FILE).unlink(missing_ok=True)  # a study is there once it is whole
    writer = _Media(folder / MEDIA_FOLDER, configuration.seed)
    datasets = []
    for number, settings in enumerate(configuration.datasets):
        found = read_material(settings, backends[settings.heatmap]) if material is None else material[number]
        datasets.append(_Rendering(configuration, settings, found, backends, writer).render())
    practice = practice_batch(configuration.seed)
    media, private = practice
    visual = any(stage != "none" for arm in configuration.arms for stage in arm.stages)
    writer.write("practice", {"images": [i if visual else {**i, "maps": []} for i in media]})
    facts = {
        "title": configuration.title,
        "consent": list(configuration.consent),
        "contact": configuration.contact,
        "seed": configuration.seed,
        "none_first": configuration.none_first,
        "background": configuration.background,
        "practice": configuration.practice,
        "attention": configuration.attention,
        "arms": [asdict(arm) for arm in configuration.arms],
        "exclusions": asdict(configuration.exclusions),
        "backends": dict(configuration.backends),
        "practice_batch": {"groups": 3, "images": private},
        "datasets": datasets,
        "media": writer.names,
    }
    study = PreparedStudy.of(folder, json.loads(json.dumps(facts)))
    study.write()
    return study


def _backend(name: str, backends: Mapping[str, Mapping[str, Any]]) -> type[Attribution] | Heatmap:
    """Return the backend of a name, with the settings that the configuration has for it."""
    settings = {key: _tuples(value) for key, value in backends.get(name, {"method": name}).items()}
    method = heatmap_named(str(settings.pop("method")))
    if isinstance(settings.get("attribution_method"), str):
        settings["attribution_method"] = heatmap_named(settings["attribution_method"])
    if not settings:
        return method
    try:
        return FromCaptum(method, **settings) if isinstance(method, type) else ExcitationMaps(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings do not fit the backend {name!r}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read_material(settings: DatasetSettings, heatmap: type[Attribution] | Heatmap | None = None) -> Material:
    """Open a data set as the settings name it.

    Args:
        settings: Settings of the data set. The ``config.toml`` beside its folder of explainers names the model.
        heatmap: Backend that draws the maps of x-features; None takes the default.

    Raises:
        ValueError: If anything is missing or unreadable.
    """
    beside = Path(settings.explainer, CONFIGURATION_FILE)
    base = beside if beside.is_file() else None
    opened = ModelAndInputs.of(Configuration.read(base, {"data": settings.data, "targets": list(settings.classes)}))
    xnn = XNNAttribution.load(
        settings.explainer,
        opened.model,
        heatmap=opened.heatmap_or_default(heatmap),
        prediction_transform=opened.prediction_transform,
    )
    opened.targets(xnn)
    inputs: list[Tensor] = []
    shown: list[Tensor] = []
    names: list[str] = []
    for batch in opened.inputs:
        if batch.images is None:
            raise ValueError(
                f"inputs in {settings.data!r} are {tuple(batch.inputs.shape)}; people look at images, (N, 1, H, W) or "
                "(N, 3, H, W)"
            )
        inputs.append(batch.inputs)
        shown.append(batch.images)
        names += batch.names
    class_names = opened.model_file.classes or ()
    labels = tuple(_label(name, class_names) for name in names) if settings.labels else None
    called = tuple(class_names[c] if c < len(class_names) else f"class {c}" for c in settings.classes)
    return Material(xnn, torch.cat(inputs), torch.cat(shown), tuple(names), called, labels)


def _label(name: str, class_names: Sequence[str]) -> int | None:
    """Return the class that the first folder of a path names; None if it is not the name of a class."""
    folder = name.split("/")[0]
    if folder in class_names:
        return list(class_names).index(folder)
    return int(folder) if folder.isdecimal() else None


class _Media:
    """Writes media under random names, which do not reveal a class."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.names: dict[str, str] = {}
        self._generator = random.Random(f"{seed}/media")

    def write(self, key: str, content: dict[str, Any]) -> None:
        self.names[key] = f"m-{self._generator.getrandbits(64):016x}.json"
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        replace_file(self.folder / self.names[key], text.encode())


class _Rendering:
    """Draws the batches of one data set and renders what each arm's stages show of them."""

    def __init__(
        self,
        configuration: StudyConfiguration,
        settings: DatasetSettings,
        material: Material,
        backends: Backends,
        media: _Media,
    ) -> None:
        self.configuration, self.settings, self.material, self.media = configuration, settings, material, media
        self.backends = backends
        self._maps: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        self._why: dict[tuple[int, int], dict[str, Any]] = {}

    def render(self) -> dict[str, Any]:
        """Write the media of the data set, and return its entry in ``study.json``."""
        settings, arms = self.settings, self.configuration.arms
        tasks = {arm.task for arm in arms}
        self.outputs = self._outputs()
        self.given = self.outputs.argmax(1).tolist()
        if "agreement" in tasks and (self.material.labels is None):
            raise ValueError(
                f"{settings.name!r} has no true classes for the agreement task; set labels = true and sort the images "
                "into folders of their classes"
            )
        rows, examples = self._draw(with_examples=tasks != {"sort"})
        generator = random.Random(f"{self.configuration.seed}/ids/{settings.name}")
        used = [row for batch in rows for row in batch] + examples
        self.ids = {row: f"i{generator.getrandbits(48):012x}" for row in used}
        self._draw_maps(used)
        for arm in arms:
            for stage in arm.stages:
                for b, batch in enumerate(rows):
                    self._write(arm, stage, b, batch)
        for arm in arms:
            if arm.task != "sort":
                for stage in {"none", *(arm.stages if arm.task == "prediction" else ())}:
                    self._write_examples(arm, stage, examples)
        return {
            "name": settings.name,
            "title": settings.title or settings.name,
            "classes": list(settings.classes),
            "class_names": list(self.material.class_names),
            "images": [self._facts(row) for row in used],
            "batches": [[self.ids[row] for row in batch] for batch in rows],
            "examples": [self.ids[row] for row in examples],
        }

    def _outputs(self) -> Tensor:
        from captum_xnn.activations import collect

        xnn = self.material.xnn
        parts = list(torch.split(self.material.inputs, _OUTPUTS_AT_ONCE))
        y_hat = collect(
            xnn.model,
            xnn.layer,
            parts,
            output_transform=xnn.output_transform,
            prediction_transform=xnn.prediction_transform,
        ).y_hat[:]
        if y_hat.dim() != 2 or y_hat.shape[1] <= max(self.settings.classes):
            raise ValueError(
                f"the model's outputs are {tuple(y_hat.shape)}, without some of the classes "
                f"{list(self.settings.classes)}; write classes that the model has"
            )
        return y_hat.detach().cpu()

    def _draw(self, *, with_examples: bool) -> tuple[list[list[int]], list[int]]:
        """Return the rows of each batch and of the examples, all different."""
        size, count = self.configuration.batch_images, self.configuration.batches
        classes = list(self.settings.classes)
        generator = random.Random(f"{self.configuration.seed}/draw/{self.settings.name}")
        pool = {c: [row for row, given in enumerate(self.given) if given == c] for c in classes}
        if "agreement" in {arm.task for arm in self.configuration.arms}:
            labels = self.material.labels or ()
            pool = {c: [row for row in rows if labels[row] is not None] for c, rows in pool.items()}
        for rows in pool.values():
            generator.shuffle(rows)
        shuffled = generator.sample(classes, len(classes))
        examples: list[int] = []
        wanted = {c: _EXAMPLES if with_examples else 0 for c in classes}
        batches: list[list[int]] = []
        turn = 0
        plans = []
        for _ in range(count):
            share = {c: size // len(classes) for c in classes}
            for _ in range(size % len(classes)):
                share[shuffled[turn % len(classes)]] += 1
                turn += 1
            plans.append(share)
        for c in classes:
            needed = wanted[c] + sum(share[c] for share in plans)
            if len(pool[c]) < needed:
                raise ValueError(
                    f"the model gives class {c} to {len(pool[c])} images of {self.settings.name!r}, and {count} "
                    f"batches of {size} need {needed}; add images, or ask for fewer batches"
                )
        for c in classes:
            examples += [pool[c].pop() for _ in range(wanted[c])]
        for share in plans:
            batch = [pool[c].pop() for c in classes for _ in range(share[c])]
            generator.shuffle(batch)
            batches.append(batch)
        return batches, examples

    def _facts(self, row: int) -> dict[str, Any]:
        labels = self.material.labels
        return {
            "id": self.ids[row],
            "source": str(self.material.names[row]).encode(errors="replace").decode(),
            "given": self.given[row],
            "label": None if labels is None else labels[row],
            **self._why[row, self.given[row]],
        }

    def _draw_maps(self, rows: Sequence[int]) -> None:
        """Draw the maps of all stages, for the class that the model gives; for the distinction, for all classes."""
        own = {(row, self.given[row]) for row in rows}
        every = {(row, c) for row in rows for c in self.settings.classes}
        wanted: dict[str, set[tuple[int, int]]] = {"xnn": own}
        for arm in self.configuration.arms:
            for stage in arm.stages:
                if stage != "none":
                    wanted[stage] = wanted.get(stage, set()) | (every if arm.task == "distinction" else own)
        jobs = [
            (stage, pairs[i : i + _MAPS_AT_ONCE])
            for stage, pairs in ((stage, sorted(found)) for stage, found in wanted.items())
            for i in range(0, len(pairs), _MAPS_AT_ONCE)
        ]
        for stage, pairs in tqdm(jobs, f"drawing {self.settings.name}", disable=None, leave=False):
            inputs = self.material.inputs[[row for row, _ in pairs]]
            targets = [target for _, target in pairs]
            if stage == "xnn":
                self._explain(inputs, pairs, targets)
            else:
                self._draw_single(stage, inputs, pairs, targets)

    def _explain(self, inputs: Tensor, pairs: Sequence[tuple[int, int]], targets: list[int]) -> None:
        why = self.material.xnn.explain(inputs, target=targets, internal_batch_size=_OUTPUTS_AT_ONCE)
        heat = channels_first(why.directed_maps().detach(), inputs).sum(2).cpu()
        for i, pair in enumerate(pairs):
            contributions = why.contributions[i].detach().double().cpu()
            self._why[pair] = {
                "prediction": float(why.prediction[i]),
                "surrogate": float(why.surrogate[i]),
                "bias": float(why.bias[i]),
                "contributions": contributions.tolist(),
            }
            total = float(contributions.abs().sum())
            scaled = torch.from_numpy(own_scale(heat[i], contributions)).float()
            self._maps[("xnn", *pair)] = [
                {"src": overlay(m, size=_MAP), "c": round(c / total, 4) if total > 0 else 0.0}
                for m, c in zip(scaled, contributions.tolist(), strict=True)
            ]

    def _draw_single(self, stage: str, inputs: Tensor, pairs: Sequence[tuple[int, int]], targets: list[int]) -> None:
        xnn = self.material.xnn
        own = None if isinstance(xnn.heatmap, DefaultMaps) else xnn.heatmap
        backend = self.backends.get(heatmap_of(stage) or "", own)
        one = OneHeatmap(xnn.model, backend, prediction_transform=xnn.prediction_transform)
        maps = one.attribute(inputs, target=targets, internal_batch_size=_OUTPUTS_AT_ONCE)
        for pair, heat in zip(pairs, channels_first(maps.detach(), inputs).sum(2).cpu(), strict=True):
            scaled = torch.from_numpy(own_scale(heat, np.ones(1))).float()
            self._maps[(stage, *pair)] = [{"src": overlay(scaled[0], size=_MAP)}]

    def _shown_maps(self, stage: str, row: int, target: int) -> list[dict[str, Any]]:
        return [] if stage == "none" else self._maps[stage, row, target]

    def _photo(self, row: int) -> dict[str, Any]:
        image = displayable(self.material.shown[row])
        small = max(image.shape[1:]) <= _SMALL
        source = photo(image, size=self.configuration.image_size)
        ratio = round(image.shape[2] / image.shape[1], 4)
        return {"id": self.ids[row], "src": source, "pixels": small, "ratio": ratio}

    def _write(self, arm: Arm, stage: str, b: int, rows: Sequence[int]) -> None:
        key = f"{self.settings.name}/{b}/{stage}/{arm.task}"
        if key in self.media.names:
            return
        images = []
        for row in rows:
            image, given = self._photo(row), self.given[row]
            if arm.task in ("sort", "agreement"):
                image["maps"] = self._shown_maps(stage, row, given)
            if arm.task == "agreement":
                image["says"] = list(self.settings.classes).index(given)
            if arm.task == "distinction":
                image["options"] = [self._shown_maps(stage, row, c) for c in self.settings.classes]
            images.append(image)
        self.media.write(key, {"images": images})

    def _write_examples(self, arm: Arm, stage: str, examples: Sequence[int]) -> None:
        key = f"{self.settings.name}/examples/{stage}/{arm.task}"
        if key in self.media.names:
            return
        classes = list(self.settings.classes)
        self.media.write(
            key,
            {
                "images": [
                    {
                        **self._photo(row),
                        "group": classes.index(self.given[row]),
                        "maps": self._shown_maps(stage, row, self.given[row]),
                    }
                    for row in examples
                ]
            },
        )


def practice_batch(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return six drawn shapes, two of each kind: their media for participants, and their entry in the study.

    Each shape has two maps. Participants learn every control of the page on images that teach nothing about the study.

    Args:
        seed: Seed of the shapes' places.

    Example:
        >>> shown, kinds = practice_batch(0)
        >>> len(shown), sorted(image["given"] for image in kinds), sorted(shown[0])
        (6, [0, 0, 1, 1, 2, 2], ['id', 'maps', 'pixels', 'src'])
    """
    generator = random.Random(f"{seed}/practice")
    shown, kinds = [], []
    for kind in (0, 1, 2):
        for colour in ((0.86, 0.55, 0.20), (0.30, 0.55, 0.75)):
            name = f"p{generator.getrandbits(48):012x}"
            mask, edge = _shape(kind, generator)
            image = torch.full((3, 120, 120), 0.94)
            for channel, value in enumerate(colour):
                image[channel][mask] = value
            share = (0.5, -0.7, 0.8)[kind]
            maps = [
                {"src": overlay(edge * (1 if share > 0 else -1)), "c": share},
                {"src": overlay(mask.float() * (1 - abs(share))), "c": round(1 - abs(share), 4)},
            ]
            shown.append({"id": name, "src": photo(image), "pixels": False, "maps": maps})
            kinds.append({"id": name, "given": kind})
    order = generator.sample(range(6), 6)
    return [shown[i] for i in order], [kinds[i] for i in order]


def _shape(kind: int, generator: random.Random) -> tuple[Tensor, Tensor]:
    """Return where a disc, a square or a triangle is, and its edge, both (120, 120)."""
    size, x0, y0 = generator.uniform(24, 34), generator.uniform(48, 72), generator.uniform(48, 72)
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    x, y = x - x0, y - y0
    if kind == 0:
        distance = (x**2 + y**2).sqrt() - size
    elif kind == 1:
        distance = torch.maximum(x.abs(), y.abs()) - 0.85 * size
    else:
        slope = math.sqrt(3)
        distance = torch.maximum(y - size / 2, (slope * x.abs() - y) / 2 - size / 2)
    edge = torch.exp(-((distance / 4) ** 2))
    return distance <= 0, edge
