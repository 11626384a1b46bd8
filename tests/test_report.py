"""Reports: every number is there, nothing is loaded, texts stay texts, and an older report survives a failure."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from captum_xnn import XNNAttribution
from captum_xnn.datasets._parts import PartsSample
from captum_xnn.layers._targets import Difference
from captum_xnn.metrics import typicality
from captum_xnn.patch_scores import patch_scores
from captum_xnn.plots import write_names
from captum_xnn.report import ReportOptions
from captum_xnn.report._cards import feature_cards
from captum_xnn.report._output_names import OutputNames
from captum_xnn.report._page import write_report
from captum_xnn.report._thumbnails import overlay
from captum_xnn.report._typicality import mark_usual
from captum_xnn.report._verdict import format_error

# Elements that HTML never closes, and those of SVG that close themselves.
VOID = {"meta", "img", "input", "link"}
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&\u2028"


class Page(HTMLParser):
    """What a report holds: elements with attributes, visible text, scripts, and what is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
        elif data.strip():
            self.text.append(data.strip())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> Any:
        """What the page's script reads."""
        return json.loads(self.raw["script"][0])


def written(path: Path, explained: Any, n: int = 9, target: Any = None, **options: Any) -> tuple[str, Page]:
    xnn, images, own = explained
    path = write_report(path, xnn, images[:n], own if target is None else target, ReportOptions(**options))
    text = path.read_text("utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def page(explained: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    _, images, _ = explained
    return written(
        tmp_path_factory.mktemp("page") / "r.html",
        explained,
        target=[1, 2],
        data=images,
        class_names=["red", "green", "blue"],
        captions=[f"{i}.png" for i in range(9)],
        title="Bars",
        notes=[("A note", "First.\nStill first.\n\nSecond.")],
    )


@pytest.fixture(scope="module")
def compared(explained: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[XNNAttribution, dict[str, Any]]:
    """A page about groups of two outputs, compared with the second."""
    xnn, images, _ = explained
    groups = XNNAttribution(xnn.model, xnn.layer, 3).fit(images, [1, 2], progress=False)
    options = {"against": 2, "class_names": ["red", "green", "blue"], "cache": tmp_path_factory.mktemp("cache")}
    for name in ("first", "again"):  # the second one from the cache
        _, parsed = written(options["cache"] / f"{name}.html", (groups, images, 1), target=[1, 2], **options)
    assert len(list(options["cache"].glob("*/*.json"))) == 2
    _, other = written(options["cache"] / "other.html", (groups, images, 1), target=[1, 2], **options | {"against": 0})
    assert other.data["targets"][0]["rows"][0]["rather"]["label"] == "green rather than red"
    return groups, parsed.data


def test_rows_have_the_numbers_and_maps_of_the_difference(compared: Any, explained: Any) -> None:
    from captum_xnn.plots import own_scale

    groups, data = compared
    made = groups.contributions(explained[1][:9], 1, against=2)
    for i, row in enumerate(data["targets"][0]["rows"]):
        rather = row["rather"]
        assert rather["label"] == "green rather than blue"
        assert rather["c"] == pytest.approx(made.contributions[i].tolist(), rel=1e-5)
        assert rather["bias"] + sum(rather["c"]) == pytest.approx(rather["sum"], abs=1e-3)
        assert rather["prediction"] == pytest.approx(float(made.prediction[i]), rel=1e-5)
    why = groups.explain(explained[1][:9], 1, against=2)
    for i, row in enumerate(data["targets"][0]["rows"]):
        scaled = torch.from_numpy(own_scale(why.directed_maps()[i], why.contributions[i])).float()
        assert row["rather"]["maps"] == [overlay(m) for m in scaled]
        assert row["rather"]["maps"] != row["maps"]
    assert all("rather" not in row for row in data["targets"][1]["rows"])  # an output is not compared with itself


def test_the_only_output_is_not_compared_with_itself(explained: Any, tmp_path: Path) -> None:
    """As in explain: the page had no second sentences, and said nothing."""
    xnn, images, _ = explained
    for target, against in ((1, 1), ([1], (1,)), (1, torch.tensor(1))):
        with pytest.raises(ValueError, match=r"target and against are both 1.*always 0; pass two outputs"):
            xnn.report(images[:4], tmp_path / "why.html", target, against=against)
    assert not (tmp_path / "why.html").exists()


def test_page_is_well_formed(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert text.startswith("<!DOCTYPE html>")
    assert parsed.open == []
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    pointing = {str(a[key]) for _, a in parsed.elements for key in ("aria-labelledby", "for") if key in a}
    pointing |= {str(a["href"])[1:] for a in parsed.named("a")}
    assert pointing <= set(ids)
    assert [tag for tag, _ in parsed.elements if tag == "h1"] == ["h1"]
    # Every control has a name: a label, an own text, or an aria-label.
    labelled = {a["for"] for a in parsed.named("label") if "for" in a}
    assert all(a["id"] in labelled for a in parsed.named("input") if a.get("class") == "name")


def test_numbers_are_those_of_the_explainer(page: tuple[str, Page], explained: Any) -> None:
    xnn, images, _ = explained
    data = page[1].data
    assert [t["key"] for t in data["targets"]] == ["1", "2"]
    assert [t["label"] for t in data["targets"]] == ["green", "blue"]
    given = xnn.model(images[:9]).argmax(1)
    for shown in data["targets"]:
        target = int(shown["key"])
        why = xnn.explain(images[:9], target=target)
        for i, row in enumerate(shown["rows"]):
            assert row["c"] == pytest.approx(why.contributions[i].tolist(), rel=1e-5)
            assert row["e"] == pytest.approx(why.features[i].tolist(), rel=1e-5)
            assert row["bias"] + sum(row["c"]) == pytest.approx(row["sum"], abs=1e-3)
            assert row["prediction"] == pytest.approx(float(why.prediction[i]), rel=1e-5)
            assert row["is_positive"] == (int(given[i]) == target)
            assert len(row["maps"]) == 3
            assert max(row["strength"]) == pytest.approx(1)
    names = ["red", "green", "blue"]
    assert [image["predicted_class"] for image in data["images"]] == [names[c] for c in given.tolist()]
    assert [image["caption"] for image in data["images"]] == [f"{i}.png" for i in range(9)]


def test_positives_are_compared_with_the_others_of_their_class(page: tuple[str, Page], explained: Any) -> None:
    xnn, images, target = explained
    own = xnn.model(images).argmax(1) == target
    usual = xnn.contributions(images[own], target).contributions.double()
    _, chance, share, deviations = typicality(usual)
    place = own.cumsum(0) - 1
    shown = page[1].data["targets"][0]["rows"]
    for i, row in enumerate(shown):
        assert ("usual" in row) == bool(own[i])
        if own[i]:
            k = row["usual"]["feature"]
            assert row["usual"]["share"] == pytest.approx(float(share[place[i]]), abs=1e-6)
            assert row["usual"]["unusual"] == bool(chance[place[i]] < 0.001)
            assert row["usual"]["deviations"] == pytest.approx(float(deviations[place[i], k]), rel=1e-3)
            assert abs(row["usual"]["deviations"]) >= float(deviations[place[i]].abs().max()) - 1e-3
    unusual = sum(row["usual"]["unusual"] for row in shown if row["is_positive"])
    said = " ".join(page[1].text)
    assert f"{unusual} of the 3 images below that the model calls green have unusual contributions" in said
    assert "compared with 30." in said


def _marked(contributions: torch.Tensor) -> tuple[Any, list[dict[str, Any]]]:
    rows = [{"is_positive": True, "c": [float(f"{v:.6g}") for v in c]} for c in contributions.tolist()]
    return mark_usual(rows, contributions), rows


def test_examples_compared_with_themselves_may_have_no_outlier_or_a_single_one() -> None:
    """Ranks said 1 of 40 for any 40 examples and none of 20, and the outlier was 4.2 standard deviations off."""
    usual = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    assert _marked(usual)[0] == (0, 40, 40)
    far = usual[:20].clone()
    far[4, 1] = 1000
    found, rows = _marked(far)
    assert found == (1, 20, 20)
    assert [i for i, row in enumerate(rows) if row["usual"]["unusual"]] == [4]
    assert rows[4]["usual"]["feature"] == 1 and rows[4]["usual"]["deviations"] > 900
    assert _marked(torch.full((25, 2), 0.1))[0] is None


def test_strange_image_of_the_class_is_unusual_and_few_images_tell_nothing(explained: Any, tmp_path: Path) -> None:
    xnn, images, target = explained
    own = images[xnn.model(images).argmax(1) == target]
    strange = 2.5 * own[:1]
    assert int(xnn.model(strange).argmax(1)) == target
    held, shown = own[:25], torch.cat([own[25:28], strange])
    _, parsed = written(tmp_path / "r.html", (xnn, shown, target), data=held)
    made = [xnn.contributions(some, target).contributions for some in (shown, held)]
    rows = parsed.data["targets"][0]["rows"]
    assert [row["usual"]["share"] for row in rows] == pytest.approx(typicality(*made).share.tolist(), abs=1e-6)
    assert rows[3]["usual"]["share"] == pytest.approx(1 / 26, abs=1e-6)
    _, parsed = written(tmp_path / "few.html", (xnn, shown, target), data=held[:19])
    assert not any("usual" in row for row in parsed.data["targets"][0]["rows"])
    assert "unusual contributions" not in " ".join(parsed.text)


def test_maps_have_the_sign_of_their_contributions_and_are_those_of_their_x_feature(
    explained: Any, page: tuple[str, Page]
) -> None:
    from captum_xnn.plots import own_scale

    xnn, images, target = explained
    # The whole gallery at once, as the page drew it: rounding may move a colour by one step otherwise.
    why = xnn.explain(images[:9], target=target)
    one = xnn.one_heatmap(images[:9], target=target)
    for i, row in enumerate(page[1].data["targets"][0]["rows"]):
        scaled = torch.from_numpy(own_scale(why.directed_maps()[i], why.contributions[i])).float()
        assert row["maps"] == [overlay(m) for m in scaled]
        assert row["one"] == overlay(torch.from_numpy(own_scale(one[i], [1.0])).float()[0])


def test_strengths_are_contributions_per_pixel(explained: Any, page: tuple[str, Page]) -> None:
    import numpy as np

    from captum_xnn.plots import own_scale

    xnn, images, target = explained
    why = xnn.explain(images[:1], target=target)
    sizes = np.abs(own_scale(why.directed_maps()[0], why.contributions[0])).sum((1, 2))
    density = why.contributions[0].abs().numpy() / sizes
    assert page[1].data["targets"][0]["rows"][0]["strength"] == pytest.approx(density / density.max(), abs=1e-3)


def test_faithfulness_is_that_of_the_data_and_stands_before_the_cards(page: tuple[str, Page], explained: Any) -> None:
    text, parsed = page
    xnn, images, _ = explained
    for target in (1, 2):
        score, y = xnn.score(images, target), xnn.model(images)[:, target].detach()
        spread = float((y - y.mean()).abs().mean())
        assert format_error(score.f_reg, spread) in parsed.text
        assert f"{100 * (score.f_cls or 0):.1f} %" in parsed.text
        assert format_error(xnn.explainer(target).f_reg, spread) in parsed.text
    assert text.index('id="faithfulness"') < text.index('id="cards"') < text.index('id="gallery"')
    assert {"Bars", "A note", "First.\nStill first.", "Second."} <= set(parsed.text)


def test_patches_of_some_images_of_the_class_are_measured_beside_controls(explained: Any, tmp_path: Path) -> None:
    xnn, images, own = explained
    text, _ = written(tmp_path / "r.html", explained, patches=2)
    with torch.no_grad():
        mine = images[:9][xnn.model(images[:9]).argmax(1) == own]
    found = patch_scores(xnn, mine[:2], own)
    assert found.examples == 2 and found.drops_random_groups is not None
    assert f"<b>{found.agreement:.2f}</b> from" in text and "maps with drops on 2 images" in text
    controls = (found.agreement_random_maps, found.agreement_random_groups, found.agreement_one_heatmap)
    noise, groups, single = (f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in controls)
    assert (
        f"maps of noise {noise}, maps of x-features drawn by chance {groups}, the single usual heatmap {single}" in text
    )
    assert f"<b>{found.drops.o1:.2f}</b> 0&nbsp;is&nbsp;distinct" in text
    assert f"drop at the same patches? For comparison: random groups {found.drops_random_groups.o1:.2f}" in text
    assert "Patch agreement" not in written(tmp_path / "without.html", explained)[0]


def test_scatter_has_a_dot_for_each_image_at_its_residual(page: tuple[str, Page]) -> None:
    _, parsed = page
    dots, rows = parsed.named("circle"), parsed.data["targets"][0]["rows"]
    assert len(dots) == 18
    assert [dot["class"] for dot in dots[:9]] == ["own" if row["is_positive"] else "other" for row in rows]
    height = [float(str(dot["cy"])) for dot in dots[:9]]
    residual = [row["prediction"] - row["sum"] for row in rows]
    # Both axes are linear, and a residual of 0 lies on the line of zero.
    low, high = (residual.index(end(residual)) for end in (min, max))
    slope = (height[high] - height[low]) / (residual[high] - residual[low])
    assert slope < 0
    zero = next(float(str(a["y1"])) for a in parsed.named("line") if a["class"] == "zero")
    assert height == pytest.approx([zero + slope * r for r in residual], abs=0.5)


def test_one_image_and_no_error_still_make_a_scatter(explained: Any, tmp_path: Path) -> None:
    xnn, images, _ = explained
    _, parsed = written(tmp_path / "r.html", (xnn, images[1:2], 1), 1)
    assert len(parsed.named("circle")) == 1


def test_cards_stand_for_each_x_feature(page: tuple[str, Page], explained: Any) -> None:
    from captum_xnn.report._cards import feature_cards

    xnn, images, _ = explained
    _, parsed = page
    assert len(parsed.named("article")) == 6
    for target in (1, 2):
        for card in feature_cards(xnn, images, target):
            assert f"{100 * card.share:.0f} %" in parsed.text
    # The names that cards are linked by are filled where the page is read without its script.
    assert "x-feature 1" in parsed.text


def test_cards_show_parts(explained: Any, tmp_path: Path) -> None:
    _, images, _ = explained
    n = len(images)
    points, box = torch.full((n, 2, 2), 12.0), torch.tensor([[2.0, 2.0, 22.0, 22.0]]).expand(n, 4)
    batch = PartsSample(images, torch.zeros(n), points, box, torch.arange(n))
    _, parsed = written(tmp_path / "r.html", explained, data=[batch], place_names=["beak", "tail"])
    assert {"beak", "context"} <= set(parsed.text)
    # Of two parts on one point the first has all.
    assert "tail" not in parsed.text


def test_page_loads_nothing_and_its_policy_allows_its_own_script_only(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert not {tag for tag, _ in parsed.elements} & {"iframe", "object", "embed", "base", "form"}
    addresses = [str(a[key]) for _, a in parsed.elements for key in ("src", "href", "srcset", "xlink:href") if key in a]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    assert not [a for _, a in parsed.elements if any(key == "style" or key.startswith("on") for key in a)]
    assert "url(" not in text and "@import" not in text
    (policy,) = [a["content"] for a in parsed.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for tag, content in (("script", parsed.raw["script"][1]), ("style", "".join(parsed.raw["style"]))):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert [a.get("type") for a in parsed.named("script")] == ["application/json", None]


def test_markup_in_any_text_stays_text(explained: Any, tmp_path: Path) -> None:
    _, images, _ = explained
    names = {1: {0: EVIL, 2: "x"}}
    text, parsed = written(
        tmp_path / "r.html",
        explained,
        data=images,
        captions=[EVIL] * 9,
        class_names=[EVIL] * 3,
        names=names,
        title=EVIL,
        notes=[(EVIL, EVIL)],
        places=lambda batch, rows, maps: torch.ones(len(maps), 3, 1),
        place_names=[EVIL],
    )
    assert parsed.open == []
    assert len(parsed.named("script")) == 2
    assert all(str(a["src"]).startswith("data:") for a in parsed.named("img"))
    assert parsed.data["images"][0]["caption"] == EVIL
    assert parsed.data["names"]["1"]["0"] == " ".join(EVIL.split())
    assert text.count("</script>") == 2 and "\u2028" not in parsed.raw["script"][0]


def test_names_are_read_from_a_file_and_kept_for_other_targets(explained: Any, tmp_path: Path) -> None:
    exported = {"captum_xnn": "names", "version": 1, "layer": "4", "names": {"1": {"1": "gold"}, "2": {"0": "sky"}}}
    file = tmp_path / "names.json"
    file.write_text(json.dumps(exported), encoding="utf-8")
    _, parsed = written(tmp_path / "r.html", explained, names=file)
    assert parsed.data["names"] == exported["names"]
    assert {"gold", "x-feature 1"} <= {text for text in parsed.text}
    assert "sky" not in parsed.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"captum_xnn": "names", "version": 1, "layer": "0", "names": {}}, "of layer '0', .* layer is '4'"),
        (
            {"captum_xnn": "names", "version": 2, "layer": "4", "names": {}},
            "has version 2 instead of 1",
        ),
        ({"1": {"0": "beak"}}, "does not describe names, which have"),
    ],
)
def test_names_of_others_are_refused(explained: Any, tmp_path: Path, names: Any, message: str) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps(names))
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "r.html", explained, names=file)
    assert list(tmp_path.iterdir()) == [file]


