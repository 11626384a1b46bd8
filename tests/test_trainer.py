"""Explainers that are learned together, stopped early, cut off and resumed, or learned by several processes."""

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch import nn

from captum_xnn import XNNAttribution
from captum_xnn._distributed import Ranks
from captum_xnn.errors import CheckpointError
from captum_xnn.metrics import matched_features
from captum_xnn.models import SRAE, ConvSRAE
from captum_xnn.models._base import Objective, encode_all
from captum_xnn.models._scaling import scaling
from captum_xnn.models.baselines import CAE, NN, SAE, RandomDecoder, RandomEncoder
from captum_xnn.training import Checkpoint, JSONLines, Recipe
from captum_xnn.training._anchors import anchors
from captum_xnn.training._early_stopping import EarlyStopping
from captum_xnn.training._fitting import fit, fit_together
from captum_xnn.training._problem import Problem
from captum_xnn.training._sampler import Sampler
from captum_xnn.training._trainer import (
    Trainer,
    _anchor_weight,
    _distance_from_anchors,
    _rate,
    _signature,
    _together,
    descend,
)

T, M, D, K = 3, 400, 12, 3
SHORT = Recipe(steps=60, batch_size=32)
FORMS = {
    "SRAE": partial(SRAE, hidden=(16,)),
    "NN": partial(NN, hidden=(16,)),
    "SAE": partial(SAE, hidden=(16,)),
    "CAE": partial(CAE, hidden=(16,)),
    "RandomDecoder": partial(RandomDecoder, hidden=(16,)),
    "RandomEncoder": partial(RandomEncoder, hidden=(16,)),
}


def problem(dtype=torch.float64, shape=(D,)):
    """Activations, T outputs with positives of different frequency."""
    g = torch.Generator().manual_seed(0)
    Z = torch.randn(M, *shape, generator=g, dtype=torch.float64).relu()
    flat = Z.flatten(1)
    ys = [(flat[:, 3 * t : 3 * t + 3] @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))[:, None] for t in range(T)]
    marks = [y[:, 0] > y[:, 0].quantile(q) for y, q in zip(ys, (0.9, 0.97, 0.5), strict=True)]
    return Z.to(dtype), [y.to(dtype) for y in ys], marks


def together(make, recipe=SHORT, **settings):
    Z, ys, marks = problem()
    xnns = [make(D, K).double() for _ in ys]
    histories = fit_together(xnns, Z, ys, positives=marks, recipe=recipe, **settings)
    return xnns, histories


def same(a, b, tolerance=0.0):
    for one, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_each_is_what_it_would_be_alone(form):
    xnns, histories = together(FORMS[form])
    Z, ys, marks = problem()
    for xnn, history, y, marked in zip(xnns, histories, ys, marks, strict=True):
        alone = FORMS[form](D, K).double()
        recorded = fit(alone, Z, y, positives=marked, recipe=SHORT)
        same(xnn, alone, 1e-7)
        assert [r.step for r in history] == [r.step for r in recorded]
        for term in ("faithfulness", "sparse_reconstruction", "pull_away"):
            assert [getattr(r, term) for r in history] == pytest.approx([getattr(r, term) for r in recorded], rel=1e-6)


def test_convolutional_forms_too():
    Z, ys, marks = problem(shape=(D, 3, 3))
    make = partial(ConvSRAE, (D, 3, 3), K, hidden=(8,))
    xnns = [make().double() for _ in ys]
    fit_together(xnns, Z, ys, positives=marks, recipe=SHORT)
    for xnn, y, marked in zip(xnns, ys, marks, strict=True):
        alone = make().double()
        fit(alone, Z, y, positives=marked, recipe=SHORT)
        same(xnn, alone, 1e-7)


def test_stacks_of_any_size_give_the_same(monkeypatch):
    whole, _ = together(FORMS["SRAE"])
    monkeypatch.setattr("captum_xnn.training._trainer._CPU_STACK", 1)
    assert _together(whole[0], 3) == 1
    for a, b in zip(whole, together(FORMS["SRAE"])[0], strict=True):
        same(a, b, 1e-7)


