"""Reports about texts and tables: the maps of every cell, the shares of words, and the same faithfulness and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import LayerIntegratedGradients, Saliency
from test_report import Page
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn.errors import NotFittedError
from captum_xnn.heatmaps import FromCaptum
from captum_xnn.patch_scores import patch_scores
from captum_xnn.report._parts import parts_of
from captum_xnn.report._text_and_table_cards import CellsOfTarget
from captum_xnn.report._verdict import format_error

WORDS = ["the", "great", "film", "awful", "slow"]
EVIL = "</script><b onclick=x>&'"


class Reads(nn.Module):
    """Two classes of texts by the mean of their words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.act, self.out = nn.Embedding(5, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, ids: Any, mask: Any = None) -> Any:
        z = self.act(self.embedding(ids))
        weight = torch.ones(ids.shape) if mask is None else mask.float()
        return self.out((z * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))


def error_of(xnn: Any, data: Any) -> str:
    """F_reg as the page writes it, beside the spread of the model's outputs."""
    y = xnn.model(data).detach().flatten()
    return format_error(xnn.score(data).f_reg, float((y - y.mean()).abs().mean()))


@pytest.fixture(scope="module")
def texts() -> tuple[XNNAttribution, Any, list[list[str]]]:
    torch.manual_seed(1)
    ids = torch.randint(0, 5, (60, 7))
    backend = FromCaptum(LayerIntegratedGradients, layer="embedding", n_steps=4)
    xnn = XNNAttribution(Reads().eval(), "act", 3, heatmap=backend).fit(ids, target=[0, 1], progress=False)
    return xnn, ids, [[WORDS[i] for i in row] for row in ids.tolist()]


@pytest.fixture(scope="module")
def table() -> tuple[XNNAttribution, Any]:
    torch.manual_seed(2)
    data = torch.randn(120, 5)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 1)).eval()
    return XNNAttribution(model, "1", 2).fit(data, progress=False), data


def page_of(xnn: XNNAttribution, inputs: Any, path: Path, target: Any = None, **options: Any) -> Page:
    return Page(xnn.report(inputs, path / "r.html", target, **options).read_text("utf-8"))


def test_tokens_have_the_maps_of_the_explanation(texts: Any, tmp_path: Path) -> None:
    xnn, ids, words = texts
    given = xnn.model(ids).argmax(1)
    both = torch.cat([(given == c).nonzero()[:3, 0] for c in (0, 1)]).tolist()
    ids, words = ids[both], [words[i] for i in both]
    page = page_of(xnn, ids, tmp_path, [0, 1], tokens=words, class_names=["bad", "good"])
    assert page.data["kind"] == "texts" and page.open == []
    assert [image["cells"] for image in page.data["images"]] == words
    for shown in page.data["targets"]:
        why = xnn.explain(ids, int(shown["key"]))
        maps = why.directed_maps().flatten(3).sum(3)
        for i, row in enumerate(shown["rows"]):
            assert row["c"] == pytest.approx(why.contributions[i].tolist(), rel=1e-4, abs=1e-6)
            for k in range(3):
                # Scaled by itself, and with the sign of the contribution: positive where the word raises the output.
                own = maps[i, k] / maps[i, k].abs().max().clamp(min=1e-30) * why.contributions[i, k].sign()
                assert row["maps"][k] == pytest.approx(own.tolist(), abs=1e-3)
            assert len(row["one"]) == 7 and max(row["strength"]) == 1
    labels = {"bad", "good"}
    assert {image["predicted_class"] for image in page.data["images"]} == labels
    assert {shown["label"] for shown in page.data["targets"]} == labels


def test_texts_may_be_shorter_than_their_padding_and_come_with_masks(texts: Any, tmp_path: Path) -> None:
    xnn, ids, words = texts
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    short = [words[0][:4], *words[1:5]]
    masked = XNNAttribution(
        xnn.model, "act", 3, heatmap=xnn.heatmap, unpack=lambda batch: (batch[0], (batch[1],))
    )  # fmt: skip
    masked.explainers_ = xnn.explainers_
    page = page_of(masked, [(ids[:3], mask[:3]), (ids[3:5], mask[3:5])], tmp_path, 1, tokens=short)
    assert [len(row["maps"][0]) for row in page.data["targets"][0]["rows"]] == [4, 7, 7, 7, 7]
    says = [row["prediction"] for row in page.data["targets"][0]["rows"]]
    assert says == pytest.approx(xnn.model(ids[:5], mask[:5])[:, 1].tolist(), rel=1e-4)
    assert [image["caption"] for image in page.data["images"]] == [f"text {i}" for i in range(1, 6)]


