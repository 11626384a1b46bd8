"""Heatmap backends: all maps of one call are those of a loop over the x-features with Captum's own class."""

from __future__ import annotations

import pickle
import warnings

import captum.attr
import numpy as np
import pytest
import torch
from captum.attr import (
    LRP,
    DeepLift,
    FeatureAblation,
    FeaturePermutation,
    GradientShap,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    LayerIntegratedGradients,
    LayerLRP,
    NeuronGradient,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import nn
from torch.nn import functional as F

from captum_xnn.attribution import XNNAttribution
from captum_xnn.errors import LayerNotReachedError
from captum_xnn.excitation_bp import LayerExcitationBP
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum
from captum_xnn.heatmaps._from_captum import as_heatmap
from captum_xnn.heatmaps._network import ExplanationNetwork
from captum_xnn.layers._trace import trace
from captum_xnn.models import SRAE

K = 3
METHODS = {
    "saliency": (Saliency, {}),
    "integrated": (IntegratedGradients, {"n_steps": 6}),
    "deeplift": (DeepLift, {}),
    "input-x-gradient": (InputXGradient, {}),
    "guided": (GuidedBackprop, {}),
    "occlusion": (Occlusion, {"sliding_window_shapes": (1, 3, 3), "strides": (1, 3, 3)}),
    "ablation": (FeatureAblation, {"feature_mask": torch.arange(36).reshape(1, 1, 6, 6) // 6}),
    "lrp": (LRP, {}),
}


def made(dtype=torch.float32):
    """A network with leaves of its own, so that it can be rebuilt as a clean one, and some inputs."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
    model, srae, x = model.eval().to(dtype), SRAE(24, K, hidden=(16,)).to(dtype), torch.randn(2, 1, 6, 6, dtype=dtype)
    return model, srae, x


def network_of(model, layer, srae, *arguments):
    module = model.get_submodule(layer)
    return ExplanationNetwork(model, layer, srae, trace=trace(model, module, arguments))


class Clean(nn.Module):
    """The model up to the layer and the encoder, without any hook."""

    def __init__(self, model, srae):
        super().__init__()
        self.features, self.encoder = nn.Sequential(*list(model)[:4]), srae.encoder

    def forward(self, x):
        return self.encoder(self.features(x).flatten(1))


def loop(method, settings, clean, x, *construct):
    """Captum's own class, once per x-feature."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        maps = [method(clean, *construct).attribute(x.clone(), target=k, **settings).detach() for k in range(K)]
    return torch.stack(maps, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_one_call_equals_a_loop_over_features(name, dtype):
    model, srae, x = made(dtype)
    method, settings = METHODS[name]
    network = network_of(model, "3", srae, x[:1])
    wanted = loop(method, settings, Clean(model, srae), x).to(dtype)
    assert bool(wanted.abs().max() > 0)
    assert bool((wanted[:, 0] - wanted[:, 1]).abs().max() > 0)
    (given,) = FromCaptum(method, **settings)(network, (x,), range(K))
    assert given.shape == (2, K, 1, 6, 6) and given.dtype == dtype
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)
    (some,) = FromCaptum(method, **settings)(network, (x,), [2, 0])
    torch.testing.assert_close(some, wanted[:, [2, 0]], rtol=1e-4, atol=1e-6)


def test_grad_cam_equals_a_loop_and_is_upsampled():
    model, srae, x = made()
    network = network_of(model, "3", srae, x[:1])
    clean = Clean(model, srae)
    for backend, layer in ((FromCaptum(LayerGradCam), "1"), (FromCaptum(LayerGradCam, layer="3"), "3")):
        small = loop(LayerGradCam, {}, clean, x, model.get_submodule(layer))
        assert small.shape == (2, K, 1, *((2, 2) if layer == "3" else (4, 4)))
        wanted = F.interpolate(small[:, :, 0], (6, 6), mode="bilinear")[:, :, None]
        (given,) = backend(network, (x,), range(K))
        torch.testing.assert_close(given, wanted)


def test_a_layer_method_without_feature_maps_says_so():
    model, srae = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), SRAE(8, K, hidden=())
    with pytest.raises(
        ValueError,
        match=r"feature maps \(N, C, H, W\), and no layer before '1' has any; name",
    ):
        FromCaptum(LayerGradCam)(network_of(model, "1", srae, torch.zeros(1, 4)), (torch.zeros(2, 4),), range(K))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1, 4])
def test_internal_batch_size_gives_the_same_and_bounds_the_rows(name, size):
    model, srae, x = made()
    x = torch.cat([x, 2 * x])
    method, settings = METHODS[name]
    network = network_of(model, "3", srae, x[:1])
    backend = FromCaptum(method, **settings)
    (whole,) = backend(network, (x,), range(K))
    rows = []
    model[0].register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    (parts,) = backend(network, (x,), range(K), internal_batch_size=size)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    # DeepLift runs each row together with its baseline.
    assert max(rows) <= size * (2 if method is DeepLift else 1)
    assert len(rows) >= len(x) * K // size