def test_stacks_have_nearly_even_sizes(monkeypatch):
    xnn = SRAE(100, 2, hidden=())  # 800 bytes in its largest weight
    monkeypatch.setattr("captum_xnn.training._trainer._CPU_STACK", 3000)
    assert [_together(xnn, n) for n in (1, 3, 4, 7)] == [1, 3, 2, 3]


def test_networks_that_differ_are_refused():
    Z, ys, _ = problem()
    with pytest.raises(ValueError, match="networks differ in form or size; fit them one after another"):
        fit_together([SRAE(D, 2).double(), SRAE(D, 3).double()], Z, ys[:2])


# --- mixed precision


@pytest.mark.parametrize("count", [1, T])  # as they are, and stacked
def test_mixed_precision_gives_nearly_the_same(count):
    make = partial(SRAE, D, K, hidden=(16,))
    Z, ys, marks = problem(torch.float32)
    found = []
    for mixed in (False, True):
        seen = []
        xnns = [make() for _ in range(count)]
        xnns[0].encoder[0].register_forward_hook(lambda *args, seen=seen: seen.append(args[2].dtype))
        recipe = Recipe(steps=300, mixed_precision=mixed)
        histories = fit_together(xnns, Z, ys[:count], positives=marks[:count], recipe=recipe)
        assert (torch.bfloat16 in seen) == mixed
        assert {t.dtype for xnn in xnns for t in xnn.state_dict().values()} == {torch.float32}
        found.append((xnns, histories))
    for a, b, y in zip(found[0][0], found[1][0], ys, strict=False):
        assert matched_features(encode_all(a, Z), encode_all(b, Z)).mean > 0.99
        errors = [float((xnn.head(encode_all(xnn, Z)) - y).abs().mean().detach()) for xnn in (a, b)]
        assert errors[1] < 1.1 * errors[0] + 0.01 * float(y.std())
    assert found[0][1][0][-1] != found[1][1][0][-1]  # another way there


# --- the schedule


def test_the_learning_rate_by_hand():
    # Up in a twentieth of the steps, held as long, then half a cosine, which never quite comes to nothing.
    for done, rate in ((0, 1e-3), (0.025, 0.5), (0.05, 1), (0.1, 1), (0.4, 0.75), (0.55, 0.5), (1, 1e-3)):
        assert _rate(done) == pytest.approx(rate)


def test_the_anchors_hold_and_let_go_by_hand():
    for done, hold in ((0, 1), (0.3, 1), (0.325, 0.75), (0.35, 0.5), (0.4, 0), (0.9, 0)):
        assert _anchor_weight(done, 0.3) == pytest.approx(hold)
    E, anchored = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]), torch.tensor([[[0.0, 4.0], [3.0, math.nan]]])
    assert _distance_from_anchors(E, anchored).tolist() == [((1 + 4) + (0 + 0)) / 2]


class Nothing:
    """A loss without gradients, under which weights only decay."""

    def __call__(self, made, Z, y_hat, *, weight=None):
        zero = 0 * (made.y_bar.sum((1, 2)) + made.Z_tilde.sum((1, 2)))
        return Objective(zero, zero, zero, zero)


def test_weights_of_encoder_and_decoder_decay_and_no_others(monkeypatch):
    monkeypatch.setattr(SRAE, "fold", lambda *_: None)
    Z, ys, _ = problem()
    recipe = Recipe(steps=20, batch_size=32, learning_rate=0.01, weight_decay=2.0)
    xnn, generator = SRAE(D, K, hidden=(5,)).double(), torch.Generator().manual_seed(0)
    xnn.reset(generator)
    before = {name: p.detach().clone() for name, p in xnn.named_parameters()}
    descend([xnn], [Problem(Z, ys[0], Sampler(None, M, recipe, generator), recipe)], Nothing)
    left = math.prod(1 - 0.01 * 2.0 * _rate(step / 20) for step in range(20))
    assert left < 0.9
    for name, p in xnn.named_parameters():
        decays = name.endswith("weight") and not name.startswith("head")
        torch.testing.assert_close(p.detach(), before[name] * (left if decays else 1), rtol=1e-12, atol=0)