def test_function_of_ids_gives_tokens(texts: Any, tmp_path: Path) -> None:
    xnn, ids, words = texts
    page = page_of(xnn, ids[:30], tmp_path, 0, tokens=lambda row: [WORDS[i] for i in row.tolist()])
    assert [image["cells"] for image in page.data["images"]] == words[:30]


def test_cards_rank_words_by_their_mean_contribution(texts: Any, tmp_path: Path) -> None:
    xnn, ids, words = texts
    page = page_of(xnn, ids[:9], tmp_path, 1, tokens=words[:9])
    own = [i for i in range(9) if int(xnn.model(ids[i : i + 1]).argmax(1)) == 1]
    why = xnn.explain(ids[own], 1)
    maps = why.directed_maps().flatten(3).sum(3)[:, 0]
    spread = maps / maps.abs().sum(1, keepdim=True) * why.contributions[:, :1]
    values: dict[str, list[float]] = {w: [] for w in WORDS}
    for row, i in zip(spread.tolist(), own, strict=True):
        for value, word in zip(row, words[i], strict=True):
            values[word].append(value)
    means = {word: sum(of) / len(of) for word, of in values.items() if len(of) > 1}
    ranked = sorted((w for w in means if means[w]), key=lambda w: -abs(means[w]))
    place, digits = page.text.index("Words that drive it"), page.data["targets"][0]["decimals"] + 1
    shown = page.text[place + 1 : place + 1 + 2 * len(ranked)]
    assert shown[::2] == ranked
    assert shown[1::2] == [f"{means[w]:+.{digits}f}".replace("-", "\N{MINUS SIGN}") for w in ranked]


def test_a_word_that_occurs_once_is_on_no_card(texts: Any, tmp_path: Path) -> None:
    rows = CellsOfTarget(1, 1, words=True, apart=False)
    contributions = torch.tensor([4.0])
    for cells, maps in (
        (["once", "often", "seldom"], [1.0, 0.5, 0.5]),
        (["often", "seldom", "the"], [0.6, -0.4, 0.0]),
    ):
        rows._add_cells(torch.tensor([maps]), contributions, cells, None)
    # The contribution of 4 divided by the mass: 2 and 4 for each unit of a map.
    assert rows._cells(0) == [
        ("often", 1.0, pytest.approx((0.5 * 2 + 0.6 * 4) / 2)),
        ("seldom", pytest.approx(0.3 / 1.7), pytest.approx((0.5 * 2 - 0.4 * 4) / 2)),
    ]


def test_table_has_values_names_and_a_map_for_each_input(table: Any, tmp_path: Path) -> None:
    xnn, data = table
    names = ["age", "income", EVIL, "rooms", "tax"]
    again = XNNAttribution(xnn.model, "1", 2).fit(data[:80], progress=False)
    page = page_of(xnn, data[:4], tmp_path, input_names=names, data=data, again=again, names={None: {0: "rich"}})
    assert page.data["kind"] == "table" and page.open == []
    for i, image in enumerate(page.data["images"]):
        assert image["cells"] == names and image["values"] == pytest.approx(data[i].tolist(), rel=1e-5)
    why = xnn.explain(data[:4])
    rows = page.data["targets"][0]["rows"]
    for i, row in enumerate(rows):
        maps = why.directed_maps()[i]
        peak = maps.abs().amax(1, keepdim=True)
        own = maps / torch.where(peak > 0, peak, 1) * why.contributions[i].sign()[:, None]
        assert torch.allclose(torch.tensor(row["maps"]), own, atol=1e-3)
    assert "Card" not in page.text and "Inputs that drive it" in page.text
    text = " ".join(page.text)
    assert "over 120 examples" in text and "sets one input after the other to its mean" in text
    assert "x-features of a second fit correlate with these by" in text
    assert error_of(xnn, data) in page.text


