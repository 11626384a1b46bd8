"""Layers are found and read, and the model is left as it was, whatever happens in between."""

from __future__ import annotations

import gc
import random
import re
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_xnn.errors import LayerNotFoundError, LayerNotReachedError
from captum_xnn.layers._batching import gathered, rows_of
from captum_xnn.layers._lookup import find_layer, unwrap
from captum_xnn.layers._read import read_layer, run_to_layer
from captum_xnn.layers._state import one_path, untouched
from captum_xnn.layers._trace import trace

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def snapshot(model):
    """All that must not change, with tensors copied."""
    return {
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [{h: list(getattr(m, h)) for h in HOOKS} for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "state": {k: (v.dtype, v.tolist()) for k, v in model.state_dict().items()},
    }


def mixed_model():
    """Mixed modes, a frozen parameter, a gradient, a hook of the user's."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Sequential(nn.ReLU(), nn.Linear(6, 2))
    )
    model.train()
    model[1].eval()
    model[3][0].eval()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.randn(6)
    model[2].register_forward_hook(lambda *_: None)
    model[3].register_forward_pre_hook(lambda *_: None)
    return model


# --- unwrap and find_layer


def test_unwrap_takes_off_compile_and_data_parallel():
    model = nn.Linear(2, 1)
    assert unwrap(model) is model
    assert unwrap(torch.compile(model, backend="eager")) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert unwrap(nn.DataParallel(torch.compile(model, backend="eager"))) is model


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 2))])
def test_unwrap_refuses_scripted_and_traced(make):
    with pytest.raises(TypeError, match="pass the module that was scripted"):
        unwrap(make(nn.Sequential(nn.Linear(2, 1))))


def test_unwrap_refuses_functions():
    with pytest.raises(TypeError, match=r"the model is a function, not a torch\.nn\.Module"):
        unwrap(lambda x: x)


def test_find_layer_by_name_and_module():
    model = mixed_model()
    assert find_layer(model, "3.1") == ("3.1", model[3][1])
    assert find_layer(model, model[3]) == ("3", model[3])
    assert find_layer(model, nn.DataParallel(model[3])) == ("3", model[3])


def test_find_layer_tells_near_names():
    model = nn.ModuleDict({"features": nn.Sequential(nn.ReLU()), "classifier": nn.Linear(2, 1)})
    with pytest.raises(LayerNotFoundError, match="has no layer 'clasifier'; near names: 'classifier'"):
        find_layer(model, "clasifier")
    with pytest.raises(LayerNotFoundError, match=re.escape("near names: 'features', 'features.0', 'classifier'")):
        find_layer(model, "@@@@")
    with pytest.raises(LayerNotFoundError, match="has no layer ''"):
        find_layer(model, "")


def test_find_layer_refuses_what_is_not_of_the_model():
    with pytest.raises(LayerNotFoundError, match="does not hold this Linear"):
        find_layer(mixed_model(), nn.Linear(4, 6))
    with pytest.raises(TypeError, match="int is not a layer; pass a dotted name or a module"):
        find_layer(mixed_model(), 3)


# --- untouched


def disturb(model):
    """What methods of Captum do to a model, and more."""
    model(torch.randn(5, 4))
    for m in model.modules():
        m.register_forward_hook(lambda *_: None)
        m.register_forward_hook(lambda *_, **__: None, with_kwargs=True, always_call=True)
        m.register_forward_pre_hook(lambda *_: None)
        m.register_forward_pre_hook(lambda *_, **__: None, with_kwargs=True)
        m.register_full_backward_hook(lambda *_: None)
        m.register_full_backward_pre_hook(lambda *_: None)
        m.rule, m.activations = object(), torch.zeros(2)
    model[3].train()
    for p in model.parameters():
        p.requires_grad_(not p.requires_grad)
        p.grad = torch.ones_like(p)


def test_untouched_restores_everything():
    model = mixed_model()
    before, grad = snapshot(model), model[0].bias.grad
    with untouched(model):
        assert not any(m.training for m in model.modules())
        disturb(model)
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert model[0].bias.grad is grad


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_untouched_restores_everything_after_an_exception(error):
    model = mixed_model()
    before = snapshot(model)
    with pytest.raises(error, match="in the middle"), untouched(model):
        disturb(model)
        raise error("in the middle")
    assert snapshot(model) == before


def draws():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_untouched_restores_random_numbers(fails):
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    wanted = draws()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    try:
        with untouched(nn.Dropout()):
            draws()
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert draws() == wanted


def test_untouched_keeps_running_statistics():
    model = nn.Sequential(nn.BatchNorm1d(4)).train()
    before = snapshot(model)
    with untouched(model):
        model(torch.randn(8, 4))
    assert snapshot(model) == before


class Counting(nn.Module):
    """Keeps a buffer that every forward pass changes, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return self.linear(x)


def test_untouched_restores_buffers_that_the_forward_pass_changes():
    model = Counting()
    before = snapshot(model)
    with untouched(model):
        model(torch.randn(3, 4))
    assert snapshot(model) == before


def test_untouched_in_two_threads():
    model = nn.Dropout().train()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    modes = []

    def first():
        with untouched(model):
            first_in.set()
            second_in.wait(0.3)  # not for ever: the second may well have to wait for the first to leave
        first_out.set()

    def second():
        first_in.wait(5)
        with untouched(model):
            second_in.set()
            first_out.wait(5)
            modes.append(model.training)

    together(first, second)
    assert modes == [False], "the second context is still open, and the model trains"
    assert model.training, "both are closed, and the model still evaluates"


def together(*works):
    threads = [threading.Thread(target=work) for work in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


# --- one_path


@pytest.mark.parametrize("before", [True, False])
def test_fused_attention_is_off_until_the_last_of_several_threads_is_done(before):
    """Threads that begin and end in any order leave the switch as it was."""
    torch.backends.mha.set_fastpath_enabled(before)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with one_path():
            first_in.set()
            second_in.wait(5)
        first_out.set()

    def second():
        first_in.wait(5)
        with one_path():
            second_in.set()
            first_out.wait(5)
            seen.append(torch.backends.mha.get_fastpath_enabled())

    try:
        together(first, second)
        assert seen == [False]
        assert torch.backends.mha.get_fastpath_enabled() is before
        with pytest.raises(RuntimeError, match="broken on purpose"), untouched(nn.ReLU()), one_path():
            raise RuntimeError("broken on purpose")
        assert torch.backends.mha.get_fastpath_enabled() is before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- read_layer


def test_read_layer_copies_before_an_operation_in_place():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    Z, y = read_layer(model, model[0], (x,))
    assert bool((Z < 0).any())
    torch.testing.assert_close(Z, x @ model[0].weight.T + model[0].bias)
    torch.testing.assert_close(y, model(x), rtol=0, atol=0)


def test_read_layer_gives_the_last_call_and_transforms():
    model = Reused()
    x = torch.randn(5, 4)
    Z, y = read_layer(model, model.block, (x,), output_transform=lambda o: 2 * o)
    torch.testing.assert_close(Z, 2 * model.block(model.block(x)))
    torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (
            {"a": torch.zeros(2, 2), "b": 1},
            "layer '0' returns a dict with keys a, b, not one tensor; pass output_transform=, a",
        ),
        ((torch.zeros(2, 2),), "returns a tuple, not one tensor; pass output_transform="),
    ],
)
def test_read_layer_refuses_outputs_that_are_no_tensor(output, told):
    model = nn.Sequential(Gives(output))
    with pytest.raises(TypeError, match=told):
        read_layer(model, model[0], (torch.zeros(2),), name="0")
    with pytest.raises(TypeError, match=told):
        run_to_layer(model, model[0], (torch.zeros(2),), name="0")
    assert not model[0]._forward_hooks