def test_heads_begin_as_those_of_the_anchors(monkeypatch):
    begun = []
    monkeypatch.setattr(
        Trainer, "_resume", lambda trainer, bar: begun.append(trainer.stack.weights["head.weight"].clone())
    )
    Z, ys, _ = problem()
    y = torch.cat(ys[:2], 1)
    fit(SRAE(D, K, n_outputs=2, hidden=()).double(), Z, y, recipe=Recipe(steps=1, batch_size=32))
    v = anchors((Z - Z.mean(0)) / Z.var(0).mean().sqrt(), (y - y.mean(0)) / y.std(0), K, balance=Recipe().balance).v
    assert v.std() > 0.1  # not the even heads that weights are drawn with
    torch.testing.assert_close(begun[0][0], v, rtol=1e-6, atol=1e-6)


# --- early stopping


def test_what_is_watched_is_the_objective_of_held_out_examples(monkeypatch):
    """Eq. 5 written again, with every row weighted by the part of the training set that it stands for."""
    seen = []
    check = Trainer._check

    def spy(trainer, early):
        early.best.fill_(math.inf)
        check(trainer, early)
        seen.append(({name: w.detach().clone() for name, w in trainer.stack.weights.items()}, trainer))

    monkeypatch.setattr(Trainer, "_check", spy)
    together(FORMS["SRAE"], Recipe(steps=5, batch_size=32, patience=1.0, beta=0.5, eta=2.0, q=3.0))
    weights, trainer = seen[-1]
    for t, sampler in enumerate(trainer.samplers):
        rows = trainer.early_stopping.rows[t]
        assert set(rows.tolist()) <= set(sampler.held_out.tolist())
        xnn = FORMS["SRAE"](D, K).double()
        xnn.load_state_dict({name: w[t] for name, w in weights.items()})
        with torch.no_grad():
            E, y_bar, Z_tilde = xnn(trainer.Z[rows])
        faithful = (y_bar - trainer.y[t, rows]).square().mean()
        sparse = (1 + 3.0 * (Z_tilde - trainer.Z[rows]).square().mean(0)).log().mean()
        w = 1 / sampler.row_weight[rows].double()
        C = torch.cov(E.T, aweights=w)
        square = (C / C.diag().outer(C.diag()).sqrt()).square()
        apart = (square.sum() - K) / (K * (K - 1))
        expected = faithful + 0.5 * sparse + 2.0 * apart
        assert float(trainer.early_stopping.best[t]) == pytest.approx(float(expected), rel=1e-6)


def test_an_explainer_stops_when_it_no_longer_becomes_better(monkeypatch):
    # The first output has nothing to do with Z: on held-out examples it only becomes worse.
    Z, ys, _ = problem()
    g = torch.Generator().manual_seed(1)
    ys = [torch.randn(M, 1, generator=g, dtype=torch.float64), ys[1]]
    checked = []
    to_stop = EarlyStopping.to_stop

    def spy(early, step, losses, weights):
        found = to_stop(early, step, losses, weights)
        checked.append((step, early.best))
        return found

    monkeypatch.setattr(EarlyStopping, "to_stop", spy)
    recipe = Recipe(steps=400, batch_size=32, patience=0.1, beta=0.0, eta=0.0)
    xnns = [SRAE(D, K, hidden=(64,)).double() for _ in ys]
    noise, learned = fit_together(xnns, Z, ys, recipe=recipe)
    assert noise[-1].step < learned[-1].step < 399
    # It stopped after a tenth of the steps, or more where these were still drawn to anchors, without a new best.
    both = [(step, float(best[0])) for step, best in checked if len(best) == 2]
    last = both[-1][0]
    since = next(step for step, value in both if value == both[-1][1])
    assert last - since >= 40 and last >= 0.4 * 400
    assert all(math.isfinite(float(p.detach().abs().max())) for p in xnns[0].parameters())


def test_the_best_weights_count(monkeypatch):
    """Whoever is best early on, and then is ruined, ends as it was when it was best."""
    Z, ys, marks = problem()
    recipe = Recipe(steps=100, batch_size=32, patience=1.0)
    states = {}
    check = Trainer._check

    def ruined(trainer, early):
        if trainer.step == 50:
            states["best"] = {k: t.detach().clone() for k, t in trainer.stack.weights.items()}
            early.best.fill_(-1.0)  # nothing later is better
            for name, kept in early.best_weights.items():
                kept.copy_(trainer.stack.weights[name].detach())
        check(trainer, early)

    monkeypatch.setattr(Trainer, "_check", ruined)
    monkeypatch.setattr("captum_xnn.training._fitting._arrange", lambda *_: None)
    monkeypatch.setattr(SRAE, "fold", lambda *_: None)
    xnns = [SRAE(D, K, hidden=()).double() for _ in ys]
    fit_together(xnns, Z, ys, positives=marks, recipe=recipe)
    for t, xnn in enumerate(xnns):
        for name, p in xnn.named_parameters():
            torch.testing.assert_close(p.detach(), states["best"][name][t], rtol=0, atol=0)


