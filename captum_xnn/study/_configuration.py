"""Read the configuration of a human study from a TOML file.

Example of a file::

    title = "Telling gulls apart"
    out = "study"
    heatmaps = ["ExcitationMaps", "Cam"]          # one arm each: none, single, xnn

    [backends.Cam]
    method = "LayerGradCam"
    layer = "features.34"

    [[datasets]]
    name = "gulls"
    explainer = "explainers/gulls"                # the folder that `captum-xnn fit` saved to
    data = "images/gulls"
    classes = [12, 13, 14, 15]

Relative paths count from the file's folder.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CONSENT", "TASKS", "Arm", "DatasetSettings", "Exclusions", "StudyConfiguration", "heatmap_of"]

TASKS = ("sort", "agreement", "distinction", "prediction")
"""Sort images into groups (the paper); rate the model's answer; find it among explanations; predict it."""

CONSENT = (
    "You are invited to take part in a research study about explanations of image classifiers. You will look at small "
    "pictures and answer questions about them. It takes about half an hour.",
    "Taking part is voluntary. You may stop at any time, without giving a reason and without disadvantage: close the "
    "page, or choose “Withdraw”, which deletes all your answers.",
    "We store your answers, the moves you make on this page and their times, under a random code. We store no name, no "
    "address of your computer and nothing about your browser. Please write nothing about yourself into the comments.",
    "There are no known risks. The anonymous answers may be published with the results.",
)
"""Paragraphs of the consent page, to be adapted to the rules of your institution."""

_NAME = re.compile(r"[A-Za-z0-9]{1,32}")


@dataclass(frozen=True)
class DatasetSettings:
    """One data set of a study."""

    name: str
    """Short name of letters and digits, for files and tables."""
    explainer: str
    """Folder that ``captum-xnn fit`` saved to; ``config.toml`` beside it names the model."""
    data: str
    """Folder of images, or an array, as ``captum-xnn explain`` takes it."""
    classes: tuple[int, ...]
    """The model's outputs among which people tell images apart."""
    title: str = ""
    """Title for participants; the name, if empty."""
    labels: bool = False
    """Whether the first folder in an image's path names its true class, as the model's ``CLASSES`` or as a number."""
    heatmap: str = "ExcitationMaps"
    """Backend of the x-features' maps, and of a stage ``single`` that names none."""


@dataclass(frozen=True)
class Arm:
    """One arm of a study: people who go through the same stages."""

    name: str
    stages: tuple[str, ...]
    """Among ``none``, ``single``, ``single:HEATMAP`` and ``xnn``."""
    task: str = "sort"
    """``sort``, ``agreement``, ``distinction`` or ``prediction``."""


@dataclass(frozen=True)
class Exclusions:
    """Rules that leave participants or trials out of the analysis, fixed before the first answer."""

    unfinished: bool = True
    """Leave out participants who did not come to the end."""
    failed_attention: bool = True
    """Leave out participants who missed the attention check."""
    min_practice_purity: float = 0.0
    """Leave out participants whose purity in the practice batch is lower."""
    min_trial_seconds: float = 0.0
    """Leave out trials that took less time."""


