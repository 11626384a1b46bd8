"""What is wrong with a call is told before the model has run on all data, and only what is asked for is kept."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import nn

from captum_xnn import SRAE, OneHeatmap, Recipe, XNNAttribution
from captum_xnn.activations import collect
from captum_xnn.activations._activations import Asked
from captum_xnn.layers import EveryCall

FORMS = {"groups": None, "learned": partial(SRAE, hidden=(4,))}


class Counting(nn.Module):
    """Counts the examples that it sees, and keeps track of its outputs that are still alive."""

    def __init__(self, shape=(3,)):
        super().__init__()
        self.a, self.relu, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, torch.Size(shape).numel())
        self.shape = shape
        self.alive = []

    def forward(self, x):
        global SEEN, MOST
        SEEN += len(x)
        y = self.head(self.relu(self.a(x))).reshape(len(x), *self.shape)
        ALIVE[:] = [r for r in ALIVE if r() is not None]
        MOST = max(MOST, len(ALIVE))
        ALIVE.append(weakref.ref(y.untyped_storage()))
        return y


SEEN, MOST, ALIVE = 0, 0, []


@pytest.fixture(autouse=True)
def unseen():
    global SEEN, MOST
    SEEN, MOST = 0, 0
    ALIVE.clear()


def loader(n=640):
    return [x for x in torch.randn(n, 6).split(64)]


def explainer(model, form, **settings):
    return XNNAttribution(model, "relu", 2, autoencoder=FORMS[form], recipe=Recipe(steps=5), **settings)


# --- told before all data are read


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize(
    ("target", "told"),
    [
        (5, r"target 5 is outside the model's outputs \(3,\); targets count from 0"),
        (-1, r"target -1 is outside the model's outputs \(3,\)"),
        (None, r"target None does not pick one of the model's outputs \(3,\) per example; pass an int"),
        ((1, 2), r"target \(1, 2\) does not pick one of the model's outputs \(3,\) per example; pass an int"),
        ([0, 1, 7], r"target 7 is outside the model's outputs"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_target_is_told_on_the_first_batch(form, target, told, stored, tmp_path):
    with pytest.raises(ValueError, match=told):
        explainer(Counting(), form).fit(loader(), target, store=tmp_path if stored else None, progress=False)
    assert SEEN <= 3 * 64


@pytest.mark.parametrize("form", FORMS)
def test_score_tells_a_wrong_target_on_the_first_batch(form):
    xnn = explainer(Counting(), form).fit(loader(), 1, positives=torch.ones(640).bool(), progress=False)
    xnn.prediction_transform = partial(torch.unflatten, dim=1, sizes=(1, 3))
    global SEEN
    SEEN = 0
    with pytest.raises(ValueError, match=r"target 1 does not pick one of the model's outputs \(1, 3\) per example"):
        xnn.score(loader(), 1)
    assert SEEN <= 3 * 64


class NoWay(Counting):
    """Cuts the way from the layer to the output."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, x):
        global SEEN
        SEEN += len(x)
        return self.cut(self.head, self.relu(self.a(x)))


def without_gradients(head, h):
    with torch.no_grad():
        return head(h)


CUTS = {
    "argmax": lambda head, h: 3.0 * nn.functional.one_hot(head(h).argmax(1), 3) - 1,
    "no_grad": without_gradients,
    "detach": lambda head, h: head(h.detach()),
    "numpy": lambda head, h: torch.from_numpy(head(h).detach().numpy()),
    "through data": lambda head, h: head(h.data),
}


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize("cut", CUTS)
def test_missing_gradients_behind_the_layer_are_told_on_the_first_batch(cut, stored, tmp_path):
    model = NoWay(CUTS[cut])
    model.head.requires_grad_(False)  # a head that learns has gradients of its own
    with pytest.raises(ValueError, match="the model's output does not depend on layer 'relu' in a way that has grad"):
        explainer(model, "groups").fit(loader(), 0, store=tmp_path if stored else None, progress=False)
    assert 0 < SEEN <= 3 * 64
    assert not any(p.requires_grad for p in model.head.parameters()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("cut", CUTS)
def test_learned_forms_need_no_gradients_behind_the_layer(cut):
    """As the error advises."""
    x = torch.randn(200, 6)
    xnn = explainer(NoWay(CUTS[cut]), "learned").fit(x, 0, positives=torch.ones(200).bool(), progress=False)
    torch.testing.assert_close(xnn.contributions(x[:3], 0).prediction, xnn.model(x[:3])[:, 0].detach())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.relu, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x, y):
        global SEEN
        SEEN += len(x)
        return self.head(self.relu(self.a(x + y)))


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize("form", FORMS)
def test_uneven_inputs_are_told_before_the_model_runs(form, stored, tmp_path):
    data = torch.randn(640, 6), torch.randn(600, 6)
    told = r"inputs differ in their number of examples, with shapes \[\(640, 6\), \(600, 6\)\]; pass as many"
    with pytest.raises(ValueError, match=told):
        explainer(Two(), form).fit(data, 0, store=tmp_path if stored else None, progress=False)
    assert SEEN == 0