def test_settings_go_to_the_constructor_or_to_the_call():
    model, srae, x = made()
    network = network_of(model, "3", srae, x[:1])
    settings = {"n_steps": 4, "method": "riemann_left", "baselines": 0.5}
    (given,) = FromCaptum(IntegratedGradients, multiply_by_inputs=False, **settings)(network, (x,), range(K))
    clean = IntegratedGradients(Clean(model, srae), multiply_by_inputs=False)
    wanted = torch.stack([clean.attribute(x, target=k, **settings) for k in range(K)], 1)
    torch.testing.assert_close(given, wanted)
    (other,) = FromCaptum(IntegratedGradients, n_steps=4)(network, (x,), range(K))
    assert not torch.allclose(other, wanted)


def test_settings_of_a_call_go_before_those_of_construction():
    model, srae, x = made()
    network = network_of(model, "3", srae, x[:1])
    (given,) = FromCaptum(IntegratedGradients, n_steps=3)(network, (x,), range(K), n_steps=7)
    (wanted,) = FromCaptum(IntegratedGradients, n_steps=7)(network, (x,), range(K))
    torch.testing.assert_close(given, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["n_step", "target", "inputs", "return_convergence_delta", "forward_func"])
def test_settings_that_the_method_does_not_take(name):
    with pytest.raises(TypeError, match=f"IntegratedGradients has no setting '{name}'; it takes: .*n_steps"):
        FromCaptum(IntegratedGradients, **{name: 1})
    model, srae, x = made()
    with pytest.raises(TypeError, match=f"'{name}'"):
        FromCaptum(IntegratedGradients)(network_of(model, "3", srae, x), (x,), range(K), **{name: 1})


def test_a_class_with_open_settings_takes_any():
    class Open(Saliency):
        def attribute(self, inputs, target=None, additional_forward_args=None, **kwargs):
            assert kwargs == {"anything": 3}
            return super().attribute.__wrapped__(self, inputs, target, False, additional_forward_args)

    model, srae, x = made()
    (given,) = FromCaptum(Open, anything=3)(network_of(model, "3", srae, x), (x,), range(K))
    torch.testing.assert_close(given, loop(Saliency, {"abs": False}, Clean(model, srae), x))


NEURON = sorted(name for name in captum.attr.__all__ if name.startswith("Neuron") and name != "NeuronAttribution")


@pytest.mark.parametrize("name", NEURON)
def test_neuron_classes_are_refused(name):
    with pytest.raises(TypeError, match=f"{name} attributes hidden neurons, .* without 'Neuron'"):
        FromCaptum(getattr(captum.attr, name))
    assert "NeuronGradient" in NEURON


@pytest.mark.parametrize(
    "method",
    [
        FeaturePermutation,  # mixes the rows of a batch, so that no map is its example's own
        captum.attr.LayerFeaturePermutation,
        captum.attr.DataLoaderAttribution,  # takes an attribution, and no inputs
        LayerActivation,  # takes no target, so that all maps are the same
        captum.attr.Attribution,  # attributes nothing
        captum.attr.PerturbationAttribution,
    ],
)
def test_classes_that_cannot_draw_one_map_per_feature_are_refused(method):
    with pytest.raises(TypeError, match=method.__name__):
        FromCaptum(method)


class Minimal(captum.attr.Attribution):
    """A user's own class, with nothing that it does not need."""

    def attribute(self, inputs, target):
        with torch.no_grad():
            return inputs * self.forward_func(inputs)[torch.arange(len(inputs)), target][:, None, None, None]


@pytest.mark.parametrize("size", [None, 2])
def test_a_class_without_further_arguments(size):
    model, srae, x = made()
    network = network_of(model, "3", srae, x[:1])
    (given,) = FromCaptum(Minimal)(network, (x,), range(K), internal_batch_size=size)
    torch.testing.assert_close(given, (x[:, None] * network(x)[:, :, None, None, None]).detach())
    with pytest.raises(TypeError, match=r"Minimal\.attribute takes no additional_forward_args; add that argument"):
        FromCaptum(Minimal)(network, (x,), range(K), additional_forward_args=(1,))


@pytest.mark.parametrize("method", [Occlusion, FeatureAblation, captum.attr.ShapleyValueSampling])
def test_methods_that_show_progress_show_it(method, capsys):
    model, srae, x = made()
    network = network_of(model, "3", srae, x[:1])
    settings = {"sliding_window_shapes": (1, 3, 3)} if method is Occlusion else {"n_samples": 1}
    settings = {} if method is FeatureAblation else settings
    for shown in (False, True):
        FromCaptum(method, **settings)(network, (x,), range(K), show_progress=shown)
        said = capsys.readouterr()
        assert (f"{method.get_name()} attribution" in said.err + said.out) == shown


def test_small_batches_of_layer_conductance_are_told_of_by_nobody():
    """Captum warns that it takes more rows at once than told; for one map it does take two."""
    model, srae, x = made(torch.float64)
    network = network_of(model, "3", srae, x[:1])
    backend = FromCaptum(captum.attr.LayerConductance, n_steps=4, layer="1")
    (parts,) = backend(network, (x,), range(K), internal_batch_size=1)
    torch.testing.assert_close(parts, backend(network, (x,), range(K))[0])


