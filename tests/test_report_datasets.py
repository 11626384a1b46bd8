"""A data set's own class names, file names and colours reach the report without arguments."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from test_report import Page
from torch.utils.data import DataLoader, Dataset, Subset

from captum_xnn.report import ReportOptions
from captum_xnn.report._dataset_options import captions_of, classes_of, display_of
from captum_xnn.report._thumbnails import photo


class Normalize:
    """As in torchvision, by its name and attributes."""

    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.2]


class Folder(Dataset[Any]):
    """A data set of images and labels, with what torchvision's ImageFolder tells."""

    def __init__(self, images: Any, classes: Any) -> None:
        self.images, self.classes = images, classes
        self.samples = [(f"/data/some/{i:02d}.png", i % 3) for i in range(len(images))]
        self.transform = SimpleNamespace(transforms=[len, SimpleNamespace(transforms=[Normalize()])])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.images[i], i % 3


COLOURS = ["red", "green", "blue"]


def page_of(xnn: Any, inputs: Any, path: Path, **options: Any) -> Page:
    return Page(xnn.report(inputs, path / "r.html", 1, **options).read_text("utf-8"))


def test_data_set_names_its_classes_and_files_and_undoes_its_colours(explained: Any, tmp_path: Path) -> None:
    xnn, images, target = explained
    data = Folder(images[:9], COLOURS)
    page = page_of(xnn, data, tmp_path)
    assert [image["caption"] for image in page.data["images"]] == [f"{i:02d}.png" for i in range(9)]
    assert page.data["targets"][0]["label"] == "green" and page.data["images"][0]["predicted_class"] == "red"
    mean, std = (torch.tensor(v)[:, None, None] for v in (Normalize.mean, Normalize.std))
    assert page.data["images"][4]["src"] == photo((images[4] * std + mean).clamp(0, 1))
    # Arguments count more.
    told = page_of(xnn, data, tmp_path, captions=list("abcdefghi"), class_names={1: "mine"}, display=lambda i: i)
    assert told.data["images"][2]["caption"] == "c" and told.data["targets"][0]["label"] == "mine"
    assert told.data["images"][4]["src"] == photo(images[4].clamp(0, 1))
    assert ReportOptions().display is None and target == 1


def test_classes_of_another_model_are_not_taken(
    explained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    xnn, images, _ = explained
    for classes in (["only", "two"], {5: "beyond"}, torch.zeros(3)):
        caplog.clear()
        assert page_of(xnn, Folder(images[:6], classes), tmp_path).data["targets"][0]["label"] == "class 1"
        # A tensor is no list of names; others are too few or beyond the model's outputs.
        said = (
            "the data set has" in caplog.text
            and "3 outputs, so the report has numbers in place of names" in caplog.text
        )
        assert said is not isinstance(classes, torch.Tensor)
    assert page_of(xnn, Folder(images[:6], {1: "some"}), tmp_path).data["targets"][0]["label"] == "some"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["red", "green"], r"2 class names \(red, green\) were given for a model with 3 outputs; give one"),
        (["a", "b", "c", "d"], r"4 class names \(a, b, c, ...\) were given for a model with 3 outputs"),
        ({7: "beyond"}, "'beyond' is for output 7, and the model's outputs are 0 to 2"),
    ],
)
def test_given_class_names_must_fit_the_model(explained: Any, tmp_path: Path, names: Any, said: str) -> None:
    xnn, images, _ = explained
    with pytest.raises(ValueError, match=said):
        xnn.report(images[:6], tmp_path / "r.html", 1, class_names=names)
    assert not (tmp_path / "r.html").exists()


def test_loaders_and_subsets_keep_the_order(explained: Any, tmp_path: Path) -> None:
    xnn, images, _ = explained
    data = Folder(images[:9], COLOURS)
    some = Subset(data, [7, 2, 4])
    page = page_of(xnn, some, tmp_path)
    assert [image["caption"] for image in page.data["images"]] == ["07.png", "02.png", "04.png"]
    assert captions_of(DataLoader(data, 4)) == captions_of(data)
    assert captions_of(DataLoader(data, 4, shuffle=True)) is None
    assert captions_of(DataLoader(data, 4, drop_last=True)) is None
    assert classes_of(DataLoader(some, 2)) == COLOURS and display_of(DataLoader(some)) is not None


def test_cards_name_the_files_of_their_own_data(explained: Any, tmp_path: Path) -> None:
    xnn, images, _ = explained
    page = page_of(xnn, images[:3], tmp_path, data=Folder(images, COLOURS))
    titles = {str(a["title"]) for a in page.named("span") if str(a.get("class", "")).startswith("crop")}
    assert titles and titles <= {f"{i:02d}.png" for i in range(90)}


@pytest.mark.parametrize(
    "data", [torch.zeros(2, 3, 4, 4), [torch.zeros(1, 3, 4, 4)], iter([]), SimpleNamespace(names=7)]
)
def test_what_says_nothing_is_asked_nothing(data: Any) -> None:
    assert captions_of(data) is classes_of(data) is display_of(data) is None


def test_image_folder_of_torchvision(torchvision: Any, explained: Any, tmp_path: Path) -> None:
    from torchvision import datasets, transforms

    xnn, images, _ = explained
    for i, image in enumerate(images[:9]):
        place = tmp_path / "images" / COLOURS[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(place / f"{i}.png")
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.0] * 3, [2.0] * 3)])
    page = page_of(xnn, datasets.ImageFolder(tmp_path / "images", steps), tmp_path, class_names=COLOURS)
    captions = [image["caption"] for image in page.data["images"]]
    assert sorted(captions) == [f"{i}.png" for i in range(9)] and captions[0] == "2.png"
    assert page.data["images"][0]["src"] == photo((images[2].clamp(0, 1) * 255).round() / 255)