@pytest.mark.parametrize("positives", [torch.ones(639).bool(), torch.ones(640)], ids=["too few", "floats"])
@pytest.mark.parametrize("form", FORMS)
def test_wrong_positives_are_told_before_the_model_runs(form, positives):
    with pytest.raises(ValueError, match=r"positives are .*, not booleans \(640,\)"):
        explainer(Counting(), form).fit(torch.randn(640, 6), 0, positives=positives, progress=False)
    assert SEEN == 0


def test_all_calls_of_a_layer_are_refused_before_the_model_runs():
    with pytest.raises(ValueError, match="groups of contributions explain one call; fit with autoencoder=SRAE"):
        explainer(Counting(), "groups", output_transform=EveryCall()).fit(loader(), 0, progress=False)
    assert SEEN == 0


# --- a tuple of batches


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize("rows", [400, 430])
@pytest.mark.parametrize("form", FORMS)
def test_a_tuple_of_batches_is_told_from_inputs(form, rows, stored, tmp_path):
    x = torch.randn(rows, 6)
    xnn, batches = explainer(Counting(), form), x.split(100)
    told = rf"a tuple of {len(batches)} tensors is {len(batches)} inputs .* Counting takes 1; .* list\(batches\)"
    with pytest.raises(TypeError, match=told):
        xnn.fit(batches, 0, store=tmp_path if stored else None, progress=False)
    assert SEEN == 0
    everything = torch.ones(rows).bool()
    xnn.fit(list(batches), 0, positives=everything, progress=False)  # as the error advises
    whole = explainer(xnn.model, form).fit(x, 0, positives=everything, progress=False)
    E, wanted = (made.contributions(x[:3], 0).features for made in (xnn, whole))
    torch.testing.assert_close(E, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"takes 1; if they are batches of one input, pass them as a list"):
        xnn.score(batches, 0)
    for call in (xnn.attribute, xnn.explain, xnn.contributions, OneHeatmap(xnn.model).attribute):
        with pytest.raises(
            TypeError, match=r"takes 1; if they are batches of one input, join them, torch.cat\(batches\)"
        ):
            call(batches, 0)


def test_inputs_with_labels_are_told_from_inputs():
    data = torch.randn(40, 6), torch.randint(0, 3, (40,))
    with pytest.raises(TypeError, match="If all but the first are labels, pass only the first"):
        explainer(Counting(), "groups").fit(data, 0, progress=False)


def test_models_with_any_number_of_inputs_take_them():
    class Sums(Counting):
        def forward(self, *inputs):
            return super().forward(sum(inputs))

    data = tuple(torch.randn(60, 6) for _ in range(3))
    xnn = explainer(model := Sums(), "groups").fit(data, 0, positives=torch.ones(60).bool(), progress=False)
    assert torch.equal(
        xnn.explain(tuple(x[:2] for x in data), 0).prediction, model(*(x[:2] for x in data))[:, 0].detach()
    )


# --- one explainer at a time