def test_names_that_cannot_be_told_apart_by_target_are_refused(explained: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"names are a list, and .* by target; write \{1: \['golden feather'\]\}"):
        written(tmp_path / "r.html", explained, names=["beak"])


def test_names_of_each_target_may_be_a_file_of_many(explained: Any, tmp_path: Path) -> None:
    file = write_names(tmp_path / "names.json", {1: ["gold"], 2: ["sky"]}, layer="4")
    _, parsed = written(tmp_path / "r.html", explained, names={2: file})
    assert parsed.data["names"] == {"2": {"0": "sky"}}


@pytest.mark.parametrize("given", [None, 0])
def test_names_of_the_only_output_are_those_of_target_none_and_0(only_output: Any, tmp_path: Path, given: Any) -> None:
    xnn, images = only_output
    file = write_names(tmp_path / "names.json", {given: ["beak"]}, layer="1")
    for names in (file, {given: ["beak"]}):
        parsed = Page(
            write_report(
                tmp_path / "r.html", xnn, images[:2], options=ReportOptions(data=images, names=names)
            ).read_text("utf-8")
        )
        assert parsed.data["names"] == {"None": {"0": "beak"}}
        assert parsed.data["targets"][0]["key"] == "None"


def test_small_outputs_keep_their_digits_on_cards(only_output: Any, tmp_path: Path) -> None:
    from captum_xnn.report._cards import feature_cards

    xnn, images = only_output
    page = Page(
        write_report(tmp_path / "r.html", xnn, images[:4], options=ReportOptions(data=images)).read_text("utf-8")
    )
    decimals = page.data["targets"][0]["decimals"]
    assert decimals > 3
    for card in feature_cards(xnn, images):
        # Over all examples the mean contribution is zero, so that the deviation and the examples tell.
        assert any(f"± {card.deviation:.{decimals + 1}f} logits" in text for text in page.text)
        assert f"{card.contributes[0].contribution:+.{decimals}f}".replace("-", "\N{MINUS SIGN}") in page.text
        assert float(f"{card.contributes[0].contribution:.{decimals}f}")