@pytest.mark.parametrize("method", [LayerGradCam, LayerIntegratedGradients, captum.attr.GuidedGradCam, LayerLRP])
def test_layers_behind_the_explained_one(method):
    """Captum only says: Forward hook did not obtain any outputs for given layer."""
    model, _, x = made()
    network = network_of(model, "1", SRAE(8 * 16, K, hidden=()), x[:1])
    with pytest.raises(LayerNotReachedError, match="layer '2' does not run before the explained layer '1'"):
        FromCaptum(method, layer="2")(network, (x,), range(K))
    assert not any(m._forward_hooks for m in model.modules())


def test_noise_tunnels_average_any_method():
    model, srae, x = made(torch.float64)
    network, clean = network_of(model, "3", srae, x[:1]), Clean(model, srae)
    noise = {"nt_samples": 4, "stdevs": 0.0}
    wanted = loop(IntegratedGradients, {"n_steps": 5}, clean, x)
    for method in (IntegratedGradients, FromCaptum(IntegratedGradients, n_steps=5)):
        backend = FromCaptum(NoiseTunnel, attribution_method=method, n_steps=5, **noise)
        torch.testing.assert_close(backend(network, (x,), range(K))[0], wanted)
        torch.testing.assert_close(pickle.loads(pickle.dumps(backend))(network, (x,), range(K))[0], wanted)
    squared = FromCaptum(NoiseTunnel, attribution_method=DeepLift, nt_type="smoothgrad_sq", **noise)
    torch.testing.assert_close(squared(network, (x,), range(K))[0], loop(DeepLift, {}, clean, x) ** 2)
    # The gradient is piecewise constant, so that noise changes it, and its average is close to that of a long loop.
    torch.manual_seed(0)
    settings = {"nt_samples": 400, "stdevs": 0.5}
    (given,) = FromCaptum(NoiseTunnel, attribution_method=Saliency, **settings)(network, (x,), range(K), abs=False)
    (plain,) = FromCaptum(Saliency, abs=False)(network, (x,), range(K))
    noisy = x + 0.5 * torch.randn(2000, *x.shape, dtype=x.dtype)
    (each,) = FromCaptum(Saliency, abs=False)(network, (noisy.flatten(0, 1),), range(K))
    wanted = each.reshape(2000, *given.shape).mean(0)
    assert float((given - wanted).abs().mean()) < 0.3 * float((plain - wanted).abs().mean())


def test_noise_tunnels_without_a_method():
    with pytest.raises(TypeError, match=r"attribution_method=Saliency"):
        FromCaptum(NoiseTunnel, nt_samples=3)
    with pytest.raises(TypeError, match="Saliency has no setting 'samples'"):
        FromCaptum(NoiseTunnel, attribution_method=Saliency, samples=3)
    assert repr(FromCaptum(NoiseTunnel, attribution_method=Saliency)) == (
        "FromCaptum(NoiseTunnel, attribution_method=Saliency)"
    )


def test_what_is_no_backend_is_refused():
    with pytest.raises(TypeError, match=r"derived from captum\.attr\.Attribution"):
        FromCaptum(nn.Linear)
    with pytest.raises(TypeError, match=r"derived from captum\.attr\.Attribution"):
        FromCaptum(Saliency(nn.Linear(2, 1)))
    with pytest.raises(TypeError, match=r"type Saliency, .*; pass the class and its settings"):
        as_heatmap(Saliency(nn.Linear(2, 1)))
    with pytest.raises(TypeError, match="type str, neither a Captum class nor a heatmap backend"):
        as_heatmap("saliency")
    with pytest.raises(TypeError, match="attributes hidden neurons"):
        as_heatmap(NeuronGradient)


def test_a_heatmap_is_a_class_of_captum_a_backend_or_the_default():
    def own(*_, **__):
        return ()

    def backend(heatmap):
        return XNNAttribution(nn.Sequential(nn.Linear(2, 1)), "0", heatmap=heatmap).heatmap

    assert backend(own) is own is as_heatmap(own)
    assert backend(DeepLift).method is DeepLift
    default = backend(None)
    assert repr(default) == "DefaultMaps()" and backend(default) is default


def test_backends_pickle():
    backend = pickle.loads(pickle.dumps(FromCaptum(IntegratedGradients, n_steps=4)))
    model, srae, x = made()
    (given,) = backend(network_of(model, "3", srae, x), (x,), range(K))
    torch.testing.assert_close(given, loop(IntegratedGradients, {"n_steps": 4}, Clean(model, srae), x))


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids)).relu().mean(1))


