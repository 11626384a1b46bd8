"""Similarities by definition; redrawn weights that come back bit for bit; maps of explainers that must change."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.errors import LayerNotFoundError
from captum_xnn.metrics import randomised, similarity
from captum_xnn.metrics._randomisation import top_down


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- similarity


def test_rank_correlation_beside_scipy():
    a = torch.randint(0, 5, (2, 3, 6, 7), generator=torch.Generator().manual_seed(0)).double()  # with ties
    b = a + drawn(2, 3, 6, 7).round()
    found = similarity(a, b).spearman
    for n in range(2):
        for k in range(3):
            assert float(found[n, k]) == pytest.approx(spearmanr(a[n, k].flatten(), b[n, k].flatten())[0], rel=1e-9)


def ssim_by_loops(a, b, window):
    """The mean over all windows inside, with sample variances, of maps divided by their largest absolute value."""
    a, b = a / a.abs().max(), b / b.abs().max()
    L = max(a.max(), b.max()) - min(a.min(), b.min())
    c1, c2 = (0.01 * L) ** 2, (0.03 * L) ** 2
    values = []
    for i in range(a.shape[0] - window + 1):
        for j in range(a.shape[1] - window + 1):
            x, y = (m[i : i + window, j : j + window].flatten() for m in (a, b))
            covariance = ((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1)
            up = (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
            values.append(up / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2)))
    return float(torch.stack(values).mean())


@pytest.mark.parametrize(
    "size, window", [((9, 10), 7), ((7, 12), 7), ((6, 8), 5), ((5, 5), 5), ((4, 9), 3), ((3, 3), 3)]
)
def test_structural_similarity_by_loops(size, window):
    a, b = drawn(1, 2, *size), drawn(1, 2, *size, seed=1)
    a[:, 1], b[:, 1] = a[:, 1].abs(), (a[:, 1] + b[:, 1]).abs()
    found = similarity(a, b).ssim
    for k in range(2):
        assert float(found[0, k]) == pytest.approx(ssim_by_loops(a[0, k], b[0, k], window), abs=1e-9)


def test_similarity_of_changed_and_unchanged_maps():
    a = drawn(2, 2, 8, 8)
    same, turned, other = similarity(a, a * 1e-6), similarity(a, -a), similarity(a, drawn(2, 2, 8, 8, seed=1))
    assert torch.allclose(same.spearman, torch.ones(2, 2).double()) and torch.allclose(same.ssim, same.spearman)
    assert torch.allclose(turned.spearman, -torch.ones(2, 2).double()) and (turned.ssim < 0.95).all()
    assert (other.spearman.abs() < 0.5).all() and (other.ssim.abs() < 0.5).all()


def test_similarity_of_dead_maps():
    dead, alive = torch.zeros(1, 1, 4, 4), torch.rand(1, 1, 4, 4)
    assert [float(x) for x in similarity(dead, dead)] == [1, 1]  # nothing changed
    assert similarity(dead, dead + 3).spearman == 1
    for pair in ((dead, alive), (alive, dead)):
        assert similarity(*pair).spearman == 0 and similarity(*pair).ssim < 0.2
    assert similarity(dead[:0], dead[:0]).ssim.shape == (0, 1)
    assert similarity(alive.bfloat16().requires_grad_(), alive.bfloat16()).spearman == pytest.approx(1)


def test_similarity_errors():
    with pytest.raises(ValueError, match="at least 3 x 3"):
        similarity(torch.zeros(1, 1, 2, 5), torch.zeros(1, 1, 2, 5))
    with pytest.raises(ValueError, match="of one shape"):
        similarity(torch.zeros(1, 1, 4, 5), torch.zeros(1, 1, 5, 4))
    with pytest.raises(ValueError, match=r"maps.sum\(2\)"):
        similarity(torch.zeros(1, 1, 1, 4, 5), torch.zeros(1, 1, 1, 4, 5))
    with pytest.raises(ValueError, match="overflowed"):
        similarity(torch.zeros(1, 1, 3, 3), torch.full((1, 1, 3, 3), torch.nan))


# --- randomised


class Own(nn.Module):
    """Parameters that no reset_parameters covers, beside a layer with one, and a replaced parameter at every reset."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(3 + 2 * torch.randn(50, 40))
        self.inner = nn.Linear(40, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = Replacing()

    def forward(self, x):
        return self.last(self.norm(self.inner(x @ self.table)))


class Replacing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.register_parameter("none", None)
        self.reset_parameters()

    def reset_parameters(self):
        self.weight = nn.Parameter(torch.randn(4, 2))
        self.count = torch.ones(3)

    def forward(self, x):
        return x @ self.weight


def made():
    model = Own()
    model.last.count = torch.full((3,), torch.nan)
    model.train()
    model(torch.randn(20, 50)).sum().backward()  # running statistics and gradients
    return model


def taken(model):
    """Objects, bits, gradients and modes: all that has to come back."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(t), t.detach().numpy().tobytes(), t.requires_grad) for name, t in tensors],
        [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state().numpy().tobytes(),
    )


def test_everything_comes_back():
    model = made()
    before = taken(model)
    with randomised(model, seed=0) as same:
        assert same is model
        inside = taken(model)
        assert inside[3] == before[3] and inside[2] == before[2]
        changed = {name for (name, _, now, _), (_, _, was, _) in zip(inside[0], before[0], strict=True) if now != was}
        assert changed >= {"table", "inner.weight", "inner.bias", "last.weight", "norm.running_mean"}
        model(torch.randn(20, 50, generator=torch.Generator().manual_seed(1)))  # also moves the running statistics
    assert taken(model) == before


def test_everything_comes_back_after_an_exception():
    model = made()
    before = taken(model)
    with pytest.raises(RuntimeError, match="inside"), randomised(model, seed=0):
        raise RuntimeError("inside")
    assert taken(model) == before
    model.last.reset_parameters = partial(fail, model.last)
    with pytest.raises(RuntimeError, match="while drawing"), randomised(model, seed=0):
        pass  # pragma: no cover
    assert taken(model) == before
    with pytest.raises(LayerNotFoundError, match="near names"), randomised(model, seed=0, layers=["inter"]):
        pass  # pragma: no cover
    assert taken(model) == before


def fail(layer):
    layer.weight.data.zero_()
    raise RuntimeError("while drawing")


def test_parameters_without_a_reset_keep_mean_and_deviation():
    model = made()
    table = model.table.detach().clone()
    with randomised(model, seed=0):
        redrawn = model.table.detach().clone()
    assert float(redrawn.mean()) == pytest.approx(float(table.mean()), abs=0.2)
    assert float(redrawn.std()) == pytest.approx(float(table.std()), rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([redrawn.flatten(), table.flatten()]))[0, 1])) < 0.1


def test_seeds_and_the_global_generator():
    model = made()

    def drawn_with(seed):
        with randomised(model, seed=seed):
            return [p.detach().clone() for p in model.parameters()]

    one = drawn_with(1)
    torch.manual_seed(99)
    again, other = drawn_with(1), drawn_with(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    twins = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with randomised(twins, seed=0):
        assert not torch.equal(twins[0].weight, twins[1].weight)


def test_layers_are_drawn_alike_alone_and_together():
    model = made()
    with randomised(model, seed=3):
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    for layers in (["inner"], [model.inner], ["last", "inner"]):
        with randomised(model, seed=3, layers=layers):
            for name, p in model.named_parameters():
                redrawn = name.startswith("inner") or (len(layers) == 2 and name.startswith("last"))
                assert torch.equal(p, (whole if redrawn else plain)[name])


def test_blocks_are_drawn_with_all_inside():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    before = [p.detach().clone() for p in model.parameters()]
    with randomised(model, seed=0, layers=["0"]):
        assert [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)] == [False] * 4 + [True] * 2


def test_cascade():
    assert top_down(made()) == [
        ("last",),
        ("last", "norm"),
        ("last", "norm", "inner"),
        ("last", "norm", "inner", ""),  # its own table last, when all else is drawn
    ]
    assert top_down(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Tanh()))) == [("0.0",)]
    model = made()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(3, 50)
    model.eval()
    seen = [model(x).detach()]
    for layers in top_down(model):
        with randomised(model, seed=0, layers=layers):
            seen.append(model(x).detach())
            for name, p in model.named_parameters():
                owner = name.rpartition(".")[0]
                assert owner in layers or torch.equal(p, plain[name])
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    assert torch.equal(model(x), seen[0])
    with pytest.raises(ValueError, match="ReLU without"):
        top_down(nn.ReLU())


def test_tied_and_parametrised_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    before = taken(model)
    with randomised(model, seed=0):
        assert model[2].weight is model[0].weight
        assert taken(model)[0] != before[0]
    assert taken(model) == before


# --- of a whole explanation


def test_maps_depend_on_the_weights_of_model_and_explainer():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 64, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    images = drawn(60, 1, 8, 8).float()
    xnn = XNNAttribution(model, "6", 2, autoencoder=partial(SRAE, hidden=(8,)), recipe=Recipe(steps=30))
    xnn.fit(images, target=1, positives=torch.ones(60, dtype=torch.bool), progress=False)

    def maps():
        return xnn.attribute(images[:4], target=1).sum(2)

    before = maps()
    for module in (model, xnn.explainer(1).form.encoder):
        with randomised(module, seed=0):
            changed = similarity(before, maps())
        assert float(changed.spearman.mean()) < 0.9 and float(changed.ssim.mean()) < 0.9
        assert torch.equal(maps(), before)
    with randomised(model, seed=0, layers=["7"]):  # above the explained layer, where no map can depend on it
        assert torch.equal(maps(), before)
