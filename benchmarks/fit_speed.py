"""How long a fit of 600 examples x 64 dimensions takes, alone and beside another process on the same cores.

Printed at a layer of 64 dimensions of a small network, for the default form, for the SRAE, and for a plain loop of
PyTorch that trains a network of the SRAE's size:

- processor time of a fit, with the threads of the environment, as median of several fits in turns, with the range;
- time on the clock beside a process that multiplies matrices with as many threads, as ratio to the fit alone, in turns;
- time on the clock of the fit alone, as ratio to its processor time. It is 1 or less on a machine without other work.
  Where it is above 1, other work takes the same cores, and the second ratio comes out too small.

With --digits, sizes of batches, widths of the SRAE's first layer and numbers of steps are compared at the fully
connected layer of a network for MNIST's digits, 64 dimensions: means over the ten digits with their 95 % confidence
intervals. The error is the mean |surrogate - output| on 1,000 new digits in standard deviations of the output, of two
seeds. Ratios are to the first line, digit by digit. *Same* is the mean correlation of matched x-features of the seeds.

    python -m benchmarks.fit_speed
    python -m benchmarks.fit_speed --digits
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.runs import Column, Line, table
from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.metrics import matched_features
from captum_xnn.models._base import encode_all
from captum_xnn.training._fitting import fit as fit_form

COLUMNS = (
    Column("error", "error", 4),
    Column("error_ratio", "error / first", 3),
    Column("same", "same", 3),
    Column("seconds", "fit, s", 2),
    Column("time_ratio", "time / first", 2),
)
BUSY = (
    "import torch; torch.set_num_threads({threads}); a = torch.rand({size}, {size})\nprint(flush=True)\nwhile 1: a @ a"
)

# Of the processor, and on the clock.
_Seconds = tuple[float, float]


class Speed(NamedTuple):
    """How long fits of a form take."""

    seconds: float
    """Processor time of a fit, median."""
    least: float
    most: float
    beside: float
    """Time on the clock beside another process, as ratio to the time alone."""
    waits: float
    """Time on the clock alone, as ratio to the processor time."""


def material(examples: int, dimensions: int) -> tuple[nn.Module, Tensor]:
    """Returns a small network with a layer "1" of so many dimensions, and inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, dimensions), nn.ReLU(), nn.Linear(dimensions, 3)).eval()
        return model, torch.randn(examples, 32)


def groups(model: nn.Module, data: Tensor, steps: int) -> None:
    """Fits the default form, which takes no steps."""
    del steps
    XNNAttribution(model, "1", n_features=5).fit(data, target=_most_frequent(model, data), progress=False)


def srae(model: nn.Module, data: Tensor, steps: int) -> None:
    """Fits the SRAE."""
    xnn = XNNAttribution(model, "1", n_features=5, autoencoder=SRAE, recipe=Recipe(steps=steps))
    xnn.fit(data, target=_most_frequent(model, data), progress=False)


