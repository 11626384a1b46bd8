"""Reports with a cache: other names cost no map, and whatever else changes is computed anew."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import DeepLift, InputXGradient, Saliency

from benchmarks import report_speed
from captum_xnn import XNNAttribution
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.report import ReportOptions
from captum_xnn.report._page import write_report


@pytest.fixture
def explains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of ``explain`` gets."""
    calls: list[int] = []
    explain = XNNAttribution._explain_and_read

    def counting(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(inputs))
        return explain(self, inputs, *args, **kwargs)

    monkeypatch.setattr(XNNAttribution, "_explain_and_read", counting)
    return calls


def write(folder: Path, explained: Any, **options: Any) -> str:
    xnn, images, target = explained
    return write_report(
        folder / "r.html", xnn, images[:9], target, ReportOptions(cache=folder / "cache", **options)
    ).read_text("utf-8")


def test_each_image_is_explained_once(explained: Any, explains: list[int], tmp_path: Path) -> None:
    write(tmp_path, explained)
    assert sum(explains) == 9


def test_other_names_take_no_map_and_give_the_page_of_a_new_report(
    explained: Any, explains: list[int], tmp_path: Path
) -> None:
    xnn, images, target = explained
    write(tmp_path, explained, patches=1)
    done = len(explains)
    changed = {"names": {1: {0: "bar"}}, "title": "Named", "notes": [("A", "B")], "patches": 1}
    cached = write(tmp_path, explained, **changed)
    assert len(explains) == done
    fresh = write_report(tmp_path / "fresh.html", xnn, images[:9], target, ReportOptions(**changed))
    assert fresh.read_text("utf-8") == cached and "Named" in cached


def places(value: Any, at: str = "") -> set[str]:
    """All places in the content of a page: keys of dicts, with one name for the entries of lists."""
    if isinstance(value, dict):
        # Names of targets and groups of the data are no part of the form.
        return {at}.union(*(places(v, f"{at}.{key}") for key, v in value.items()))
    if isinstance(value, list):
        return {at}.union(*(places(v, f"{at}[]") for v in value))
    return {f"{at}: {'number' if type(value) in (int, float) else type(value).__name__}"}


def test_form_of_the_kept_content_has_its_own_format(explained: Any, tmp_path: Path) -> None:
    """Content of another form would be read by templates that do not know it: raise ``_FORMAT`` with it."""
    from captum_xnn.report import _cache

    xnn, images, target = explained
    write(tmp_path, (xnn.with_heatmap(InputXGradient), images, target), patches=1)
    table = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    rows = XNNAttribution(model, "1", 2).fit(table, progress=False)
    write_report(tmp_path / "t.html", rows, table, None, ReportOptions(cache=tmp_path / "cache", patches=2))
    contents = sorted((tmp_path / "cache").glob("*/content.json"))
    assert len(contents) == 2
    found = set().union(*(places(json.loads(content.read_text())) for content in contents))
    digest = hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:12]
    assert {_cache._FORMAT: digest} == {11: "222194f41d36"}, (
        "raise _FORMAT in report/_cache.py, and write its digest here"
    )


def other_weights(xnn: XNNAttribution) -> XNNAttribution:
    model = copy.deepcopy(xnn.model)
    model[5].weight[0, 0] += 1e-3
    other = XNNAttribution(model, "4", 3, heatmap=InputXGradient)
    other.explainers_ = xnn.explainers_
    return other


def other_forward(xnn: XNNAttribution) -> XNNAttribution:
    """The same weights in a model that computes something else."""

    class Sequential(torch.nn.Sequential):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    Sequential.__name__ = type(xnn.model).__name__
    other = XNNAttribution(Sequential(*copy.deepcopy(xnn.model)), "4", 3, heatmap=InputXGradient)
    other.explainers_ = xnn.explainers_
    return other


def other_explainer(xnn: XNNAttribution) -> XNNAttribution:
    other = copy.copy(xnn)
    other.explainers_ = copy.deepcopy(xnn.explainers_)
    form: Any = other.explainer(1).form
    form.head.bias.add_(1e-3)
    return other