@pytest.mark.parametrize("targets", [[0, 2], torch.tensor([0, 2]), range(0, 3, 2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_list_of_targets_has_no_one_score(form, targets):
    x = torch.randn(200, 6)
    xnn = explainer(Counting(), form).fit(x, targets, positives=torch.ones(200).bool(), progress=False)
    before = SEEN
    for call in (partial(xnn.score, x), xnn.explainer):
        with pytest.raises(
            ValueError, match=r"target is the list of 0, 2, .* \{t: xnn.score\(data, t\) for t in targets\}"
        ):
            call(targets)
    assert before == SEEN
    each = {t: xnn.score(x, t) for t in targets}  # as the error advises, also with numbers from a tensor
    assert [s.examples for s in each.values()] == [200, 200]


# --- one pixel of a segmentation, one token of a language model


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 9)], ids=["pixels", "tokens"])
@pytest.mark.parametrize("form", FORMS)
def test_only_outputs_that_are_asked_for_are_kept(form, shape):
    """Of ten batches' outputs no more than the current ones are alive, and the numbers are those of all outputs."""
    model, data = Counting(shape), loader()
    targets = [tuple(n - 1 for n in shape), (0,) * len(shape)]
    xnn = explainer(model, form).fit(data, targets, progress=False)
    xnn.score(data, targets[0])
    assert MOST <= 4
    x = torch.cat(data)
    why, wanted = xnn.explain(x[:5], targets[0]), model(x[:5])[(slice(None), *targets[0])]
    assert torch.equal(why.prediction, wanted.detach())
    score = xnn.score(x, targets[0])
    y, y_bar = model(x)[(slice(None), *targets[0])].detach(), xnn.contributions(x, targets[0]).surrogate
    assert score.f_reg == pytest.approx(float((y - y_bar).abs().mean()), rel=1e-3, abs=1e-6)
    assert score.f_cls is None


def test_what_is_kept_is_a_copy_of_the_columns():
    model, x = Counting((3, 4, 5)), torch.randn(70, 6)
    found = collect(model, "relu", x, asked=Asked([(2, 3, 4), (0, 1, 2)]))
    assert found.y_hat.untyped_storage().nbytes() == 70 * 2 * 4
    y = model(x).detach()
    torch.testing.assert_close(found.y_hat, torch.stack([y[:, 2, 3, 4], y[:, 0, 1, 2]], 1))
    assert found.asked.targets == [(2, 3, 4), (0, 1, 2)]
    assert collect(Counting((3,)), "relu", x, asked=Asked([1])).y_hat.shape == (70, 3)  # classes are needed whole


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_of_pixels_are_still_told(form):
    transform = partial(torch.softmax, dim=1)
    xnn = explainer(Counting((3, 4, 5)), form, prediction_transform=transform)
    with pytest.warns(UserWarning, match="outputs are non-negative and sum to 1"):
        xnn.fit(loader(), (0, 1, 2), progress=False)


# --- a whole token layer as Z


class Tokens(nn.Module):
    """197 tokens of 768 dimensions, as a vision transformer has them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(1, 768), nn.Linear(768, 3)

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


def test_a_network_of_a_whole_token_layer_is_told_before_it_is_made():
    """242 million weights: 2 x 197 x 768 x 800, and a few. The warning is an error here, so none of them was made."""
    model, x = Tokens(), torch.randn(16, 197, 1)
    told = (
        r"'embedding' has 242 million weights for 16 examples, about 3.9 GB .* Z has \(197, 768\) numbers per example"
    )
    with pytest.raises(UserWarning, match=told):
        XNNAttribution(model, "embedding", 2, autoencoder=SRAE).fit(
            x, 0, positives=torch.ones(16).bool(), progress=False
        )


def test_what_is_advised_for_a_whole_token_layer_is_small():
    model, x = Tokens(), torch.randn(16, 197, 1)
    everything = torch.ones(16).bool()
    groups = XNNAttribution(model, "embedding", 2).fit(x, 0, positives=everything, progress=False)
    assert groups.explainer(0).form.groups.numel() <= 2 * 768
    one = XNNAttribution(
        model, "embedding", 2, autoencoder=SRAE, recipe=Recipe(steps=1), output_transform=lambda output: output[:, 0]
    ).fit(x, 0, positives=everything, progress=False)
    assert sum(p.numel() for p in one.explainer(0).form.parameters()) < 2_000_000


class OfList(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(16, 1)

    def forward(self, many):
        return self.head(torch.cat([self.hidden(x).relu() for x in many], 1))


class Listed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        return self.model(list(tensors))


def test_a_model_of_a_list_of_tensors_is_explained_within_a_module_that_makes_the_list():
    model, many = OfList(), (torch.rand(40, 4), torch.rand(40, 4))
    said = r"explain a module whose forward\(self, \*tensors\) makes the list"
    with pytest.raises(IndexError, match=said):  # a list is read as batches
        XNNAttribution(model, "head", 1).fit(list(many), progress=False)
    with pytest.raises(TypeError, match=said):
        XNNAttribution(model, "head", 1).fit(many, progress=False)
    why = XNNAttribution(Listed(model), "model.head", 1).fit(many, progress=False).explain(many)
    assert torch.allclose(why.bias + why.contributions.sum(1), model(list(many))[:, 0], atol=1e-5)