def test_integers_are_refused_with_the_way_out():
    model = Embeds()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    network = network_of(model, "head", SRAE(3, K, hidden=()), ids)
    with pytest.raises(TypeError, match=r"input 0 is torch\.int64; .*LayerIntegratedGradients, layer='embedding'"):
        FromCaptum(IntegratedGradients)(network, (ids,), range(K))
    for method in (captum.attr.LayerConductance, captum.attr.InternalInfluence, captum.attr.LayerGradientShap):
        with pytest.raises(
            TypeError, match=f"{method.__name__} needs floating-point inputs, and input 0 is torch.int64"
        ):
            FromCaptum(method, layer="layer")(network, (ids,), range(K))


def test_the_way_out_of_token_ids_draws_maps_at_the_embedding_itself():
    torch.manual_seed(0)
    ids, model = torch.arange(40).reshape(10, 4) % 7, Embeds()
    every = torch.ones(10, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"torch\.int64; .*layer='embedding'"):
        XNNAttribution(model, "embedding", 2).fit(ids, target=1, positives=every, progress=False).explain(ids, target=1)
    advised = FromCaptum(LayerIntegratedGradients, layer="embedding")
    xnn = XNNAttribution(model, "embedding", 2, heatmap=advised)
    maps = xnn.fit(ids, target=1, positives=every, progress=False).attribute(ids, target=1)
    assert maps.shape[2:] == model.embedding(ids).shape[1:] and bool(maps.any())
    with pytest.raises(TypeError, match=r"layer='name\.of\.the\.embedding'"):
        XNNAttribution(Tabled(), "head", 2).fit(ids, target=1, positives=every, progress=False).explain(ids, target=1)


class Tabled(Embeds):
    """Looks its tokens up in a table of its own, without an embedding layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(self.embedding.weight.detach().clone())
        del self.embedding

    def forward(self, ids):
        return self.head(self.layer(self.table[ids]).relu().mean(1))


def test_methods_that_replace_inputs_take_token_ids():
    model, srae = Embeds(), SRAE(3, K, hidden=(4,))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    network = network_of(model, "head", srae, ids[:1])
    (given,) = FromCaptum(FeatureAblation)(network, (ids,), range(K))
    with torch.no_grad():
        for t in range(3):
            without = ids.clone()
            without[:, t] = 0
            torch.testing.assert_close(given[:, :, t], network(ids) - network(without))


def test_token_ids_are_explained_at_the_embedding():
    model, srae = Embeds(), SRAE(3, K, hidden=(4,))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    network = network_of(model, "head", srae, ids[:1])
    (given,) = FromCaptum(LayerIntegratedGradients, layer="embedding", n_steps=8)(network, (ids,), range(K))
    assert given.shape == (2, K, 3, 4) and given.dtype == torch.float32
    # Gradients at the embedding along the line from the embedding of token 0, averaged by hand.
    nodes, weights = np.polynomial.legendre.leggauss(8)
    start, end = model.embedding(torch.zeros_like(ids)).detach(), model.embedding(ids).detach()
    for k in range(K):
        total = torch.zeros_like(end)
        for node, weight in zip(nodes, weights, strict=True):
            at = (start + (node + 1) / 2 * (end - start)).float().requires_grad_()
            E = srae.encode(model.head(model.layer(at).relu().mean(1)))
            total += weight / 2 * torch.autograd.grad(E[:, k].sum(), at)[0]
        torch.testing.assert_close(given[:, k], total * (end - start), rtol=1e-4, atol=1e-6)
    (parts,) = FromCaptum(LayerIntegratedGradients, layer="embedding", n_steps=8)(
        network, (ids,), range(K), internal_batch_size=2
    )
    torch.testing.assert_close(parts, given)


@pytest.mark.parametrize("method", [IntegratedGradients, DeepLift, Saliency])
def test_the_users_input_is_left_alone(method):
    model, srae, x = made()
    network = network_of(model, "3", srae, x[:1])
    values = x.clone()
    for wants in (False, True):
        x.requires_grad_(wants)
        x.grad = grad = torch.ones_like(x) if wants else None
        (maps,) = FromCaptum(method)(network, (x,), range(K))
        assert x.requires_grad is wants and x.grad is grad
        assert torch.equal(x.detach(), values)
        assert not maps.requires_grad
    computed = 2 * x  # no leaf
    (maps,) = FromCaptum(method)(network, (computed,), range(K))
    assert not maps.requires_grad and computed.grad_fn is not None


@pytest.mark.parametrize("name", [*METHODS, "grad-cam"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_are_detached_contiguous_and_of_the_inputs_dtype(name, channels_last):
    method, settings = METHODS.get(name, (LayerGradCam, {}))
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU()).to(dtype)
        x = torch.randn(2, 3, 6, 6).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        network = network_of(model, "3", SRAE(8, K, hidden=()), x[:1])
        (maps,) = FromCaptum(method, **settings)(network, (x,), range(K))
        assert maps.dtype == dtype and maps.is_contiguous() and maps.grad_fn is None and not maps.requires_grad
        assert maps.shape == (2, K, 1 if name == "grad-cam" else 3, 6, 6)
        assert bool(torch.isfinite(maps).all())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.layer = nn.Linear(4, 6), nn.Linear(3, 6), nn.Tanh()

    def forward(self, a, b, scale, power):
        return self.layer(self.first(a) * scale[:, None] + self.second(b) ** power)


@pytest.mark.parametrize("size", [None, 2])
def test_tuples_of_inputs_and_further_arguments(size):
    model, srae = TwoInputs(), SRAE(6, K, hidden=(5,))
    a, b, scale = torch.randn(3, 4), torch.randn(3, 3), torch.rand(3) + 0.5
    network = network_of(model, "layer", srae, a[:1], b[:1], scale[:1], 2)
    given = FromCaptum(InputXGradient)(
        network, (a, b), range(K), additional_forward_args=(scale, 2), internal_batch_size=size
    )
    a_, b_ = a.clone().requires_grad_(), b.clone().requires_grad_()
    E = srae.encode(model(a_, b_, scale, 2))
    for k in range(K):
        grads = torch.autograd.grad(E[:, k].sum(), (a_, b_), retain_graph=True)
        for maps, x, grad in zip(given, (a, b), grads, strict=True):
            torch.testing.assert_close(maps[:, k], x * grad)


@pytest.mark.parametrize("method", [IntegratedGradients, DeepLift])
@pytest.mark.parametrize("size", [None, 2])
def test_baselines_of_one_example_each(method, size):
    """As in Captum, where a baseline may have a row for each input."""
    model, srae, x = made()
    baselines = torch.randn_like(x)
    wanted = loop(method, {"baselines": baselines}, Clean(model, srae), x)
    network = network_of(model, "3", srae, x[:1])
    (given,) = FromCaptum(method)(network, (x,), range(K), baselines=baselines, internal_batch_size=size)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)


def test_one_baseline_for_all():
    model, srae, x = made()
    baselines = torch.randn_like(x[:1])
    wanted = loop(DeepLift, {"baselines": baselines}, Clean(model, srae), x)
    (given,) = FromCaptum(DeepLift, baselines=baselines)(network_of(model, "3", srae, x[:1]), (x,), range(K))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)


def test_lrp_with_rules_of_ones_own_uses_them_for_every_map():
    """Captum drops such rules after the first call of an object."""
    from captum.attr._utils.lrp_rules import GammaRule

    model, srae, x = made()
    network = network_of(model, "3", srae, x[:1])

    class Gamma(LRP):
        def __init__(self, network):
            for m in network.modules():
                if isinstance(m, (nn.Conv2d, nn.Linear)):
                    m.rule = GammaRule()
            super().__init__(network)

    (whole,) = FromCaptum(Gamma)(network, (x,), range(K))
    (plain,) = FromCaptum(LRP)(network, (x,), range(K))
    (one,) = FromCaptum(Gamma)(network, (x,), [2], internal_batch_size=1)
    assert not torch.allclose(whole, plain)
    torch.testing.assert_close(whole[:, 2:], one, rtol=1e-4, atol=1e-6)


def test_random_methods_repeat_with_the_seed():
    model, srae, x = made()
    network = network_of(model, "3", srae, x[:1])
    backend = FromCaptum(GradientShap, baselines=torch.zeros(1, 1, 6, 6), n_samples=2)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002 - GradientShap draws from the global state
        results.append(backend(network, (x,), range(K))[0])
    assert torch.equal(*results)


def _deep(model, x, reference=0.0):
    """DeepLift's promise: contributions sum to the difference from the reference."""
    with torch.no_grad():
        return model(x) - model(torch.full_like(x, reference))