def test_maps_of_texts_are_checked_by_taking_words_away(texts: Any, tmp_path: Path) -> None:
    """The first positives with three words are covered, also where masks differ; the figures are those of scores."""
    xnn, ids, words = texts
    mask = torch.ones_like(ids)
    lengths = [7] * 12
    for i, n in ((0, 2), (1, 2), (3, 4), (4, 5)):
        mask[i, n:], lengths[i] = 0, n
    short = [some[:n] for some, n in zip(words, lengths, strict=False)]
    masked = XNNAttribution(xnn.model, "act", 3, heatmap=xnn.heatmap, unpack=lambda batch: (batch[0], (batch[1],)))
    masked.explainers_ = xnn.explainers_
    given = xnn.model(ids[:12], mask[:12]).argmax(1)
    own = [i for i in range(12) if given[i] == 1 and lengths[i] > 2][:4]
    assert len(own) == 4 and own[-1] > 4
    batches = [(ids[:5], mask[:5]), (ids[5:12], mask[5:12])]
    for fill in (None, 2):
        page = page_of(masked, batches, tmp_path, 1, tokens=short, patches=4, fill=fill)
        found = patch_scores(
            masked, ids[own], 1, (mask[own],), fill=fill, lengths=[lengths[i] for i in own], internal_batch_size=8
        )
        text = " ".join(page.text).replace("\N{MINUS SIGN}", "-")
        assert (
            f"rank the words of 4 texts in the order of these drops with a correlation of {found.agreement:.2f}" in text
        )
        controls = (found.agreement_random_maps, found.agreement_random_groups, found.agreement_one_heatmap)
        for control in controls:
            assert f"{control:.2f}" in text
        assert f"{found.drops.o1:.2f}" in page.text


def test_maps_of_a_table_are_checked_by_the_mean_of_each_column(table: Any, tmp_path: Path) -> None:
    xnn, data = table
    page = page_of(
        xnn, data[:6], tmp_path, data=data, patches=5, unit="thousands of <euros>", class_names=["a high price"]
    )
    assert page.data["targets"][0]["label"] == "a high price" and "the output" not in page.text
    assert "logit" not in " ".join(page.text)
    assert f"by {error_of(xnn, data)} thousands of <euros> on average" in " ".join(page.text)
    found = patch_scores(xnn, data[:5], fill=data.mean(0))
    text = " ".join(page.text).replace("\N{MINUS SIGN}", "-")
    assert (
        f"rank the inputs of 5 examples in the order of these drops with a correlation of {found.agreement:.2f}" in text
    )
    assert "a drop is the contribution lost when an input is set to its mean" in text


