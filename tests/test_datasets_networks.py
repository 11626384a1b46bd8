"""The exact network knows every part, look and class, and where they are; the trained one learns from labels."""

import pytest
import torch
from torch import nn

from captum_xnn.datasets import Figures
from captum_xnn.datasets._figure_parts import LOOKS, PARTS
from captum_xnn.datasets._figures import REASONS, reasons_table
from captum_xnn.datasets._networks import exact_network, figures_cnn, folded
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.heatmaps._network import ExplanationNetwork, ModelOutputs
from captum_xnn.layers._lookup import find_layer
from captum_xnn.layers._trace import trace


@pytest.fixture(scope="module")
def figures():
    return Figures.draw(120, seed=4)


def test_layer_of_known_meaning(figures):
    model = figures.exact_network()
    upto = nn.Sequential(*list(model)[: [name for name, _ in model.named_children()].index("Z") + 1])
    Z = upto(figures.images)
    for looks, found in zip(figures.looks.tolist(), Z.tolist(), strict=True):
        assert found == [float(looks[p] == look) for p in range(len(PARTS)) for look in range(len(LOOKS))]
    nothing = Figures.draw(60, seed=4, hidden=1, members=0, near_misses=0)
    assert (upto(nothing.images) == 0).all()  # clutter is no part


def test_outputs_by_loops(figures):
    y_hat = figures.exact_network()(figures.images)
    for looks, outputs in zip(figures.looks.tolist(), y_hat.tolist(), strict=True):
        shown = {part: LOOKS[look] for part, look in zip(PARTS, looks, strict=True) if look >= 0}
        counted = [sum(shown.get(p) == look for p, look in asked.items()) - len(asked) + 0.5 for asked in REASONS]
        assert outputs == [*counted, 0.0]
    assert torch.equal(y_hat.argmax(1), figures.labels)


def test_exact_network_of_other_classes():
    reasons = [{"tail": "plain blue"}, {"tail": "striped orange", "crest": "plain blue"}]
    figures = Figures.draw(60, reasons=reasons)
    model = exact_network(reasons_table(reasons))
    assert torch.equal(model(figures.images).argmax(1), figures.labels)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:probabilities sum to")  # of looks that are not shown
@pytest.mark.parametrize("contrastive", [False, True])
def test_maps_are_the_parts_masks(figures, contrastive):
    """Excitation backprop from a neuron of Z gives each pixel of its part the same, and nothing to others."""
    model, images = figures.exact_network(), figures.images[:12]
    layer = find_layer(model, "Z")[1]
    network = ExplanationNetwork(model, "Z", ModelOutputs(), trace=trace(model, layer, (images[:1],)))
    (maps,) = ExcitationMaps(contrastive=contrastive)(network, (images,), range(24))
    for i, p in (figures.looks[:12] >= 0).nonzero().tolist():
        mask = figures.masks[i, p].float()
        own = maps[i, 4 * p + int(figures.looks[i, p]), 0]
        assert torch.allclose(own / own.sum(), mask / mask.sum(), atol=1e-6)


def test_folding_keeps_the_function():
    generator = torch.Generator().manual_seed(0)
    cnn = figures_cnn(7, generator)
    images = torch.rand(16, 3, 48, 48, generator=generator)
    for module in cnn:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2, generator=generator)
            nn.init.uniform_(module.bias, -1, 1, generator=generator)
    cnn(images)  # statistics of some data
    wanted = cnn.eval()(images)
    plain = folded(cnn)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain)
    assert torch.allclose(plain(images), wanted, atol=1e-5)
    assert wanted.std(0).min() > 1e-4


def test_training_is_seeded_and_learns():
    reasons = [{"belly": "plain orange"}, {"belly": "plain blue"}]
    figures = Figures.draw(513, seed=1, reasons=reasons)  # one more than batches hold
    state = torch.get_rng_state()
    cnn = figures.trained_network(epochs=4, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and not cnn.training
    torch.manual_seed(7)  # of no account
    again, other = figures.trained_network(epochs=4, seed=1), figures.trained_network(epochs=1, seed=2)
    assert torch.equal(again.fc2.weight, cnn.fc2.weight) and not torch.equal(other.fc2.weight, cnn.fc2.weight)
    test = Figures.draw(200, seed=2, reasons=reasons)
    with torch.no_grad():
        right = (cnn(test.images).argmax(1) == test.labels).double().mean()
    assert right > 0.9


@pytest.mark.slow
def test_training_on_all_classes():
    test = Figures.draw(2000, seed=2)
    cnn = Figures.draw(6000, seed=1).trained_network()
    with torch.no_grad():
        assert (cnn(test.images).argmax(1) == test.labels).double().mean() >= 0.97