class Residual(nn.Module):
    """One ReLU used twice, and a sum by an operator."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu, self.flat = nn.Linear(5, 5), nn.Linear(5, 5), nn.ReLU(), nn.Identity()

    def forward(self, x):
        return self.flat(self.relu(x + self.b(self.relu(self.a(x)))))


def _pooled():
    blocks = [(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for i, o in ((1, 4), (4, 8))]
    return nn.Sequential(*blocks[0], *blocks[1], nn.Flatten())


def _right(backend, network, x, wanted):
    """Captum's DeepLift goes wrong in silence on such a network as it stands."""
    (maps,) = backend(network, (x,), range(K))
    torch.testing.assert_close(maps.flatten(2).sum(2), wanted, rtol=1e-3, atol=1e-4)


def test_deeplift_where_two_nonlinearities_touch():
    model, srae, x = _pooled(), SRAE(128, K, hidden=()), torch.randn(4, 1, 16, 16)
    network = network_of(model, "6", srae, x[:1])
    _right(FromCaptum(DeepLift), network, x, _deep(network, x))


def test_deeplift_on_a_reused_relu_and_on_a_functional_one():
    srae, x = SRAE(5, K, hidden=()), torch.randn(4, 5)
    network = network_of(Residual(), "flat", srae, x[:1])
    _right(FromCaptum(DeepLift), network, x, _deep(network, x))

    class Functional(Residual):
        def forward(self, x):
            return self.flat(F.relu(self.b(F.relu(self.a(x)))))

    network = network_of(Functional(), "flat", srae, x[:1])
    _right(FromCaptum(DeepLift), network, x, _deep(network, x))