def test_read_layer_refuses_outputs_without_examples():
    model = nn.Sequential(Gives(torch.zeros(2)))
    with pytest.raises(ValueError, match=re.escape("returns shape (2,), without a row for each example")):
        read_layer(model, model[0], (torch.zeros(2),), name="0")


class Gives(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


# --- run_to_layer


class Reused(nn.Module):
    """Calls the block twice, and a head that counts how often it runs."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.runs = 0

    def forward(self, x):
        x = self.block(self.block(x))
        self.runs += 1
        return self.head(x)


def test_run_to_layer_leaves_at_the_last_call():
    model = Reused()
    x = torch.randn(5, 4, requires_grad=True)
    torch.testing.assert_close(run_to_layer(model, model.block, (x,)), model.block(x))
    Z = run_to_layer(model, model.block, (x,), calls=2)
    torch.testing.assert_close(Z, model.block(model.block(x)))
    assert model.runs == 0
    (given,) = torch.autograd.grad(Z.sum(), x)
    (wanted,) = torch.autograd.grad(model.block(model.block(x)).sum(), x)
    torch.testing.assert_close(given, wanted)


def test_run_to_layer_says_when_calls_are_too_few():
    model = Reused()
    with pytest.raises(LayerNotReachedError, match="layer 'block' never ran"):
        run_to_layer(model, model.block, (torch.randn(5, 4),), calls=3, name="block")
    assert not model.block._forward_hooks


class Careful(nn.Module):
    """Catches whatever goes wrong in its layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        try:
            return self.layer(x)
        except Exception:
            return torch.zeros(len(x), 3)


def test_run_to_layer_is_not_swallowed_by_the_model():
    model = Careful()
    x = torch.randn(5, 4)
    torch.testing.assert_close(run_to_layer(model, model.layer, (x,)), model.layer(x))


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken on purpose")


def test_no_hook_remains_after_an_exception_of_the_model():
    model = nn.Sequential(nn.Linear(4, 4), Broken(), nn.ReLU())
    before = snapshot(model)
    for f in (read_layer, run_to_layer, trace):
        with pytest.raises(RuntimeError, match="broken on purpose"):
            f(model, model[2], (torch.zeros(2, 4),))
        assert snapshot(model) == before


def test_run_to_layer_does_not_keep_the_graph_alive():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    gc.collect()
    gc.disable()
    try:
        Z = run_to_layer(model, model[0], (torch.zeros(2, 4),))
        kept = weakref.ref(Z)
        del Z
        assert kept() is None
    finally:
        gc.enable()


def test_run_to_layer_in_threads():
    model = Reused()
    xs = [torch.randn(3, 4) for _ in range(8)]
    wanted = [model.block(model.block(x)) for x in xs]
    wrong: list[str] = []
    start = threading.Barrier(len(xs))

    def work(x, y):
        start.wait()
        for _ in range(20):
            try:
                if not torch.equal(run_to_layer(model, model.block, (x,), calls=2), y):
                    wrong.append("another value")
            except BaseException as error:
                wrong.append(repr(error))

    together(*(partial(work, x, y) for x, y in zip(xs, wanted, strict=True)))
    torch.compiler.set_stance("default")  # what is left of it is the next test's business
    assert not wrong


def test_compilation_goes_on_after_two_threads():
    layer = nn.Identity()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    waits = iter([lambda: (first_in.set(), second_in.wait(0.3)), lambda: (second_in.set(), first_out.wait(5))])
    layer.register_forward_pre_hook(lambda *_: next(waits)() and None)
    model = nn.Sequential(layer)

    def first():
        run_to_layer(model, layer, (torch.zeros(1, 2),))
        first_out.set()

    def second():
        first_in.wait(5)
        run_to_layer(model, layer, (torch.zeros(1, 2),))

    together(first, second)
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph

    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
    finally:
        torch.compiler.set_stance("default")
    assert compiled, "torch.compile is switched off for the whole process"


# --- layers that are never executed


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.used(self.attention(x, x, x)[0])


@pytest.mark.parametrize("f", [read_layer, run_to_layer, trace])
@pytest.mark.parametrize("name", ["unused", "attention.out_proj"])
def test_a_layer_that_never_runs(f, name):
    model = Skips()
    before = snapshot(model)
    with pytest.raises(LayerNotReachedError, match=f"layer '{name}' never ran in the forward pass of Skips"):
        f(model, model.get_submodule(name), (torch.zeros(2, 3, 4),), name=name)
    assert snapshot(model) == before


# --- trace


def test_trace_lists_executed_leaves_once_in_order():
    shared = nn.ReLU()
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), shared, nn.Sequential(nn.Conv2d(2, 2, 1), shared), nn.Flatten(), nn.Linear(18, 4), nn.Tanh()
    )
    found = trace(model, model[4], (torch.zeros(1, 1, 5, 5),))
    assert found.leaves == (model[0], shared, model[2][0], model[3], model[4])
    assert found.calls == 1
    assert found.spatial is shared
    assert trace(model, model[2], (torch.zeros(1, 1, 5, 5),)).leaves == (model[0], shared, model[2][0])


