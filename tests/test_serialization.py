"""Saved explainers: the same explanations after loading, and one clear error for whatever is wrong with the files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn import _serialization as files
from captum_xnn.errors import ExplainerFileError, ModelMismatchError, NotFittedError
from captum_xnn.layers._fingerprint import differences, fingerprint


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(width=8):
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    return model


DATA, X = randn(90, 5, seed=10), randn(4, 5, seed=11)
QUICK = Recipe(steps=10)


def fitted(model=None, **settings):
    xnn = XNNAttribution(model or net(), "2", 2, recipe=QUICK, autoencoder=partial(SRAE, hidden=(6,)), **settings)
    return xnn.fit(DATA, [0, 2], progress=False)


@pytest.fixture(scope="module")
def xnn():
    return fitted(seed=3)


@pytest.fixture
def saved(xnn, tmp_path):
    return xnn.save(tmp_path / "explainer")


def same(a, b, target):
    one, other = a.explain(X, target), b.explain(X, target)
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("maps", "features", "contributions", "bias", "surrogate", "prediction")
    )


def edited(folder, change):
    """Changes the JSON, as a faulty program would."""
    path = folder / "explainer.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# --- round trips


def test_load_gives_the_same_explanations(xnn, saved):
    again = XNNAttribution.load(saved, xnn.model)
    assert same(xnn, again, 0) and same(xnn, again, 2)
    for target in (0, 2):
        old, new = xnn.explainer(target), again.explainer(target)
        for name in ("layer", "targets", "f_reg", "examples", "positives", "floor", "history"):
            assert getattr(new, name) == getattr(old, name), name
        assert not any(p.requires_grad for p in new.form.parameters())
    assert (again.n_features, again.seed, again.recipe) == (2, 3, QUICK)
    assert XNNAttribution.load(str(saved), net()).score(DATA, 0) == xnn.score(DATA, 0)


def test_what_is_fitted_after_loading_is_as_before(xnn, saved):
    again = XNNAttribution.load(saved, xnn.model, autoencoder=partial(SRAE, hidden=(6,)))
    again.fit(DATA, [0, 2], progress=False)
    assert same(xnn, again, 0)


@pytest.mark.filterwarnings("ignore:probabilities sum to")  # so small a model has neurons that only a bias excites
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "joint", "tuple", "conv", "None"])
def test_every_kind_of_explainer_round_trips(kind, tmp_path):
    model, layer, target, joint, data = net(), "2", 0, False, DATA
    make = partial(SRAE, hidden=(6,))
    if kind in ("float64", "bfloat16"):
        dtype = getattr(torch, kind)
        model, data = model.to(dtype), DATA.to(dtype)
    elif kind == "joint":
        target, joint = (0, 2), True
    elif kind == "tuple":
        model.append(nn.Unflatten(1, (1, 3)))
        target = (0, 2)
    elif kind == "conv":
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
        layer, make, data = "1", None, randn(40, 1, 6, 6)
    else:
        model[3], target = nn.Linear(8, 1), None
    positives = None if target is None else torch.ones(len(data), dtype=torch.bool)
    xnn = XNNAttribution(model, layer, 2, recipe=QUICK, autoencoder=make)
    xnn.fit(data, target, joint=joint, positives=positives, progress=False)
    again = XNNAttribution.load(xnn.save(tmp_path), model)
    for t in target if joint else [target]:
        one, other = xnn.explain(data[:3], t), again.explain(data[:3], t)
        assert torch.equal(one.maps, other.maps) and torch.equal(one.surrogate, other.surrogate)
        assert one.contributions.dtype == other.contributions.dtype
    assert again.explainer(t).targets == xnn.explainer(t).targets


def test_only_the_current_layer_is_saved(tmp_path):
    xnn = fitted()
    xnn.layer = xnn.model[0]
    with pytest.raises(NotFittedError, match="layer '0' has no fitted explainers to save"):
        xnn.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:probabilities sum to")  # so small a model has neurons that only a bias excites
def test_the_whole_model_as_the_layer(tmp_path):
    """Its dotted name is the empty string, here as in PyTorch."""
    model = net()
    try:
        xnn = XNNAttribution(model, model, 2, recipe=QUICK, autoencoder=SRAE).fit(DATA, 0, progress=False)
    except ValueError:
        return  # refused at once is fine as well
    assert same(xnn, XNNAttribution.load(xnn.save(tmp_path), model), 0)


# --- the files


def test_the_files_and_their_checksum(xnn, saved):
    manifest = json.loads((saved / "explainer.json").read_text())
    assert sorted(p.name for p in saved.iterdir()) == sorted(["explainer.json", manifest["weights"]])
    data = (saved / manifest["weights"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == manifest["sha256"]
    tensors = load_tensors(data)
    for i, target in enumerate((0, 2)):
        for name, tensor in xnn.explainer(target).form.state_dict().items():
            assert torch.equal(tensors.pop(f"{i}.{name}"), tensor)
    assert not tensors
    assert manifest["schema"] == files.SCHEMA == 1 and manifest["layer"] == "2"


def test_saving_again_leaves_one_pair(saved):
    first = {p.name for p in saved.iterdir()}
    other = fitted(seed=9)
    assert other.save(saved) == saved
    second = {p.name for p in saved.iterdir()}
    assert len(second) == 2 and first != second
    assert same(other, XNNAttribution.load(saved, net()), 0)
    other.save(saved)
    assert {p.name for p in saved.iterdir()} == second


@pytest.mark.parametrize("failing", ["explainer.json", ".safetensors"])
def test_a_crash_while_saving_leaves_the_old_explainer(xnn, saved, failing, monkeypatch):
    replace = os.replace

    def crash(source, destination):
        if str(destination).endswith(failing):
            raise OSError("disk full, on purpose")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full, on purpose"):
        fitted(seed=9).save(saved)
    monkeypatch.undo()
    assert not [p.name for p in saved.iterdir() if "tmp" in p.name or p.name.startswith(".")]
    assert same(xnn, XNNAttribution.load(saved, xnn.model), 0)
    fitted(seed=9).save(saved)
    assert len(list(saved.iterdir())) == 2


def test_a_crash_while_writing_leaves_the_old_explainer(xnn, saved, monkeypatch):
    def crash(_):
        raise OSError("disk full, on purpose")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full, on purpose"):
        fitted(seed=9).save(saved)
    monkeypatch.undo()
    assert len(list(saved.iterdir())) == 2
    assert same(xnn, XNNAttribution.load(saved, xnn.model), 0)


def test_nothing_is_pickled(xnn, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    XNNAttribution.load(xnn.save(tmp_path), xnn.model)


def test_the_weights_file_stays_in_its_folder(xnn, saved, tmp_path):
    """A foreign manifest cannot make us read elsewhere."""
    (weights,) = saved.glob("*.safetensors")
    weights.rename(tmp_path / weights.name)
    edited(saved, lambda m: m.update(weights=f"../{weights.name}"))
    with pytest.raises(ExplainerFileError, match="are missing or cannot be read"):
        XNNAttribution.load(saved, xnn.model)


# --- damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign_weights(folder):
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(b"not safetensors at all")
    edited(folder, lambda m: m.update(sha256=hashlib.sha256(weights.read_bytes()).hexdigest()))


DAMAGE = {
    "truncated weights": (lambda f: cut(*f.glob("*.safetensors")), "are cut short or were changed"),
    "a flipped bit": (lambda f: flip(*f.glob("*.safetensors")), "are cut short or were changed"),
    "no weights": (lambda f: next(f.glob("*.safetensors")).unlink(), "are missing or cannot be read"),
    "weights of no safetensors": (foreign_weights, "are not safetensors"),
    "truncated JSON": (lambda f: cut(f / "explainer.json"), "cut short, or is not JSON"),
    "no text": (lambda f: (f / "explainer.json").write_bytes(b"\xff\xfe\x00"), "cut short, or is not JSON"),
    "empty JSON": (lambda f: (f / "explainer.json").write_bytes(b""), "cut short, or is not JSON"),
    "foreign JSON": (lambda f: (f / "explainer.json").write_text('{"a": 1}'), "does not describe explainers"),
    "JSON of another kind": (lambda f: (f / "explainer.json").write_text("[1]"), "does not describe explainers"),
    "no JSON": (lambda f: (f / "explainer.json").unlink(), "has no explainer.json"),
    "another schema": (lambda f: edited(f, lambda m: m.update(schema=2)), "has schema 2 instead of 1, as another"),
    "an entry missing": (lambda f: edited(f, lambda m: m.pop("layer")), "entries missing or damaged"),
    "no explainers": (lambda f: edited(f, lambda m: m.pop("explainers")), "entries missing or damaged"),
    "no number": (lambda f: edited(f, lambda m: m.pop("n_features")), "entries missing or damaged"),
    "no seed": (lambda f: edited(f, lambda m: m.pop("seed")), "entries missing or damaged"),
    "no list": (lambda f: edited(f, lambda m: m.update(explainers=5)), "entries missing or damaged"),
    "recipe": (lambda f: edited(f, lambda m: m["recipe"].update(spice=1)), "entries missing or damaged"),
    "a recipe out of range": (lambda f: edited(f, lambda m: m["recipe"].update(steps=0)), "entries missing or damaged"),
    "class": (
        lambda f: edited(f, lambda m: m["explainers"][0].update({"class": "my.Foo"})),
        r"class 'my.Foo' is not known; .*\[Foo\]",
    ),
    "no class": (lambda f: edited(f, lambda m: m["explainers"][0].update({"class": 5})), "entries missing or damaged"),
    "dtype": (lambda f: edited(f, lambda m: m["explainers"][0].update(dtype="float7")), "entries missing or damaged"),
    "config": (lambda f: edited(f, lambda m: m["explainers"][0]["config"].update(x=1)), "entries missing or damaged"),
    "shape": (lambda f: edited(f, lambda m: m["explainers"][0]["config"].update(shape=9)), "entries missing or damag"),
    "targets": (lambda f: edited(f, lambda m: m["explainers"][0].pop("targets")), "entries missing or damaged"),
    "history": (lambda f: edited(f, lambda m: m["explainers"][0].update(history=[[1]])), "entries missing or damaged"),
    "fingerprint": (lambda f: edited(f, lambda m: m.update(fingerprint={})), "entries missing or damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(xnn, saved, what):
    damage, told = DAMAGE[what]
    damage(saved)
    with pytest.raises(ExplainerFileError, match=told):
        XNNAttribution.load(saved, xnn.model)


OTHERS = (None, -1, 1.5, "x", [], {}, [[]], [None])


def places(value, path=()):
    """The path of everything in a manifest, of lists of their first two entries."""
    yield path
    for key, entry in (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    ):
        yield from places(entry, (*path, key))


def with_other(value, path, other):
    """A manifest with something else in one place, or nothing."""
    if not path:
        return other
    made = dict(value) if isinstance(value, dict) else list(value)
    if other is Ellipsis and len(path) == 1:
        del made[path[0]]
    else:
        made[path[0]] = with_other(value[path[0]], path[1:], other)
    return made


@pytest.mark.filterwarnings("ignore:the model differs", "ignore:Initializing zero-element")
@pytest.mark.parametrize("form", [None, partial(SRAE, hidden=(6,))], ids=["groups", "learned"])
def test_whatever_is_damaged_in_a_manifest(form, tmp_path):
    """Any entry replaced by anything, or left out, is loaded or told, and what is loaded explains or is not fitted."""
    model = net()
    XNNAttribution(model, "2", 2, recipe=QUICK, autoencoder=form).fit(DATA, [0, 2], progress=False).save(tmp_path)
    file = tmp_path / "explainer.json"
    manifest, loaded, told = json.loads(file.read_text()), 0, 0
    for path in places(manifest):
        for other in (*OTHERS, *([Ellipsis] if path else [])):
            file.write_text(json.dumps(with_other(manifest, path, other)))
            for strict in (True, False):
                try:
                    xnn = XNNAttribution.load(tmp_path, model, strict=strict)
                except (ExplainerFileError, ModelMismatchError):
                    told += 1
                    continue
                loaded += 1
                if strict:
                    try:
                        assert bool(xnn.contributions(X[:1], 0).features.isfinite().all()), (path, other)
                    except (NotFittedError, ModelMismatchError):
                        told += 1
    assert told > loaded > 100


def test_a_path_that_is_no_folder(xnn, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ExplainerFileError, match="or pass the folder it was saved to"):
            XNNAttribution.load(path, xnn.model)


# --- other models


def other_values(model):
    model[0].weight.data[0, 0] += 1


def other_statistics(model):
    model[1].running_mean += 1


def other_tail(model):
    model[3] = nn.Linear(8, 4)


def without_tail(model):
    del model[3]


def with_more(model):
    model.append(nn.Linear(3, 3))


def other_layer_class(model):
    model[2] = nn.Tanh()


MODELS = {
    "values": (
        other_values,
        "^the model differs: 0.weight has other values. The explainers were fitted to another one: load its weights",
    ),
    "buffers": (other_statistics, "differs: 1.running_mean has other values"),
    "shape": (
        other_tail,
        r"tensor 3.weight is float32 \[4, 8\], was float32 \[3, 8\]; tensor 3.bias is float32 \[4\], was float32 \[3\]",
    ),
    "missing": (without_tail, "differs: 3.weight, 3.bias is missing"),
    "new": (with_more, "differs: 4.weight, 4.bias is new"),
    "class of the layer": (other_layer_class, "differs: layer class is Tanh, was ReLU"),
    "softmax": (
        lambda model: model.append(nn.Softmax(1)),
        "differs: 4 is new, a Softmax. The explainers were fitted to another one: pass the model without its Softmax",
    ),
    "dtype": (lambda model: model.double(), r"0.weight is float64 \[8, 5\], was float32 \[8, 5\]"),
}


@pytest.mark.parametrize("what", MODELS)
def test_another_model_is_refused_or_warned_of(saved, what):
    change, told = MODELS[what]
    model = net()
    change(model)
    with pytest.raises(ModelMismatchError, match=f"{told}.*strict=False loads all the same"):
        XNNAttribution.load(saved, model)
    with pytest.warns(UserWarning, match=told):
        again = XNNAttribution.load(saved, model, strict=False)
    if what == "values":
        assert again.attribute(X, 0).shape == (4, 2, 5)


def test_the_same_values_in_another_object_are_the_same_model(saved, xnn):
    assert same(xnn, XNNAttribution.load(saved, nn.DataParallel(net().train())), 0)


def test_dropout_makes_no_other_model_but_an_activation_does():
    def of(*modules):
        return fingerprint(nn.Sequential(nn.Linear(2, 2, bias=False), *modules), "0")

    a = of(nn.ReLU())
    a["tensors"] = {}
    assert of(nn.ReLU(), nn.Dropout())["functions"] == of(nn.ReLU(), nn.Identity())["functions"] == a["functions"]
    assert differences(a, {**of(nn.GELU()), "tensors": {}}) == ["1 is a GELU, was a ReLU"]
    assert differences(a, {**of(), "tensors": {}}) == ["1, a ReLU, is missing"]


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_without_the_layer(saved, strict):
    with pytest.raises(ModelMismatchError, match="the Sequential has no layer '2'; pass the model"):
        XNNAttribution.load(saved, nn.Sequential(nn.Linear(5, 8)), strict=strict)


@pytest.mark.filterwarnings("ignore:the model differs:UserWarning")
def test_a_layer_of_another_shape_cannot_be_explained(saved):
    with pytest.warns(UserWarning, match=r"is float32 \[12"):
        other = XNNAttribution.load(saved, net(width=12), strict=False)
    with pytest.raises(ModelMismatchError, match=r"layer .* gives \(12,\) values per example, and gave"):
        other.explain(X, 0)


def test_many_differences_are_counted():
    a, b = (nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(6))) for _ in range(2))
    told = differences(fingerprint(a, "0"), fingerprint(b, "0"))
    assert told == ["0.weight, 1.weight, 2.weight and 3 more has other values"]
    assert differences(fingerprint(a, "0"), fingerprint(a, "1")) == ["layer is 1, was 0"]
    assert differences(fingerprint(a, "0"), fingerprint(a, "0")) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
def test_fingerprints_of_every_dtype(dtype):
    class Holds(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.layer = nn.Identity()
            self.register_buffer("scalar", torch.tensor(fill).to(dtype))
            self.register_buffer("turned", torch.full((2, 3), fill).to(dtype).T)
            self.register_buffer("empty", torch.zeros(0).to(dtype))

    made = [fingerprint(Holds(fill), "layer") for fill in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert differences(made[0], made[2]) == ["scalar, turned has other values"]


# --- transforms


def first(output):
    return output


def test_transforms_must_be_passed_again(tmp_path):
    xnn = fitted(output_transform=first, prediction_transform=first)
    path = xnn.save(tmp_path)
    with pytest.raises(
        TypeError, match=r"fitted with output_transform= and prediction_transform=, and functions .* to load"
    ):
        XNNAttribution.load(path, xnn.model)
    with pytest.raises(TypeError, match="fitted with prediction_transform=, and functions"):
        XNNAttribution.load(path, xnn.model, output_transform=first)
    again = XNNAttribution.load(path, xnn.model, output_transform=first, prediction_transform=first)
    assert same(xnn, again, 0)