def test_methods_leave_the_explanation_network_as_it_was():
    model, srae, x = made()
    before = [sorted(vars(m)) for m in srae.modules()]
    network = network_of(model, "3", srae, x[:1])
    for method in (LRP, DeepLift, GuidedBackprop):
        FromCaptum(method)(network, (x,), range(K))
        assert [sorted(vars(m)) for m in srae.modules()] == before, method.__name__


class Tokens(nn.Module):
    """A class token and two more before those of 3 x 4 cells, as (N, tokens, C); or cells with the channels last."""

    def __init__(self, form):
        super().__init__()
        self.form, self.patch, self.mix, self.head = form, nn.Conv2d(2, 6, 2, 2), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        cells = self.patch(x)
        if self.form == "swin":
            return self.head(self.mix(cells.permute(0, 2, 3, 1)).tanh().mean((1, 2)))
        tokens = torch.cat([torch.ones(len(x), 3, 6), cells.flatten(2).mT], 1)
        return self.head(self.mix(tokens).tanh().mean(1))


@pytest.mark.parametrize("form", ["vit", "swin"])
def test_grad_cam_of_tokens(form):
    model, srae, x = Tokens(form), SRAE(4, K, hidden=()), torch.randn(2, 2, 6, 8)
    network = network_of(model, "head", srae, x[:1])
    (given,) = FromCaptum(LayerGradCam, layer="mix", tokens=form)(network, (x,), range(K))
    cells = model.patch(x).permute(0, 2, 3, 1)
    a = model.mix(cells).detach().requires_grad_()
    extra = model.mix(torch.ones(2, 3, 6)).detach()
    mean = a.tanh().mean((1, 2)) if form == "swin" else torch.cat([extra, a.flatten(1, 2)], 1).tanh().mean(1)
    E = srae.encode(model.head(mean))
    for k in range(K):
        (grad,) = torch.autograd.grad(E[:, k].sum(), a, retain_graph=True)
        cam = (grad.mean((1, 2), keepdim=True) * a).sum(3)[:, None]  # Grad-CAM, section 3
        wanted = F.interpolate(cam, (6, 8), mode="bilinear").detach()
        torch.testing.assert_close(given[:, k], wanted, rtol=1e-4, atol=1e-6)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="with feature maps"):
        FromCaptum(LayerGradCam, layer="head")(network, (x,), range(K))


@pytest.mark.filterwarnings("ignore:probabilities sum to")
@pytest.mark.parametrize("form", ["vit", "swin", "sequence"])
def test_probabilities_of_tokens_as_images(form):
    """They are the layer's own ones, summed over channels, without the three tokens ahead of the cells."""
    model, srae, x = Tokens("swin" if form == "swin" else "vit"), SRAE(4, K, hidden=()), torch.randn(2, 2, 6, 8)
    network = network_of(model, "head", srae, x[:1])
    heatmap = ExcitationMaps("mix", tokens=form, contrastive=False)
    (given,) = heatmap(network, (x,), range(K), internal_batch_size=2)
    for k in range(K):
        own = LayerExcitationBP(network, model.mix, contrastive=False).attribute(x, target=k)
        wanted = {"swin": own, "vit": own[:, 3:].reshape(2, 3, 4, -1), "sequence": own}[form].sum(-1)
        if form != "sequence":
            wanted = F.interpolate(wanted[:, None], (6, 8), mode="bilinear")[:, 0]
        torch.testing.assert_close(given[:, k, 0], wanted)
    other = ExcitationMaps("mix")(network, (x,), range(K), tokens=form, contrastive=False)[0]
    torch.testing.assert_close(other, given)


class ChannelsLast(nn.Module):
    """As ConvNeXt and Swin: feature maps, and then the same with the channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.mix, self.head = (
            nn.Conv2d(2, 6, 2, 2),
            nn.Dropout2d(),
            nn.Linear(6, 9),
            nn.Linear(9, 4),
        )

    def forward(self, x):
        return self.head(self.mix(self.drop(self.conv(x)).permute(0, 2, 3, 1)).tanh().mean((1, 2)))


def test_the_layer_that_is_chosen_has_the_channels_first():
    """By the image's ratio. Where there is no image to tell by, the last one with four dimensions is taken."""
    model, x = ChannelsLast().eval(), torch.randn(2, 2, 6, 8)
    network = network_of(model, "head", SRAE(4, K, hidden=()), x[:1])
    assert network.spatial_layer_name == "conv"
    (given,) = FromCaptum(LayerGradCam)(network, (x,), range(K))
    torch.testing.assert_close(given, FromCaptum(LayerGradCam, layer="conv")(network, (x,), range(K))[0])