def test_only_the_first_data_of_a_table_get_maps(table: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from captum_xnn.report import ReportOptions
    from captum_xnn.report import _text_and_table_cards as cards

    monkeypatch.setattr(cards, "_MAPPED", 30)
    xnn, data = table
    many = torch.cat([data] * 4)[:150]
    run = cards.CellsRun(xnn, data[:3], [None], ReportOptions(data=many, progress=False))
    run.explain()
    (rows,) = run.of_targets
    assert len(rows.values) == 64 and rows.faithfulness.examples == 150  # one batch


def test_a_single_row_has_no_mean_to_be_covered_by(table: Any, tmp_path: Path) -> None:
    xnn, data = table
    with pytest.raises(ValueError, match=r"the mean over 1 row is the row's own value; pass data= with more rows"):
        xnn.report(data[:1], tmp_path / "one.html", patches=1, progress=False)
    page = page_of(xnn, data[:1], tmp_path, data=data, patches=1)
    assert "in the order of these drops" in " ".join(page.text)


def test_other_names_of_a_text_page_take_no_map(
    texts: Any, table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xnn, ids, words = texts
    calls: list[int] = []
    explain = XNNAttribution._explain_and_read

    def counting(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return explain(self, inputs, *args, **kwargs)

    monkeypatch.setattr(XNNAttribution, "_explain_and_read", counting)

    def written(inputs: Any = ids[:9], **options: Any) -> int:
        """Number of calls that a page takes."""
        before, given = len(calls), {"tokens": words[:9], "target": 1} | options
        page_of(xnn, inputs, tmp_path, cache=tmp_path / "cache", **given)
        return len(calls) - before

    assert written() > 0 and written(names={1: {0: "awful"}}, title="Named") == 0
    assert written(tokens=lambda row: [WORDS[i] for i in row.tolist()]) == 0  # it gives the same words
    changed = ids[:9].clone()
    changed[8, 6] = (changed[8, 6] + 1) % 5
    for other in ({"inputs": changed}, {"tokens": [w[:3] for w in words[:9]]}, {"against": 0}, {"data": ids}):
        assert written(**other) > 0
    assert written(data=ids) == 0
    assert written(data=ids[1:]) > 0
    xnn, data = table
    assert written(data[:4], tokens=None, target=None) > 0
    assert written(data[:4], tokens=None, target=None, names={None: {0: "rich"}}) == 0
    assert written(data[:4], tokens=None, target=None, input_names=list("abcde")) > 0


def test_wrong_texts_and_names_are_refused(texts: Any, table: Any, tmp_path: Path) -> None:
    xnn, ids, words = texts
    for tokens in (words[:2], [[*w, "more"] for w in words[:3]], [[], *words[1:3]]):
        with pytest.raises(ValueError, match=r"tokens have lengths .* for 3 examples of 7 cells"):
            page_of(xnn, ids[:3], tmp_path, 0, tokens=tokens)
    with pytest.raises(ValueError, match="there are 2 input_names for 5 input features"):
        page_of(*table, tmp_path, input_names=["a", "b"])
    with pytest.raises(ValueError, match="there are 3 texts and 1 captions"):
        page_of(xnn, ids[:3], tmp_path, 0, tokens=words[:3], captions=["x"])
    assert not list(tmp_path.iterdir())


def test_texts_say_why_not_the_other_output(texts: Any, tmp_path: Path) -> None:
    xnn, ids, words = texts
    page = page_of(xnn, ids[:5], tmp_path, [0, 1], tokens=words[:5], class_names=["bad", "good"], against=0, data=ids)
    made = xnn.contributions(ids[:5], 1, against=0)
    first, second = page.data["targets"]
    assert all("rather" not in row for row in first["rows"])
    for i, row in enumerate(second["rows"]):
        assert row["rather"]["label"] == "good rather than bad"
        assert row["rather"]["c"] == pytest.approx(made.contributions[i].tolist(), rel=1e-5, abs=1e-7)


def test_an_output_is_called_a_class_only_where_there_are_classes(texts: Any, table: Any, tmp_path: Path) -> None:
    xnn, ids, words = texts
    page = page_of(xnn, ids, tmp_path, [0, 1], tokens=words)
    assert [target["label"] for target in page.data["targets"]] == ["class 0", "class 1"]
    xnn, data = table
    assert page_of(xnn, data[:3], tmp_path, 0).data["targets"][0]["label"] == "output 0"


def test_a_table_shows_values_in_their_own_units(table: Any, tmp_path: Path) -> None:
    xnn, data = table
    shown = page_of(xnn, data[:3], tmp_path, display=lambda z: 20 * z + 100).data["images"]
    for image, row in zip(shown, data[:3], strict=True):
        assert image["values"] == pytest.approx((20 * row + 100).tolist(), rel=1e-3)
    with pytest.raises(ValueError, match=r"display= turns rows \(3, 5\) into \(3,\); return one value for each"):
        page_of(xnn, data[:3], tmp_path, display=lambda z: z.sum(1))


def test_what_is_passed_by_mistake_is_named(table: Any, texts: Any, tmp_path: Path) -> None:
    xnn, data = table
    with pytest.raises(TypeError, match="again is 'explainers', not a fitted XNNAttribution; fit a second one"):
        page_of(xnn, data[:3], tmp_path, again="explainers")
    xnn = XNNAttribution(texts[0].model, "act", 2).fit(texts[1], 1, progress=False)
    with pytest.raises(NotFittedError, match=r"target None has no explainer .*; pass target=1, or call xnn.fit"):
        xnn.explainer()


def test_a_kept_report_is_computed_anew_for_other_units(table: Any, tmp_path: Path) -> None:
    xnn, data = table
    cache = tmp_path / "cache"
    for factor in (2.0, 3.0):
        page = page_of(xnn, data[:3], tmp_path, cache=cache, display=lambda z, factor=factor: factor * z)
        assert page.data["images"][0]["values"] == pytest.approx((factor * data[0]).tolist(), rel=1e-4)
    assert len(list(cache.glob("*/content.json"))) == 2


def test_parts_add_up_and_are_the_gradient_maps_in_the_unit_of_the_output(table: Any, tmp_path: Path) -> None:
    xnn, data = table
    page = page_of(xnn, data[:9], tmp_path, data=data, display=lambda z: 20 * z + 100)
    why = xnn.explain(data[:9])
    for i, row in enumerate(page.data["targets"][0]["rows"]):
        for k in range(2):
            scale = float(why.contributions[i, k] / why.features[i, k])
            assert row["parts"][k] == pytest.approx((scale * why.maps[i, k]).tolist(), rel=1e-4, abs=1e-6)
    # On the mean row, where contributions begin, the parts leave out what the base of Z has more than the row.
    assert page.data["means"] == pytest.approx((20 * data.mean(0) + 100).tolist(), rel=1e-5)
    assert "Rows and columns add up" in " ".join(page.text)


def test_maps_in_another_unit_have_no_parts(table: Any, tmp_path: Path) -> None:
    xnn, data = table
    page = page_of(xnn.with_heatmap(FromCaptum(Saliency, abs=False)), data[:9], tmp_path)
    assert all("parts" not in row for row in page.data["targets"][0]["rows"])
    assert "Rows and columns add up" not in " ".join(page.text)


def test_maps_without_signs_divide_the_whole_contribution() -> None:
    maps = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0))
    maps[0, 1] = 0
    E = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    parts = parts_of(maps, E, 2 * E)
    for i in range(4):
        for k in range(3):
            total = 0.0 if (i, k) == (0, 1) else 2 * float(E[i, k])
            assert float(parts[i, k].sum()) == pytest.approx(total, rel=1e-6)
            for j in range(5):
                share = float(maps[i, k, j]) / max(float(maps[i, k].sum()), 1e-30)
                assert float(parts[i, k, j]) == pytest.approx(total * share, rel=1e-5, abs=1e-9)


def test_cards_of_tables_say_where_higher_values_lead(tmp_path: Path) -> None:
    """The output falls with the first input and rises with the second; the third counts by its size only."""
    data = torch.randn(200, 4, generator=torch.Generator().manual_seed(3))

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Any) -> Any:
            z = torch.stack([x[:, 0] + 9, x[:, 1] + 9, x[:, 2], -x[:, 2]], 1)
            return (self.act(z) @ torch.tensor([-2.0, 3.0, 4.0, 4.0]))[:, None]

    xnn = XNNAttribution(Sum(), "act", 1).fit(data, positives=torch.ones(200).bool(), progress=False)
    text = page_of(xnn, data[:60], tmp_path, input_names=["falls", "rises", "sizes", "idle"], data=data).text
    place = text.index("Inputs that drive it")
    found = text[place + 1 : place + 12]
    said = {found[i]: found[i + 2] for i in range(len(found) - 2) if found[i] in ("falls", "rises", "sizes")}
    assert said["falls"] == "higher lowers" and said["rises"] == "higher raises"
    assert not said["sizes"].startswith("higher") and "idle" not in found
    few = page_of(xnn, data[:19], tmp_path, input_names=["falls", "rises", "sizes", "idle"]).text
    assert not any(line.startswith("higher ") for line in few)  # 19 rows may correlate by chance
    beside = page_of(xnn, data[:5], tmp_path, input_names=["falls", "rises", "sizes", "idle"], data=data).text
    place = beside.index("Inputs that drive it")
    assert beside[place : place + 12] == text[text.index("Inputs that drive it") :][:12]  # cards are about the data