def plain_loop(model: nn.Module, data: Tensor, steps: int) -> None:
    """Trains a network of the SRAE's size with squared errors, batches of its size and PyTorch's own AdamW."""
    target = _most_frequent(model, data)
    with torch.no_grad():
        Z, y = model[:2](data), model(data)[:, [target]]  # type: ignore[index]
    network = SRAE(Z.shape[1], 5)
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3, fused=True)
    for _ in range(steps):
        rows = torch.randint(len(Z), (Recipe().batch_for(len(Z)),))
        made = network(Z[rows])
        loss = (made.y_bar - y[rows]).square().mean() + (made.Z_tilde - Z[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


FORMS = {"groups (default)": groups, "SRAE": srae, "plain loop": plain_loop}


def _most_frequent(model: nn.Module, data: Tensor) -> int:
    """Returns the class that the model predicts most often."""
    with torch.no_grad():
        return int(model(data).argmax(1).mode().values)


def timed(fit: Callable[[nn.Module, Tensor, int], None], model: nn.Module, data: Tensor, steps: int) -> _Seconds:
    """Returns seconds of the processor and on the clock that a fit takes."""
    begin, clock = time.process_time(), time.perf_counter()
    fit(model, data, steps)
    return time.process_time() - begin, time.perf_counter() - clock


@contextmanager
def competitor(threads: int, size: int = 1500) -> Iterator[subprocess.Popen[bytes]]:
    """Multiplies matrices in another process within a context; yields the process."""
    code = BUSY.format(threads=threads, size=size)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()  # it has begun
        try:
            yield other
        finally:
            other.kill()


def fits(
    *, examples: int = 600, dimensions: int = 64, steps: int = 600, repeats: int = 5, size: int = 1500
) -> dict[str, Speed]:
    """Returns by form how long fits take, alone and beside another process in turns."""
    model, data = material(examples, dimensions)
    for form in FORMS.values():
        timed(form, model, data, steps)
    turns: list[list[list[_Seconds]]] = []
    with competitor(torch.get_num_threads(), size) as other:
        for _ in range(repeats):
            turns.append([])
            for signalled in (signal.SIGSTOP, signal.SIGCONT):
                other.send_signal(signalled)
                turns[-1].append([timed(form, model, data, steps) for form in FORMS.values()])
    return {name: _speed([(alone[i], beside[i]) for alone, beside in turns]) for i, name in enumerate(FORMS)}


def _speed(turns: list[tuple[_Seconds, _Seconds]]) -> Speed:
    """Returns the figures of one form from turns of (processor, clock) alone and beside another process."""
    processor = [alone[0] for alone, _ in turns]
    clock, beside = (statistics.median(of[i][1] for of in turns) for i in (0, 1))
    seconds = statistics.median(processor)
    return Speed(seconds, min(processor), max(processor), beside / clock, clock / seconds)


class Choice(NamedTuple):
    """Settings of a fit of the SRAE."""

    batch_size: int
    width: int = 800
    """Of the first layer."""
    steps: int = 600


CHOICES = (
    *(Choice(size) for size in (128, 96, 64, 40, 32)),
    *(Choice(128, width) for width in (512, 256)),
    *(Choice(128, steps=steps) for steps in (400, 300)),
)
"""What is compared with the first of them."""


def on_digits(
    choices: tuple[Choice, ...] = CHOICES, digits: tuple[int, ...] = tuple(range(10)), examples: int = 600
) -> list[Line]:
    """Returns for each choice and digit the mean error of two seeds on new digits, their agreement and the time."""
    from captum_xnn.datasets import load_digits

    data = load_digits(seed=0)
    cnn = data.trained_network(seed=0)
    seen: list[Tensor] = []
    with torch.no_grad(), cnn.get_submodule("fc1").register_forward_hook(lambda *call: seen.append(call[2].relu())):
        y, new = cnn(data.train_images[:examples]), cnn(data.test_images)
    lines: list[Line] = []
    for digit in digits:
        whole: Line = {}
        for choice in choices:
            errors, seconds, made = [], [], []
            for seed in (0, 1):
                srae, begin = SRAE(seen[0].shape[1], 5, hidden=(choice.width, 100)), time.process_time()
                recipe = Recipe(batch_size=choice.batch_size, steps=choice.steps)
                positives = y.argmax(1) == digit
                fit_form(srae, seen[0], y[:, [digit]], positives=positives, recipe=recipe, seed=seed)
                seconds.append(time.process_time() - begin)
                made.append(encode_all(srae, seen[1]))
                y_bar = srae.head(made[-1])[:, 0].detach()
                errors.append(float((y_bar - new[:, digit]).abs().mean() / new[:, digit].std()))
            found = {"error": statistics.mean(errors), "seconds": statistics.median(seconds)}
            whole = whole or found
            lines.append(
                {"choice": "batches of {}, width {}, {} steps".format(*choice), "digit": digit}
                | found
                | {"error_ratio": found["error"] / whole["error"], "time_ratio": found["seconds"] / whole["seconds"]}
                | {"same": matched_features(*made).mean}
            )
    return lines


def main(given: argparse.Namespace) -> None:
    """Prints the figures."""
    if given.digits:
        print(table(on_digits(examples=given.examples), "choice", COLUMNS))
        return
    print(f"{given.examples} examples x {given.dimensions} dimensions, {torch.get_num_threads()} threads")
    made = fits(examples=given.examples, dimensions=given.dimensions, repeats=given.repeats)
    for name, speed in made.items():
        print(
            f"  {name:<18} {speed.seconds:5.2f} s of the processor ({speed.least:.2f} to {speed.most:.2f}, bar 1.5), "
            f"{speed.seconds / made['plain loop'].seconds:.2f} of the plain loop, "
            f"beside another {speed.beside:.2f} x (bar 2.5), alone {speed.waits:.2f} s on the clock for each"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--digits", action="store_true", help="compare batch sizes and widths instead")
    main(parser.parse_args())