def test_those_who_go_on_do_not_notice():
    """That a neighbour stopped changes nothing for an explainer, and held-out rows are the same for all."""
    Z, ys, _ = problem()
    noise = torch.randn(M, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    recipe = Recipe(steps=400, batch_size=32, patience=0.1, beta=0.0, eta=0.0)
    pair = [SRAE(D, K, hidden=(64,)).double() for _ in range(2)]
    histories = fit_together(pair, Z, [noise, ys[1]], recipe=recipe)
    assert len(histories[0]) < len(histories[1])
    alone = SRAE(D, K, hidden=(64,)).double()
    fit(alone, Z, ys[1], recipe=recipe)
    same(pair[1], alone, 1e-6)


# --- checkpoints


class Cut(Exception):
    pass


def cut_at(monkeypatch, step):
    take = Trainer._take

    def cut(trainer, *arguments):
        if trainer.step == step:
            raise Cut
        take(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_take", cut)


@pytest.mark.parametrize("patience", [None, 0.5])
@pytest.mark.parametrize("form", ["SRAE", "NN"])
def test_a_fit_that_was_cut_off_goes_on_with_the_same_numbers(form, patience, tmp_path):
    recipe = Recipe(steps=120, batch_size=32, patience=patience)
    whole, histories = together(FORMS[form], recipe)
    for step in (10, 60, 119):
        kept = Checkpoint(tmp_path, every=0)
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, step)
            with pytest.raises(Cut):
                together(FORMS[form], recipe, checkpoint=kept)
        again, resumed = together(FORMS[form], recipe, checkpoint=kept)
        for a, b in zip(whole, again, strict=True):
            same(a, b)
        assert resumed == histories
        for file in tmp_path.iterdir():
            file.unlink()


def test_one_that_was_cut_off_after_a_neighbour_had_stopped(tmp_path):
    Z, ys, _ = problem()
    noise = torch.randn(M, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    recipe = Recipe(steps=400, batch_size=32, patience=0.1, beta=0.0, eta=0.0)

    def run(**settings):
        pair = [SRAE(D, K, hidden=(64,)).double() for _ in range(2)]
        return pair, fit_together(pair, Z, [noise, ys[1]], recipe=recipe, **settings)

    whole, histories = run()
    stopped, end = (history[-1].step for history in histories)
    assert stopped + 50 < end
    kept = Checkpoint(tmp_path, every=0)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, stopped + 50)
        with pytest.raises(Cut):
            run(checkpoint=kept)
    again, resumed = run(checkpoint=kept)
    for a, b in zip(whole, again, strict=True):
        same(a, b)
    assert resumed == histories


def test_another_number_of_processes_is_another_fit():
    """Whose sums have another order: it would not go on with the same numbers."""
    Z, ys, _ = problem()
    xnn, recipe = FORMS["SRAE"](D, K).double(), SHORT
    problems = [
        Problem(Z, ys[0], Sampler(None, M, recipe, torch.Generator()), recipe, ranks=Ranks(0, n)) for n in (1, 2)
    ]
    assert len({Checkpoint.key(_signature(xnn, p, scaling(Z, ys[0]))) for p in problems}) == 2


def test_it_goes_on_from_where_it_was(tmp_path, monkeypatch):
    kept, steps = Checkpoint(tmp_path, every=0), []
    cut_at(monkeypatch, 80)
    recipe = Recipe(steps=120, batch_size=32)
    with pytest.raises(Cut):
        together(FORMS["SRAE"], recipe, checkpoint=kept)
    monkeypatch.undo()
    take = Trainer._take

    def noting(trainer, *arguments):
        steps.append(trainer.step)
        take(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_take", noting)
    together(FORMS["SRAE"], recipe, checkpoint=kept)
    assert steps == list(range(75, 120))
    # What is done is not done again.
    steps.clear()
    together(FORMS["SRAE"], recipe, checkpoint=kept)
    assert steps == []


def test_other_data_or_settings_start_anew(tmp_path, monkeypatch):
    kept, started = Checkpoint(tmp_path, every=0), []
    take = Trainer._take

    def noting(trainer, *arguments):
        started.append(trainer.step)
        take(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_take", noting)
    Z, ys, marks = problem()

    def once(Z=Z, y=ys[0], marked=marks[0], recipe=SHORT, seed=0):
        started.clear()
        fit_together(
            [SRAE(D, K, hidden=()).double()], Z, [y], positives=[marked], recipe=recipe, seed=seed, checkpoint=kept
        )
        return len(started)

    assert once() == 60
    assert once() == 0
    other = Z.clone()
    other[7, 3] += 1
    for changed in ({"Z": other}, {"y": ys[1]}, {"marked": marks[1]}, {"recipe": Recipe(steps=61)}, {"seed": 1}):
        assert once(**changed) > 0, changed
    assert once() == 0


def test_a_checkpoint_that_is_damaged_or_cannot_be_written_is_told(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path / "here", every=0)
    together(FORMS["SRAE"], checkpoint=kept)
    (file,) = (tmp_path / "here").iterdir()
    whole = file.read_bytes()
    # Cut short, empty, and with one bit of a weight, or of anything else, turned round.
    flipped = [bytearray(whole) for _ in range(40)]
    for i, data in enumerate(flipped):
        data[len(data) * i // 40] ^= 0x10
    for damaged in (whole[:-200], b"", b"foreign", *flipped):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint .* is damaged; delete it"):
            kept.read(file.stem.removeprefix("fit-"), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="is damaged; delete it"):
        together(FORMS["SRAE"], checkpoint=kept)

    def full(*_):
        raise OSError(28, "No space left on device")

    file.unlink()
    monkeypatch.setattr("captum_xnn.training._checkpoint.replace_file", full)
    with pytest.raises(CheckpointError, match="No space left on device; make room"):
        together(FORMS["SRAE"], checkpoint=kept)


def test_it_is_time_for_a_checkpoint_so_many_seconds_after_the_last(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("captum_xnn.training._checkpoint.time.monotonic", lambda: now[0])
    kept, seen = Checkpoint(tmp_path, every=60), []
    for now[0] in (159.9, 160.0, 175.0):
        seen.append(kept.due())
    kept.write("0", {})
    for now[0] in (234.9, 235.0):
        seen.append(kept.due())
    assert seen == [False, True, True, False, True]


def test_a_checkpoint_runs_no_foreign_code(tmp_path):
    class Foreign:
        def __reduce__(self):
            return print, ("foreign code",)

    kept = Checkpoint(tmp_path)
    kept.write("0", {"step": Foreign()})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        kept.read("0", torch.device("cpu"))


def test_killed_while_writing_the_last_checkpoint_stays(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path)
    kept.write("0", {"step": 1})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("captum_xnn._files.os.fsync", killed)
        kept.write("0", {"step": 2})
    assert kept.read("0", torch.device("cpu")) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_fits_are_told_apart():
    parts = ["SRAE", 3, torch.arange(3.0), [torch.ones(2), "x"]]
    name = Checkpoint.key(parts)
    assert Checkpoint.key(iter(parts)) == name and len(name) == 16
    for i, other in enumerate(("NN", 4, torch.tensor([0.0, 1.0, 3.0]), [torch.tensor([1.0, 2.0]), "x"])):
        assert Checkpoint.key([*parts[:i], other, *parts[i + 1 :]]) != name


def test_only_checkpoints_are_cleared_away(tmp_path):
    kept = Checkpoint(tmp_path / "kept")
    kept.clear()  # nothing to do
    kept.write("0", {"step": 1})
    (tmp_path / "kept" / "weights.pt").write_text("somebody else's")
    kept.clear()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["weights.pt"]
    (tmp_path / "kept" / "weights.pt").unlink()
    kept.clear()
    assert not (tmp_path / "kept").exists()


# --- through XNNAttribution


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 5))
    return model, torch.randn(500, 6, generator=torch.Generator().manual_seed(1))


def test_many_targets_are_each_what_they_would_be_alone():
    model, data = model_and_data()
    make = partial(XNNAttribution, model, "1", 2, autoencoder=SRAE, recipe=Recipe(steps=50))
    many = make().fit(data, target=range(5), progress=False)
    for target in range(5):
        one = make().fit(data, target=target, progress=False)
        a, b = (x.explain(data[:20], target=target) for x in (many, one))
        torch.testing.assert_close(a.contributions, b.contributions, rtol=1e-3, atol=1e-3)
        assert many.explainer(target).f_reg == pytest.approx(one.explainer(target).f_reg, rel=1e-3)
        assert many.explainer(target).positives == one.explainer(target).positives


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_every_record_is_logged_once_also_where_a_fit_goes_on(blocks, tmp_path):
    """Whether it is time for a checkpoint in every block of steps, in every second one, or only after the cut."""
    model, data = model_and_data()
    recipe = Recipe(steps=100)

    def run(cut=None):
        calls = itertools.count(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoint, "due", lambda _: next(calls) % blocks == 0)
            if cut:
                cut_at(patch, cut)
            XNNAttribution(model, "1", 2, autoencoder=SRAE, recipe=recipe).fit(
                data,
                target=[1, 3],
                progress=False,
                checkpoint=tmp_path / "kept",
                log=JSONLines(tmp_path / "fit.jsonl"),
            )

    with pytest.raises(Cut):
        run(cut=85)
    run()
    lines = [json.loads(line) for line in (tmp_path / "fit.jsonl").read_text().splitlines()]
    steps = [step for step in range(100) if step % 2 == 0 or step == 99]
    for target in (1, 3):
        assert [line["step"] for line in lines if line["target"] == target] == steps
    assert set(lines[0]) == {"target", "step", "faithfulness", "sparse_reconstruction", "pull_away"}


# --- several processes

SCRIPT = """
    import os, sys, torch, torch.distributed as dist
    from functools import partial
    from torch import nn
    from captum_xnn import SRAE, XNNAttribution
    from captum_xnn.training import Recipe
    from captum_xnn.training._problem import Problem
    from captum_xnn.training._sampler import Sampler
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    data = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)).double()
    kept = None
    if os.environ.get("CHECKPOINT"):
        from captum_xnn.training import Checkpoint
        from captum_xnn.training._trainer import Trainer
        kept, take = Checkpoint(os.environ["CHECKPOINT"], every=0), Trainer._take
        def killed(trainer, *given):
            if trainer.step == 30 and dist.get_rank() == 1 and os.environ.get("KILL"):
                os._exit(9)
            print("step", trainer.step, flush=True)
            take(trainer, *given)
        Trainer._take = killed
    calls = []
    model[0].register_forward_hook(lambda m, i, o: calls.append(len(o)))
    learned = os.environ.get("FORM", "learned") == "learned"
    xnn = XNNAttribution(model, "1", 3, autoencoder=SRAE if learned else None, recipe=Recipe(steps=60))
    settings = dict(distributed=dist.is_initialized(), progress=False)
    store = sys.argv[2] if len(sys.argv) > 2 else None
    xnn.fit(data, target=[1, 4], store=store, checkpoint=kept, **settings)
    rows = sum(calls)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save({"E": torch.stack([xnn.explain(data[:9], target=t).features for t in (1, 4)]), "rows": rows},
               f"{sys.argv[1]}/{rank}.pt")
"""


def processes(count, folder, *arguments, **variables):
    """Runs the script in so many processes under torchrun, or plainly, and returns what each saved."""
    done = started(count, folder, *arguments, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def started(count, folder, *arguments, **variables):
    """Runs the script and returns how it ended."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [str(folder / "script.py"), str(folder), *arguments]
    if count > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_one_two_and_four_processes_give_the_same_x_features(tmp_path):
    (alone,) = processes(1, tmp_path / "1")
    for count in (2, 4):
        found = processes(count, tmp_path / str(count))
        for one in found:
            torch.testing.assert_close(one["E"], alone["E"], rtol=0, atol=1e-4)
        # Every process ran its share of the data, beside the six rows on which it tried the model.
        assert sum(one["rows"] - 6 for one in found) == alone["rows"] - 6 == 500
        assert max(one["rows"] for one in found) < 500


@pytest.mark.slow
def test_two_processes_give_the_same_groups_of_contributions(tmp_path):
    (alone,) = processes(1, tmp_path / "1", FORM="groups")
    for one in processes(2, tmp_path / "2", FORM="groups"):
        torch.testing.assert_close(one["E"], alone["E"], rtol=0, atol=1e-6)
    assert float(alone["E"].abs().max()) > 0.01


@pytest.mark.slow
def test_processes_share_a_store(tmp_path):
    (alone,) = processes(1, tmp_path / "1")
    found = processes(2, tmp_path / "2", str(tmp_path / "store"))
    for one in found:
        torch.testing.assert_close(one["E"], alone["E"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_killed_rank_leaves_a_checkpoint_to_go_on_from(tmp_path):
    whole = processes(2, tmp_path / "whole")
    cut = started(2, tmp_path / "cut", CHECKPOINT=str(tmp_path / "kept"), KILL="1")
    assert cut.returncode != 0 and not (tmp_path / "cut" / "0.pt").exists()
    done = started(2, tmp_path / "cut", CHECKPOINT=str(tmp_path / "kept"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 24\n" not in done.stdout and "step 25\n" in done.stdout
    again = torch.load(tmp_path / "cut" / "0.pt", weights_only=True)
    assert torch.equal(again["E"], whole[0]["E"])


class Pair(Ranks):
    """The second of two processes; the first says what it is told to say."""

    says = None

    def all_of(self, own):
        return [type(self).says(own), own]

    def average(self, values):
        pass

    def same(self, values):
        return values


def test_processes_learn_as_many_at_a_time(monkeypatch):
    """As the one with the least room; stacks of other sizes could not be averaged."""
    sizes, run = [], Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, bar: sizes.append(len(self.stack.xnns)) or run(self, bar))
    monkeypatch.setattr(Pair, "says", lambda own: 2)
    together(FORMS["SRAE"], Recipe(steps=3, batch_size=32), ranks=Pair(1, 2))
    assert sizes == [2, 1]


def test_processes_that_see_other_checkpoints_are_told(monkeypatch, tmp_path):
    for step in (25, 0):
        monkeypatch.setattr(Pair, "says", lambda own, step=step: step if own == 0 else own)
        kept = Checkpoint(tmp_path, every=0)
        if step:
            with pytest.raises(CheckpointError, match=r"resume from one checkpoint, .* found steps \[25, 0\]"):
                together(FORMS["SRAE"], ranks=Pair(1, 2), checkpoint=kept)
        else:
            together(FORMS["SRAE"], ranks=Pair(1, 2), checkpoint=kept)
    assert not list(tmp_path.iterdir())  # the first process writes


def test_no_group_of_processes_is_told():
    model, data = model_and_data()
    with pytest.raises(RuntimeError, match="there is no group of processes; run under torchrun"):
        XNNAttribution(model, "1", 2, autoencoder=SRAE).fit(data, target=0, distributed=True)


def test_encoding_is_row_by_row():
    xnns, _ = together(FORMS["SRAE"])
    Z = problem()[0]
    torch.testing.assert_close(encode_all(xnns[0], Z, batch_size=7), encode_all(xnns[0], Z), rtol=1e-12, atol=1e-12)


def test_early_stopping_keeps_the_best_weights_of_each_network():
    """Two networks, four losses: the weights kept are those of each one's least loss, whatever came later."""
    stopping = EarlyStopping([_Watched(), _Watched()], {"w": torch.zeros(2, 1)}, torch.zeros(1), patience=2, earliest=0)
    losses = torch.tensor([[3.0, 3.0], [1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
    marks = [stopping.to_stop(s, losses[s], {"w": torch.full((2, 1), float(s))}).tolist() for s in range(4)]
    assert stopping.best_weights["w"].flatten().tolist() == [1.0, 2.0]  # an equal loss later changes nothing
    assert marks == [[False, False]] * 3 + [[True, False]]
    stopping.keep(torch.tensor([False, True]))
    assert stopping.best_weights["w"].tolist() == [[2.0]] and stopping.best.tolist() == [1.0]


class _Watched:
    def draw_held_out(self):
        return torch.arange(3)

    def weight(self, rows):
        return torch.full((len(rows),), 1 / 3)