class Branches(nn.Module):
    """As an Inception block, which joins what its branches give, and a residual one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(7, 7, 1)

    def forward(self, x):
        joined = torch.cat([self.relu(self.a(x)), F.relu(self.b(x))], 1)
        mixed = self.mix(joined)
        mixed += joined
        return mixed


def test_the_layer_that_is_chosen_is_no_branch_of_a_block():
    model = nn.Sequential(nn.Sequential(Branches(), nn.Dropout2d()), nn.Flatten(), nn.Linear(7 * 48, 4)).eval()
    srae, x = SRAE(4, K, hidden=()), torch.randn(2, 2, 6, 8)
    network = network_of(model, "2", srae, x[:1])
    assert network.spatial_layer_name == "0.0"
    (given,) = FromCaptum(LayerGradCam)(network, (x,), range(K))
    a = model[0](x).detach().requires_grad_()
    E = srae.encode(model[2](a.flatten(1)))
    for k in range(K):
        (grad,) = torch.autograd.grad(E[:, k].sum(), a, retain_graph=True)
        torch.testing.assert_close(given[:, k], (grad.mean((2, 3), True) * a).sum(1, True).detach())
    # Where a block ends in a layer of its own, that is the one, as methods on modules want single operations.
    last = nn.Sequential(nn.Sequential(Branches(), nn.ReLU(inplace=True)), nn.Flatten(), nn.Linear(7 * 48, 4)).eval()
    assert network_of(last, "2", srae, x[:1]).spatial_layer_name == "0.1"


def test_layers_with_the_channels_last():
    """Grad-CAM wants to be told; other methods' attributions are summed over channels all the same."""
    model, srae, x = ChannelsLast().eval(), SRAE(4, K, hidden=()), torch.randn(2, 2, 6, 8)
    network = network_of(model, "head", srae, x[:1])
    with pytest.raises(ValueError, match=r"LayerGradCam needs .* feature maps .* this Linear has none; .* 'swin'"):
        FromCaptum(LayerGradCam, layer="mix")(network, (x,), range(K))
    (given,) = FromCaptum(captum.attr.LayerGradientXActivation, layer="mix")(network, (x,), range(K))
    a = model.mix(model.conv(x).permute(0, 2, 3, 1)).detach().requires_grad_()
    E = srae.encode(model.head(a.tanh().mean((1, 2))))
    for k in range(K):
        (grad,) = torch.autograd.grad(E[:, k].sum(), a, retain_graph=True)
        wanted = F.interpolate((a * grad).sum(3)[:, None], (6, 8), mode="bilinear").detach()
        torch.testing.assert_close(given[:, k], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", ["vit", "swin", "sequence"])
def test_tokens_of_no_layer(tokens):
    """The layer that would be chosen has feature maps, which "swin" would take for something else."""
    model, x = ChannelsLast().eval(), torch.randn(1, 2, 6, 8)
    network = network_of(model, "head", SRAE(4, K, hidden=()), x)
    for heatmap in (FromCaptum(LayerGradCam, tokens=tokens), ExcitationMaps(tokens=tokens)):
        with pytest.raises(ValueError, match=f"tokens='{tokens}' needs a layer; name it"):
            heatmap(network, (x,), range(K))


def test_grad_cam_of_sequences():
    model, srae = Embeds(), SRAE(3, K, hidden=(4,))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    network = network_of(model, "head", srae, ids[:1])
    (given,) = FromCaptum(LayerGradCam, layer="layer", tokens="sequence")(network, (ids,), range(K))
    a = model.layer(model.embedding(ids)).detach().requires_grad_()
    E = srae.encode(model.head(a.relu().mean(1)))
    for k in range(K):
        (grad,) = torch.autograd.grad(E[:, k].sum(), a, retain_graph=True)
        torch.testing.assert_close(given[:, k, 0], (grad.mean(1, keepdim=True) * a).sum(2).detach())
    with pytest.raises(ValueError, match=r"this Linear has none; if it gives tokens, .*tokens='vit'"):
        FromCaptum(LayerGradCam, layer="layer")(network, (ids,), range(K))


def test_tokens_that_lie_otherwise():
    with pytest.raises(ValueError, match="tokens is 'bert'; pass one of 'vit', 'swin', 'sequence'"):
        FromCaptum(LayerGradCam, tokens="bert")
    with pytest.raises(ValueError, match="tokens is 'bert'; pass one of 'vit', 'swin', 'sequence'"):
        ExcitationMaps("mix", tokens="bert")
    model, x = Tokens("swin"), torch.randn(1, 2, 6, 8)
    network = network_of(model, "head", SRAE(4, K, hidden=()), x)
    with pytest.raises(ValueError, match=r"tokens='vit' needs tokens of 3 dimensions, .* is \(3, 3, 4, 5\)"):
        FromCaptum(LayerGradCam, layer="mix", tokens="vit")(network, (x,), range(K))
    assert not any(m._forward_hooks for m in model.modules())


def test_layer_lrp_wants_a_layer_that_it_has_a_rule_for():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(6), nn.Conv2d(4, 2, 1)).eval()
    x, srae = torch.randn(2, 1, 8, 8), SRAE(2, K, hidden=())
    network = network_of(model, "3", srae, x[:1])
    with pytest.raises(
        ValueError,
        match=r"LayerLRP cannot stop at layer '1', a ReLU.* name the layer before it",
    ):
        FromCaptum(LayerLRP, layer="1")(network, (x,), range(K))
    (given,) = FromCaptum(LayerLRP, layer="2")(network, (x,), range(K))
    for k in range(K):  # enlarged, one cell keeps its value everywhere
        own = LayerLRP(network, model[2]).attribute(x.clone().requires_grad_(), target=k).detach().sum(1)
        torch.testing.assert_close(given[:, k, 0], own.expand(2, 8, 8))


