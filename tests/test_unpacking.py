"""Batches become arguments by the signature of the model: by name, or the first entry, with a word where more fits."""

from __future__ import annotations

import pickle
from collections import OrderedDict, UserDict
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.activations import collect
from captum_xnn.activations._unpacking import ForModel, first_of_batch, unpack_for

N = 60


class Text(nn.Module):
    """Token ids with an optional mask, as text models have it; with labels it would return the loss first."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, scale=1.0, labels=None):
        h = self.mix(self.embedding(input_ids)).relu()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        y = scale * self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return y if labels is None else (nn.functional.cross_entropy(y, labels), y)


class Both(nn.Module):
    """Needs an image and a table."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(8, 4)

    def forward(self, image, table):
        return self.fc(torch.cat([self.conv(image).relu().mean((2, 3)), table], 1))


def texts():
    ids = torch.randint(1, 20, (N, 6))
    mask = torch.ones(N, 6, dtype=torch.long)
    mask[::2, 3:] = 0
    return ids, mask, torch.randint(3, (N,))


def batches(tables, size=16):
    return [type(tables)({k: v[i : i + size] for k, v in tables.items()}) for i in range(0, N, size)]


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
@pytest.mark.parametrize("form", [None, partial(SRAE, hidden=(8,))])
def test_a_dict_goes_by_name_in_fit_and_score(form, kind):
    """Numbers are those with the mask; keys may come in any order, and labels are no input."""
    model = Text()
    ids, mask, labels = texts()
    data = batches(kind({"labels": labels, "attention_mask": mask, "input_ids": ids, "idx": torch.arange(N)}))
    everything = torch.ones(N).bool()
    xnn = XNNAttribution(model, "mix", 2, autoencoder=form, recipe=Recipe(steps=12))
    xnn.fit(data, 0, positives=everything, progress=False)
    given = XNNAttribution(
        model,
        "mix",
        2,
        autoencoder=form,
        recipe=Recipe(steps=12),
        unpack=lambda b: (b["input_ids"], b["attention_mask"]),
    )
    given.fit(data, 0, positives=everything, progress=False)
    one, other = (x.contributions(ids[:5], 0, mask[:5]) for x in (xnn, given))
    torch.testing.assert_close(one.contributions, other.contributions)
    torch.testing.assert_close(one.prediction, model(ids[:5], mask[:5])[:, 0].detach())
    assert xnn.score(data, 0) == given.score(data, 0)


def test_a_dict_goes_by_name_into_stores_and_loaders(tmp_path):
    model = Text()
    ids, mask, labels = texts()
    rows = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    wanted = model(ids, mask).detach()
    loader = DataLoader(rows, 16)
    torch.testing.assert_close(collect(model, "mix", loader).y_hat, wanted)
    torch.testing.assert_close(collect(model, "mix", loader, store=tmp_path / "a", rows_per_shard=7).y_hat[:], wanted)
    assert collect(model, "mix", loader, store=tmp_path / "a").Z[:].shape == (N, 6, 8)
    first = [(batch, "more") for batch in loader]
    torch.testing.assert_close(collect(model, "mix", first).y_hat, wanted)


def test_arguments_between_are_filled_with_their_defaults():
    unpack = ForModel(Text())
    ids, _, labels = texts()
    inputs, additional = unpack({"input_ids": ids, "scale": 2.0})
    assert inputs is ids
    assert additional == (None, 2.0)
    image, table = torch.rand(N, 1, 8, 8), torch.rand(N, 5)
    both = ForModel(Both())({"table": table, "label": labels, "image": image})
    assert both[0][0] is image
    assert both[0][1] is table
    assert both[1] is None


def test_names_that_do_not_fit_are_refused():
    ids, mask, _ = texts()
    with pytest.raises(TypeError, match=r"keys image, and forward of Both takes image, table; it lacks table: give"):
        collect(Both(), "conv", [{"image": torch.rand(N, 1, 8, 8)}])
    with pytest.raises(TypeError, match=r"keys ids, mask, and forward of Text takes input_ids, .*; it lacks input_ids"):
        collect(Text(), "mix", [{"ids": ids, "mask": mask}])

    class Open(Text):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(TypeError, match="forward of Open takes no names: give the batch those names, or pass unpack="):
        collect(Open(), "mix", [{"input_ids": ids}])

    class Keyword(Text):
        def forward(self, input_ids, *, attention_mask=None):
            return super().forward(input_ids, attention_mask)

    with pytest.raises(TypeError, match="forward of Keyword takes attention_mask of a batch by keyword only"):
        collect(Keyword(), "mix", [{"input_ids": ids, "attention_mask": mask}])
    with pytest.raises(TypeError, match=r"a dict with the keys input_ids; pass batches of them, such as \[data\]"):
        collect(Text(), "mix", {"input_ids": ids})
    with pytest.raises(TypeError, match=r"a dict with the keys input_ids; pass batches of them, such as \[data\]"):
        XNNAttribution(Text(), "mix").fit({"input_ids": ids}, 0, progress=False)