@dataclass(frozen=True)
class StudyConfiguration:
    """All settings of a study.

    Raises:
        ValueError: If a setting has the wrong type or is out of range.

    Example:
        >>> gulls = DatasetSettings("gulls", "explainers", "images", (12, 13))
        >>> [arm.stages for arm in StudyConfiguration((gulls,), heatmaps=("DeepLift",)).arms]
        [('none', 'single:DeepLift', 'xnn')]
    """

    datasets: tuple[DatasetSettings, ...]
    title: str = "Sorting images"
    out: str = "study"
    """Folder of the prepared study."""
    seed: int = 0
    """Seeds the draw of batches and the order of everything."""
    batches: int = 5
    """Fixed batches of each data set. A participant sees each at most once."""
    batch_images: int = 10
    heatmaps: tuple[str, ...] = ("ExcitationMaps",)
    """Backends of the 1-Heatmap; each makes an arm with the stages none, single and xnn, unless ``arms`` are given."""
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Backends with settings of their own, by a name that stages use: ``method`` names the class, the rest are its
    settings, such as ``{"Cam": {"method": "LayerGradCam", "layer": "features.34"}}``."""
    arms: tuple[Arm, ...] = ()
    none_first: bool = True
    """Whether the stage without visualisation comes first, as in the paper."""
    background: bool = True
    """Whether to ask for age, gender and courses, each optional (the paper's appendix I.2)."""
    practice: bool = True
    """Whether a practice batch of drawn shapes comes first."""
    attention: bool = True
    """Whether one question checks attention."""
    image_size: int = 240
    """Pixels of an image's longer side on the page at most."""
    consent: tuple[str, ...] = CONSENT
    """Paragraphs that participants agree to."""
    contact: str = ""
    """Who answers questions, such as an e-mail address."""
    exclusions: Exclusions = field(default_factory=Exclusions)

    def __post_init__(self) -> None:
        if not self.arms:
            made = tuple(Arm(name, ("none", f"single:{name}", "xnn")) for name in self.heatmaps)
            object.__setattr__(self, "arms", made)
        _check(self)

    @classmethod
    def read(cls, path: str | os.PathLike[str], overriding: Mapping[str, Any] | None = None) -> StudyConfiguration:
        """Read a configuration from a TOML file.

        Args:
            path: The file.
            overriding: Settings that replace the file's, by name.

        Raises:
            ValueError: If the file cannot be read, or a setting is unknown or wrong.
        """
        try:
            given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"the study in {str(path)!r} cannot be read ({error.strerror}); pass the path of a study.toml"
            ) from error
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not TOML: {error}; correct that line") from error
        root = Path(path).absolute().parent
        settings = {"out": "study", **given}
        settings["out"] = _located(root, settings["out"])
        settings |= {name: value for name, value in (overriding or {}).items() if value is not None}
        for dataset in _tables(settings, "datasets"):
            for name in ("explainer", "data"):
                if isinstance(dataset.get(name), str):
                    dataset[name] = _located(root, dataset[name])
        return cls.of(settings, str(path))

    @classmethod
    def of(cls, settings: Mapping[str, Any], source: str = "the settings") -> StudyConfiguration:
        """Build a configuration from settings as TOML gives them.

        Args:
            settings: Settings by name; ``datasets`` and ``arms`` are lists of mappings, ``exclusions`` a mapping.
            source: Name of the source in errors.

        Raises:
            ValueError: If a name is unknown, or a value is wrong.
        """
        given = dict(settings)
        if isinstance(given.get("consent"), str):
            given["consent"] = [part.strip() for part in given["consent"].split("\n\n") if part.strip()]
        try:
            given["datasets"] = tuple(_made(DatasetSettings, d, source) for d in _tables(given, "datasets"))
            given["arms"] = tuple(_made(Arm, a, source) for a in _tables(given, "arms"))
            given["exclusions"] = _made(Exclusions, given.get("exclusions", {}), source)
            made: StudyConfiguration = _made(cls, given, source)
        except TypeError as error:
            raise ValueError(f"settings of {source} do not fit a study: {error}; compare with the docs") from error
        return made


def heatmap_of(stage: str) -> str | None:
    """Return the backend that a ``single`` stage names; None for all other stages and for ``single`` without a name.

    Args:
        stage: A stage, such as ``single:DeepLift``.

    Example:
        >>> heatmap_of("single:DeepLift"), heatmap_of("xnn")
        ('DeepLift', None)
    """
    return stage.partition(":")[2] or None


def _located(root: Path, path: Any) -> Any:
    return os.path.normpath(root / Path(path).expanduser()) if isinstance(path, str) else path


