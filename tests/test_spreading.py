"""Maps of layers before strided convolutions show no lattice."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_xnn import LayerExcitationBP, OneHeatmap
from captum_xnn.excitation_bp._propagation import run, signals
from captum_xnn.excitation_bp._settings import Settings
from captum_xnn.excitation_bp._stopping import stopping_layer
from captum_xnn.heatmaps import ExcitationMaps
from captum_xnn.heatmaps._spreading import spread

pytestmark = pytest.mark.filterwarnings("ignore:probabilities sum to")


def by_hand(row, stride):
    """One dimension, cell by cell."""
    n, made = len(row), [0.0] * len(row)
    for j, mass in enumerate(row):
        near = {i: stride - abs(i - j) for i in range(n) if abs(i - j) < stride}
        for i, part in near.items():
            made[i] += mass * part / sum(near.values())
    return made


@pytest.mark.parametrize("strides", [(2, 2), (1, 2), (3, 1), (4, 2), (1, 1)])
def test_spreading_is_cell_by_cell_and_keeps_the_mass(strides):
    maps = torch.rand(2, 3, 1, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([by_hand(row, strides[1]) for row in maps.flatten(0, 3).tolist()], dtype=torch.float64)
    columns = rows.reshape(maps.shape).mT.flatten(0, 3)
    wanted = torch.tensor([by_hand(row, strides[0]) for row in columns.tolist()], dtype=torch.float64)
    given = spread(maps, strides)
    torch.testing.assert_close(given, wanted.reshape(2, 3, 1, 10, 7).mT)
    torch.testing.assert_close(given.sum((3, 4)), maps.sum((3, 4)))


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_a_lattice_is_interpolated(stride):
    lattice = torch.zeros(8 * stride + 1)
    lattice[::stride] = torch.arange(9.0)
    inside = slice(stride, -stride)
    line = torch.arange(8 * stride + 1) / stride / stride
    torch.testing.assert_close(spread(lattice, (stride,))[inside], line[inside])


CONVOLUTIONS = {
    "pointwise": nn.Conv2d(2, 2, 1, 2),
    "three by three": nn.Conv2d(2, 2, 3, 2, 1),
    "patches": nn.Conv2d(2, 2, 2, 2),
    "gaps": nn.Conv2d(2, 2, 2, 3),
    "dilated onto the same": nn.Conv2d(2, 2, 3, 2, 2, dilation=2),
    "dilated onto others": nn.Conv2d(2, 2, 3, 2, 3, dilation=3),
    "one dimension": nn.Conv2d(2, 2, (1, 3), (2, 1), (0, 1)),
    "grouped": nn.Conv2d(2, 2, 1, 2, groups=2),
    "transposed": nn.ConvTranspose2d(2, 2, 1, 2),
    "volume": nn.Conv3d(2, 2, (1, 2, 2), 2),
    "sequence": nn.Conv1d(2, 2, 1, 3),
}


AFTER = ("nothing", "batch norm", "negative batch norm", "a map of signs")


@pytest.mark.parametrize(
    ("name", "after"),
    [(name, after) for name, conv in CONVOLUTIONS.items() for after in AFTER[: 4 if conv.weight.dim() == 4 else 3]],
)
def test_skipped_cells_are_those_without_a_gradient(name, after):
    conv = CONVOLUTIONS[name]
    dims = conv.weight.dim() - 2
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](2).eval()
    if after == "negative batch norm":
        norm.weight.data = torch.tensor([-1.0, 2.0])
    x = torch.rand(1, 2, *[12] * dims)

    def f(x):
        y = conv(x)
        if after == "a map of signs":
            return (y * (torch.arange(y.shape[-1]) % 2 * 2 - 1)).flatten(1)
        return (y if after == "nothing" else norm(y).relu()).flatten(1)

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(conv(leaf).abs().sum(), leaf)
    read = gradient[0].abs().sum(0) > 0
    wanted = []
    for dim in range(dims):
        along = read.movedim(dim, 0).reshape(12, -1).any(1)
        wanted.append(1 if along[: along.nonzero().max()].all() else conv.stride[dim])
    found = run(f, (x,), (), signals(Settings())).skipped
    assert found == ({} if set(wanted) == {1} else {(12,) * dims: tuple(wanted)})


class Shortcut(nn.Module):
    """A residual block of stride 2 behind 16 x 16 cells, as in a ResNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU())
        self.main = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.shortcut = nn.Conv2d(8, 8, 1, 2)
        self.shortcut.weight.data *= 4
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.main(x) + self.shortcut(x)).relu().mean((2, 3)))


def quarters(maps):
    """The share of each of even and odd rows and columns of cells in the mass of maps (..., h, w)."""
    parts = torch.stack([maps[..., i::2, j::2].sum((-2, -1)) for i in (0, 1) for j in (0, 1)], -1)
    return parts.flatten(0, -2).sum(0) / parts.sum()


@pytest.mark.parametrize("contrastive", [True, False])
def test_maps_before_a_shortcut_are_spread(contrastive):
    torch.manual_seed(0)
    model, x = Shortcut().eval().double(), torch.rand(4, 2, 32, 32, dtype=torch.float64)
    cells = LayerExcitationBP(model, "stem", contrastive=contrastive).attribute(x, 1).sum(1, keepdim=True).clamp(min=0)
    given = OneHeatmap(model, ExcitationMaps(contrastive=contrastive)).attribute(x, 1)
    wanted = F.interpolate(spread(cells, (2, 2)), (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(given[:, 0], wanted)
    assert quarters(cells)[0] > 0.35
    assert (quarters(spread(cells, (2, 2))) - 0.25).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("resnet18", "layer3"),
        ("resnet50", "layer3"),
        ("densenet121", "features.transition3.relu"),
        ("regnet_y_400mf", "trunk_output.block3"),
        ("regnet_x_800mf", "trunk_output.block3"),
        ("convnext_tiny", "features.5"),
    ],
)
def test_each_quarter_of_the_cells_has_a_quarter_of_the_mass(torchvision, name, end, seed, contrastive):
    """At the layer that is chosen, and at the end of the stage, where unspread maps of ResNets have .4 to .9."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name, weights=None)
    smooth = F.interpolate(torch.randn(12, 3, 14, 14), (224, 224), mode="bilinear")
    with torch.no_grad():
        model.train()(smooth[4:])  # statistics of batch norms
    x = smooth[:4]
    model.eval()
    for layer in (None, end):
        pixels = OneHeatmap(model, ExcitationMaps(layer, contrastive=contrastive)).attribute(x, 3)[:, 0]
        found = quarters(cells_of(pixels))
        assert (found - 0.25).abs().max() < 0.05 * 15 / 16, f"{layer or stopping_layer(model, model, x[:1])}: {found}"
    raw = LayerExcitationBP(model, end, contrastive=contrastive).attribute(x, 3).sum(1).clamp(min=0)
    assert (float(quarters(raw).max()) > 0.35) == name.startswith(("resnet", "regnet"))


def cells_of(pixels):
    """The values at the centres of 14 x 14 cells, between four pixels: 15/16 of a lattice is left in a dimension."""
    rows = (pixels[..., 7::16, :] + pixels[..., 8::16, :]) / 2
    return (rows[..., 7::16] + rows[..., 8::16]) / 2