def test_page_of_an_only_output_speaks_of_no_classes(only_output: Any, explained: Any, tmp_path: Path) -> None:
    xnn, images = only_output
    page = Page(
        write_report(tmp_path / "one.html", xnn, images[:4], options=ReportOptions(data=images)).read_text("utf-8")
    )
    # The menu that the script hides is the exception.
    of_classes = r"model (says|calls (?!this))|something else|to the class|of the class|the class is there"
    assert not [text for text in page.text if re.search(of_classes, text)]
    assert "Contributes least" in page.text and page.data["targets"][0]["classes"] is False
    _, other = written(tmp_path / "r.html", explained)
    assert {"Absent though the class is there", "Contributes least"} & set(other.text)
    assert other.data["targets"][0]["classes"] is True


def test_an_x_feature_is_called_absent_only_where_it_contributes_less_than_half_its_mean(explained: Any) -> None:
    from captum_xnn.report._image_cards import _card

    xnn, images, target = explained
    for card in feature_cards(xnn, [images], target, keep=2):
        for share, heading in ((0.2, "absent though the class is there"), (0.8, "contributes least")):
            least = tuple(replace(e, contribution=share * card.contribution, given=target) for e in card.absent)
            made = _card(replace(card, absent=least), OutputNames(None), (), lambda image: image, str)
            assert heading in " and ".join(label for label, *_ in made["lists"])