def _tables(settings: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    tables = settings.get(name, [])
    if not isinstance(tables, Sequence) or not all(isinstance(table, Mapping) for table in tables):
        raise ValueError(f"{name} is {tables!r}, not tables; begin each with a line [[{name}]]")
    return list(tables)


def _made(form: type[Any], settings: Mapping[str, Any], source: str) -> Any:
    """Build a dataclass from settings, with lists as tuples."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"{source} is {settings!r}, not a table; write its settings below a line in brackets")
    allowed = [f.name for f in fields(form)]
    for name in settings:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5) or allowed
            raise ValueError(f"{source} has an unknown setting {name!r}; near names: {', '.join(near)}")
    return form(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})


def _check(study: StudyConfiguration) -> None:
    """Raise ValueError for the first setting that is wrong."""
    for name, least in (("batches", 1), ("batch_images", 2), ("seed", 0), ("image_size", 16)):
        value = getattr(study, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; write a whole number from {least}")
    rules = study.exclusions
    for name, highest in (("min_practice_purity", 1.0), ("min_trial_seconds", float("inf"))):
        value = getattr(rules, name)
        if type(value) not in (int, float) or not 0 <= value <= highest:
            raise ValueError(f"{name} of the exclusions is {value!r}; write a number from 0 to {highest:g}")
    if type(rules.unfinished) is not bool or type(rules.failed_attention) is not bool:
        raise ValueError("unfinished and failed_attention of the exclusions must be true or false")
    if not study.datasets:
        raise ValueError("the study has no data set; add a table [[datasets]]")
    backends = study.backends
    if not isinstance(backends, Mapping) or not all(isinstance(b, Mapping) for b in backends.values()):
        raise ValueError(f"backends is {backends!r}; write a table [backends.NAME] for each backend")
    for name, settings in backends.items():
        if not isinstance(settings.get("method"), str):
            raise ValueError(
                f"method of the backend {name!r} is {settings.get('method')!r}, not the name of a class; write method "
                '= "DeepLift"'
            )
    names_of = {"data set": [d.name for d in study.datasets], "arm": [a.name for a in study.arms]}
    for noun, names in (*names_of.items(), ("backend", list(backends))):
        wrong = [n for n in names if not isinstance(n, str) or not _NAME.fullmatch(n)]
        if wrong or len(set(names)) < len(names):
            raise ValueError(
                f"names of {noun}s are {wrong or names}; give each a name of its own, of up to 32 letters and digits, "
                "as Psych-DS allows no others in names of files"
            )
    for d in study.datasets:
        classes = d.classes
        if len(set(classes)) < 2 or len(set(classes)) < len(classes) or any(type(c) is not int for c in classes):
            raise ValueError(f"classes of {d.name!r} are {list(classes)}; write two or more outputs")
        if not 2 <= len(classes) <= 9:
            raise ValueError(f"{d.name!r} has {len(classes)} classes; write at most 9, one for each key")
    for arm in study.arms:
        _check_arm(arm, study.batches)


def _check_arm(arm: Arm, batches: int) -> None:
    if arm.task not in TASKS:
        raise ValueError(f"task of arm {arm.name!r} is {arm.task!r}; write one of {', '.join(TASKS)}")
    wrong = [s for s in arm.stages if s.partition(":")[0] not in ("none", "single", "xnn") or s.startswith("xnn:")]
    if wrong or not arm.stages or len(set(arm.stages)) < len(arm.stages):
        raise ValueError(
            f"stages of arm {arm.name!r} are {list(arm.stages)}; write different ones of none, single, single:HEATMAP "
            "and xnn"
        )
    if "none" in arm.stages and arm.task == "distinction":
        raise ValueError(f"arm {arm.name!r} has the stage none, without explanations to choose among; leave it out")
    if len(arm.stages) > batches:
        raise ValueError(
            f"arm {arm.name!r} has {len(arm.stages)} stages and {batches} batches, and no participant should see a "
            f"batch twice; ask for at least {len(arm.stages)} batches"
        )