@pytest.mark.filterwarnings("ignore:probabilities sum to")
def test_maps_of_a_layer_have_the_size_of_the_images_also_beside_a_table():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(8, 4)

        def forward(self, table, image):
            return self.fc(torch.cat([table, self.conv(image).relu().mean((2, 3))], 1))

    class Alone(nn.Module):
        """The same for images alone."""

        def __init__(self, model, table):
            super().__init__()
            self.model, self.table = model, table

        def forward(self, image):
            return self.model(self.table[:1].expand(len(image), -1), image)

    model, srae = Both(), SRAE(4, K, hidden=())
    inputs = torch.randn(1, 5).expand(2, 5), torch.randn(2, 1, 9, 9)
    network = network_of(model, "fc", srae, *(x[:1] for x in inputs))
    for heatmap in (FromCaptum(LayerGradCam, layer=model.conv), ExcitationMaps(model.conv, contrastive=False)):
        (given,) = heatmap(network, inputs, range(K))
        other = heatmap(network_of(Alone(model, inputs[0]), "model.fc", srae, inputs[1][:1]), inputs[1:], range(K))
        torch.testing.assert_close(given, other[0])


def test_masks_may_be_expanded():
    """Captum's ShapleyValueSampling fails on them: view size is not compatible."""
    model, x, srae = nn.Sequential(nn.Conv2d(2, 3, 4), nn.Flatten()), torch.randn(2, 2, 4, 4), SRAE(3, K, hidden=())
    network = network_of(model, "1", srae, x[:1])
    mask = (torch.arange(4) // 2).expand(1, 2, 4, 4)
    (given,) = FromCaptum(captum.attr.ShapleyValueSampling, feature_mask=mask, n_samples=2)(network, (x,), range(K))
    with torch.no_grad():
        for half in range(2):
            only = x * (mask == half)
            change = network(only) - network(torch.zeros_like(x))  # a linear network: each half adds its own
            wanted = change[:, :, None, None, None].expand(-1, -1, 2, 4, 2)
            torch.testing.assert_close(given[..., 2 * half : 2 * half + 2], wanted, rtol=1e-4, atol=1e-5)


def test_unknown_settings_of_excitation_maps_are_told():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.rand(2, 4)
    network = network_of(model, "1", SRAE(3, K, hidden=()), x[:1])
    with pytest.raises(TypeError, match="ExcitationMaps has no setting 'n_steps'; it takes: add, batch_norm, "):
        ExcitationMaps()(network, (x,), range(K), n_steps=5)


@pytest.mark.parametrize(
    ("method", "needed"),
    [(Occlusion, {"sliding_window_shapes": (2,)}), (GradientShap, {"baselines": torch.zeros(3, 6)})],
)
def test_settings_without_a_default_are_asked_for(method, needed):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    network, x = ExplanationNetwork(model, "1", SRAE(5, n_features=2, hidden=())), torch.randn(3, 6)
    (name,) = needed
    told = rf"{method.__name__} needs {name}, .* as in FromCaptum\({method.__name__}, {name}=...\)"
    with pytest.raises(TypeError, match=told):
        FromCaptum(method)(network, (x,), [0, 1])
    torch.manual_seed(0)
    (with_the_method,) = FromCaptum(method, **needed)(network, (x,), [0, 1])
    torch.manual_seed(0)
    (with_the_call,) = FromCaptum(method)(network, (x,), [0, 1], **needed)
    assert torch.equal(with_the_method, with_the_call) and bool(with_the_call.any())


class TwoBranches(nn.Module):
    """Two images of different size, each with a branch of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 4, 3, 2), nn.Conv2d(1, 4, 3, 2), nn.Linear(4, 3)

    def forward(self, x, y):
        return self.head(self.a(x).tanh().mean((2, 3)) + self.b(y).tanh().amax((2, 3)))


def test_a_layer_of_another_branch_is_named():
    torch.manual_seed(0)
    model, x, y = TwoBranches().eval(), torch.randn(40, 1, 9, 9), torch.randn(40, 1, 13, 11)
    xnn = XNNAttribution(model, "b", 2)
    xnn.fit((x, y), 0, positives=torch.ones(40, dtype=torch.bool), progress=False)
    with pytest.raises(
        ValueError, match="layer 'a', where the maps would be drawn, does not lead to the explained layer"
    ):
        xnn.attribute((x[:2], y[:2]), 0)
    assert xnn.attribute((x[:2], y[:2]), 0, layer="b").abs().sum() > 0