def crops(parsed: Page) -> set[str]:
    return {str(a["title"]) for a in parsed.named("span") if str(a.get("class", "")).startswith("crop")}


def test_cards_call_images_as_the_data_do(explained: Any, tmp_path: Path) -> None:
    _, images, _ = explained
    own = [f"{i}.png" for i in range(90)]
    gallery = [f"shown {i}" for i in range(9)]
    _, same = written(tmp_path / "r.html", explained, captions=gallery)
    assert crops(same) and crops(same) <= set(gallery)
    _, other = written(tmp_path / "r.html", explained, data=images, captions=gallery, data_captions=own)
    assert crops(other) and crops(other) <= set(own)
    # Without captions, the first of the data may be another than the first of the gallery.
    _, unnamed = written(tmp_path / "r.html", explained, data=images)
    assert crops(unnamed) == {f"image {int(name.removesuffix('.png')) + 1} of the data" for name in crops(other)}
    with pytest.raises(ValueError, match="there are 9 data_captions for 90 images of the data"):
        written(tmp_path / "r.html", explained, data=images, data_captions=own[:9])


def test_names_of_files_that_are_no_text_are_written_all_the_same(explained: Any, tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.png")
    text, parsed = written(tmp_path / "r.html", explained, captions=[name] * 9, title=name)
    assert "<h1>a?.png</h1>" in text and parsed.data["images"][0]["caption"].startswith("a")


def test_images_come_in_batches_as_well(explained: Any, tmp_path: Path) -> None:
    xnn, images, target = explained
    _, whole = written(tmp_path / "a.html", explained)
    path = write_report(tmp_path / "b.html", xnn, [images[:4], images[4:9]], target)
    parts = Page(path.read_text("utf-8"))
    assert [i["src"] for i in parts.data["images"]] == [i["src"] for i in whole.data["images"]]
    for a, b in zip(whole.data["targets"][0]["rows"], parts.data["targets"][0]["rows"], strict=True):
        assert a["c"] == pytest.approx(b["c"], rel=1e-4, abs=1e-6)


def test_outputs_without_a_name_are_classes_only_where_one_number_chooses_them() -> None:
    label = OutputNames({1: "bird"}).of
    assert [label(1), label(2), label((2, 0)), label(Difference(1, 2))] == [
        "bird", "class 2", "output (2, 0)", "bird rather than class 2",
    ]  # fmt: skip


def test_display_undoes_a_normalisation(explained: Any, tmp_path: Path) -> None:
    from captum_xnn.report._thumbnails import photo

    _, images, _ = explained
    _, parsed = written(tmp_path / "r.html", explained, display=lambda image: 1 - image.clamp(0, 1))
    assert parsed.data["images"][3]["src"] == photo(1 - images[3].clamp(0, 1))


def test_equal_reports_are_equal_files(explained: Any, tmp_path: Path) -> None:
    assert written(tmp_path / "a.html", explained)[0] == written(tmp_path / "b.html", explained)[0]


def test_report_of_a_hundred_photographs_is_below_ten_megabytes(page: tuple[str, Page]) -> None:
    from captum_xnn.report._thumbnails import overlay, photo

    # Noise compresses worst: no photograph and no map takes more.
    one = len(photo(torch.rand(3, 227, 227))) + 6 * len(overlay(torch.rand(64, 64) * 2 - 1))
    assert 100 * one + len(page[0]) < 10e6


def test_scatter_of_many_images_leaves_some_out_and_says_so(page: tuple[str, Page]) -> None:
    from captum_xnn.report._chapters import _scatter

    rows, images = page[1].data["targets"][0]["rows"], page[1].data["images"]
    few, many = (_scatter(rows * n, images * n) for n in (12, 100))
    assert (len(few["dots"]), few["left_out"]) == (108, False)
    assert (len(many["dots"]), many["left_out"]) == (300, True)


def test_folders_are_made_and_only_the_report_is_left(explained: Any, tmp_path: Path) -> None:
    written(tmp_path / "a" / "b" / "r.html", explained)
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["r.html"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are posix")
def test_report_is_as_readable_as_any_other_new_file(explained: Any, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    written(tmp_path / "r.html", explained)
    assert stat.S_IMODE((tmp_path / "r.html").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_old_report_survives_a_full_disk(explained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = written(tmp_path / "r.html", explained)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "r.html", explained, title="New")
    assert (tmp_path / "r.html").read_text("utf-8") == old
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("name", "written"), [("why", "why.html"), ("why.v2", "why.v2.html"), ("why.HTML", "why.HTML"), ("y.htm", "y.htm")]
)
def test_name_of_a_page_ends_in_html_once(explained: Any, tmp_path: Path, name: str, written: str) -> None:
    xnn, images, target = explained
    assert xnn.report(images[:6], tmp_path / name, target) == tmp_path / written
    assert [path.name for path in tmp_path.iterdir()] == [written]


def test_missing_jinja2_names_the_extra(explained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"needs jinja2, .* run `pip install captum-xnn\[report\]`"):
        written(tmp_path / "r.html", explained)


def test_wrong_arguments_are_refused(explained: Any, tmp_path: Path) -> None:
    xnn, images, target = explained
    with pytest.raises(ValueError, match="there are 9 images and 2 captions"):
        written(tmp_path / "r.html", explained, captions=["a", "b"])
    with pytest.raises(ValueError, match="reads its images several times, but a list_iterator can be read only once"):
        write_report(tmp_path / "r.html", xnn, iter([images[:9]]), target)
    with pytest.raises(ValueError, match="reads its data several times"):
        write_report(tmp_path / "r.html", xnn, images[:9], target, ReportOptions(data=iter([images])))
    with pytest.raises(ValueError, match=r"cannot be written to .*, a folder; add a name"):
        write_report(tmp_path, xnn, images[:9], target)
    assert not list(tmp_path.iterdir())


def test_script_and_style_cannot_end_early() -> None:
    from importlib import resources

    folder = resources.files("captum_xnn.report") / "templates"
    style = folder / "report.css"
    script = "".join((folder / name).read_text("utf-8") for name in ("report.js", "gallery.js", "rows.js"))
    assert not re.search(r"</script|<!--", script, re.IGNORECASE)
    assert not re.search(r"</style", style.read_text("utf-8"), re.IGNORECASE)
    # Texts are written as texts: nothing in the script makes elements or code of them. The page is read once, as text,
    # to save it again.
    reading = "const shell = `<!DOCTYPE html>\\n${document.documentElement.outerHTML}\\n`;"
    assert script.count(reading) == 1
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function",
        script.replace(reading, ""),
    )


def test_method_of_the_attribution_writes_the_same_page(explained: Any, tmp_path: Path) -> None:
    xnn, images, target = explained
    text, _ = written(tmp_path / "a.html", explained, title="Same", names={1: ["bar"]})
    path = xnn.report(images[:9], tmp_path / "b.html", target, title="Same", names={1: ["bar"]})
    assert path == tmp_path / "b.html" and path.read_text("utf-8") == text
    with pytest.raises(TypeError, match="unexpected keyword argument 'titel'"):
        xnn.report(images[:9], tmp_path / "c.html", target, titel="Same")