@pytest.mark.filterwarnings("ignore:.*changed after the explainer")
@pytest.mark.parametrize(
    "change",
    [
        lambda x, i: (other_weights(x), i, {}),
        lambda x, i: (other_forward(x), i, {}),
        lambda x, i: (other_explainer(x), i, {}),
        lambda x, i: (x.with_heatmap(Saliency), i, {}),
        lambda x, i: (x, torch.cat([i[:8], i[8:9] + 1e-3]), {}),
        lambda x, i: (x, i[[1, 0, 2, 3, 4, 5, 6, 7, 8]], {}),
        lambda x, i: (x, i, {"class_names": ["red", "green", "blue"]}),
        lambda x, i: (x, i, {"captions": list("abcdefghi")}),
        lambda x, i: (x, i, {"data": i.repeat(2, 1, 1, 1)}),
        lambda x, i: (x, i, {"patches": 1}),
        lambda x, i: (x, i, {"again": other_explainer(x)}),
        lambda x, i: (x, i, {"display": lambda image: 1 - image.clamp(0, 1)}),
    ],
    ids=[
        "weights", "forward", "explainer", "heatmap", "image", "order", "class names", "captions", "data", "patches",
        "again", "display",
    ],
)  # fmt: skip
def test_what_changes_the_page_is_computed_anew(
    explained: Any, explains: list[int], tmp_path: Path, change: Any
) -> None:
    xnn, images, target = explained
    write(tmp_path, explained)
    done = len(explains)
    other, inputs, options = change(xnn, images[:9])
    kept = ReportOptions(cache=tmp_path / "cache", **options)
    text = write_report(tmp_path / "r.html", other, inputs, target, kept).read_text("utf-8")
    assert len(explains) > done
    fresh = write_report(tmp_path / "fresh.html", other, inputs, target, ReportOptions(**options))
    assert fresh.read_text("utf-8") == text


@pytest.mark.parametrize("file", ["content.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["", "{}", "cut"])
def test_damaged_entry_is_computed_anew(
    explained: Any, explains: list[int], tmp_path: Path, file: str, damage: str
) -> None:
    first = write(tmp_path, explained)
    done = len(explains)
    (entry,) = (tmp_path / "cache").glob(f"*/{file}")
    entry.write_text(entry.read_text()[:-9] if damage == "cut" else damage)
    assert write(tmp_path, explained) == first and len(explains) > done


def test_oldest_entries_go_and_other_folders_stay(explained: Any, tmp_path: Path) -> None:
    mine = tmp_path / "cache" / "mine"
    mine.mkdir(parents=True)
    (mine / "manifest.json").write_text("{}")
    for i in range(7):
        write(tmp_path, explained, captions=[f"{i}"] * 9)
    assert mine.is_dir()
    assert len(list((tmp_path / "cache").iterdir())) <= 5


@pytest.mark.parametrize(
    "backend",
    [FromCaptum(DeepLift, baselines=torch.zeros(1, 3, 24, 24)), FromCaptum(DeepLift, custom_attribution_func=write)],
)
def test_functions_and_arrays_cannot_be_compared(backend: Any) -> None:
    from captum_xnn.report import _cache

    assert _cache.re.search(_cache.VAGUE, repr(backend))
    assert not _cache.re.search(_cache.VAGUE, repr(FromCaptum(DeepLift, multiply_by_inputs=False)))


def test_report_that_cannot_be_kept_says_so(explained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def places(batch: Any, rows: Any, maps: Any) -> Any:
        return torch.ones(len(maps), 3, 1)

    with caplog.at_level(logging.WARNING, "captum_xnn"):
        write(tmp_path, explained, places=places)
    assert "a function in it cannot be compared" in caplog.text and not (tmp_path / "cache").exists()
    caplog.clear()
    (tmp_path / "cache").write_text("a file in its place")
    with caplog.at_level(logging.WARNING, "captum_xnn"):
        assert "<h1>" in write(tmp_path, explained)
    assert "is not kept in" in caplog.text


def test_benchmark_compares_a_report_with_its_maps(
    torchvision: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_speed.main(images=6, rounds=1, out=tmp_path, maps=True)
    said = capsys.readouterr().out
    assert said.startswith("6 images, ResNet-18: the report takes ") and "(median of 1, bar 1.5)" in said
    report, maps, ratio = (float(part) for part in re.findall(r"[0-9.]+(?= s)|(?<=ratio )[0-9.]+", said))
    assert ratio == pytest.approx(report / maps, abs=0.1 + 0.1 / maps * ratio)


def test_outputs_of_the_images_cost_no_pass_of_their_own(explained: Any, tmp_path: Path) -> None:
    xnn, images, target = explained
    passes: list[int] = []
    hook = xnn.model[5].register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    try:
        xnn._explain_and_read(images[:9], target)
        xnn.one_heatmap(images[:9], target)
        alone = len(passes)
        write_report(tmp_path / "r.html", xnn, images[:9], target, ReportOptions())
    finally:
        hook.remove()
    assert len(passes) == 2 * alone