def test_trace_without_feature_maps():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert trace(model, model[1], (torch.zeros(1, 4),)).spatial is None
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert trace(pooled, pooled[1], (torch.zeros(1, 2, 4, 4),)).spatial is None


def test_trace_counts_the_calls_of_a_reused_layer():
    model = Reused()
    found = trace(model, model.block, (torch.zeros(1, 4),))
    assert found.calls == 2
    assert found.leaves == (model.block[0], model.block[1])


class Interrupted(nn.Module):
    """While it runs, another thread runs the model as well, as in a server."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ReLU()

    def forward(self, x):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=self, args=(x,))
            other.start()
            other.join()
        return self.layer(x)


def test_trace_does_not_count_what_other_threads_run():
    model = Interrupted()
    assert trace(model, model.layer, (torch.zeros(1, 4),)).calls == 1
    x = torch.randn(2, 4)
    torch.testing.assert_close(run_to_layer(model, model.layer, (x,)), x.relu())
    torch.testing.assert_close(read_layer(model, model.layer, (x,))[0], x.relu())


# --- rows_of


def test_rows_of_picks_what_has_rows():
    x, y = torch.randn(3, 2), torch.randn(3, 1, 4)
    each, table, number = torch.arange(3), torch.randn(5), torch.tensor(2.0)
    rows = torch.tensor([2, 0, 0, 1])
    inputs, additional = rows_of((x, y), (each, table, number, "mean", None), rows)
    assert torch.equal(inputs[0], x[rows]) and torch.equal(inputs[1], y[rows])
    assert additional[0].tolist() == [2, 0, 0, 1]
    assert additional[1] is table and additional[2] is number and additional[3:] == ("mean", None)
    assert rows_of((x,), None, rows)[1] is None


def test_rows_of_copies():
    x = torch.zeros(2, 2)
    (copied,), _ = rows_of((x,), None, torch.arange(2))
    copied += 1
    assert torch.equal(x, torch.zeros(2, 2))


def test_functions_alone_cannot_be_read():
    """A layer that the model does not call as a module but through its weights is not reached."""

    class ByWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight)

    model = ByWeight()
    with pytest.raises(LayerNotReachedError, match="used as weights and not called"):
        read_layer(model, model.layer, (torch.zeros(1, 3),), name="layer")


def test_gathered_is_in_the_order_of_the_rows_and_holds_no_part():
    """Each part is gone when the next is asked for."""
    alive = []

    def parts():
        for rows in ([3, 0], [1], [4, 2]):
            gc.collect()
            assert not any(ref() is not None for ref in alive)
            made = torch.tensor(rows) * 10.0, torch.tensor(rows)[:, None].expand(-1, 2).clone()
            alive.extend(weakref.ref(m) for m in made)
            yield rows, made
            del made

    one, two = gathered(parts(), 5)
    assert one.tolist() == [0, 10, 20, 30, 40] and two.tolist() == [[i, i] for i in range(5)]


def test_a_model_of_one_module_has_no_layers_to_name():
    with pytest.raises(LayerNotFoundError, match=r"Linear has no layer '0', as it holds no other module; explain nn"):
        find_layer(nn.Linear(2, 1), "0")