def test_a_name_that_is_nearly_that_of_an_argument_is_told_once():
    ids, mask, _ = texts()
    with pytest.warns(UserWarning, match="forward of Text takes no argument named mask, .* attention_mask; ") as w:
        collect(Text(), "mix", batches({"input_ids": ids, "mask": mask}))
    assert len(w) == 1


def test_an_entry_that_the_model_would_take_is_told_once_with_the_way_out():
    """A loader of (ids, mask, labels) ran without the mask."""
    model, tables = Text(), texts()
    loader, everything = DataLoader(TensorDataset(*tables), 16), torch.ones(N).bool()
    xnn = XNNAttribution(model, "mix", 2)
    told = r"only the first of a batch's 3 entries is passed to Text, and its forward could also take attention_mask"
    with pytest.warns(UserWarning, match=told) as seen:
        xnn.fit(loader, [0, 1], positives=everything, progress=False).score(loader, 0)
    assert [warning.filename for warning in seen] == [__file__]
    for way_out in (lambda batch: (batch[0], batch[1]), lambda batch: (batch[0], None)):
        XNNAttribution(model, "mix", 2, unpack=way_out).fit(loader, 0, positives=everything, progress=False)
    named = collect(model, "mix", loader, unpack=lambda batch: (batch[0], batch[1]))
    torch.testing.assert_close(named.y_hat, model(*tables[:2]).detach())


class Plain(nn.Module):
    def forward(self, x, mask=None):
        return x


class Switch(nn.Module):
    def forward(self, x, return_features=False, targets=None):
        return x


X, Y = torch.rand(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("model", "batch", "told"),
    [
        (Plain(), X, False),
        (Plain(), (X,), False),
        (Plain(), (X, Y), False),  # a number for each example is the label
        (Plain(), (X, X), True),
        (Plain(), [X, Y, Y], True),
        (Plain(), ((X, X), Y, Y), False),  # all arguments are in the first place
        (Plain(), (X, ["a"], ["b"]), False),
        (Switch(), (X, Y, X), False),  # no argument that takes an input
        (nn.Identity(), (X, X, X), False),
    ],
)
@pytest.mark.filterwarnings("error")
def test_when_an_entry_is_told(model, batch, told):
    unpack = ForModel(model)
    if told:
        with pytest.warns(UserWarning, match="could also take mask; say which entries are arguments"):
            given = unpack(batch)
        assert unpack(batch)[0] is given[0]  # once
    else:
        given = unpack(batch)
    wanted = first_of_batch(batch)
    assert given[1] is None
    assert given[0] is wanted[0] or given == wanted


def test_a_model_that_needs_more_than_the_first_entry_is_refused():
    image, table, labels = torch.rand(N, 1, 8, 8), torch.rand(N, 5), torch.arange(N)
    loader = DataLoader(TensorDataset(image, table, labels), 16)
    told = r"Both needs image, table, and only the first of a batch's 3 entries .*\(tuple\(batch\[:2\]\), None\)"
    with pytest.raises(TypeError, match=told):
        collect(Both(), "conv", loader)
    model = Both()
    wanted = model(image, table).detach()
    found = collect(model, "conv", loader, unpack=lambda batch: (tuple(batch[:2]), None))
    torch.testing.assert_close(found.y_hat, wanted)
    torch.testing.assert_close(collect(model, "conv", [((image, table), labels)]).y_hat, wanted)


def test_a_users_own_function_stays_and_ours_pickles():
    own = lambda batch: (batch, None)  # noqa: E731
    assert unpack_for(Plain(), own) is own
    again = pickle.loads(pickle.dumps(unpack_for(Plain(), first_of_batch)))
    (mask,) = again({"mask": Y, "x": X})[1]
    assert mask is Y
