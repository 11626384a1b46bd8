"""How long a fit of 600 examples x 64 dimensions takes, alone and beside another process on the same cores.

Printed for the default form and for the SRAE, at a layer of 64 dimensions of a small network:

- processor time of a fit, with the threads of the environment, as median of several fits in turns, with the range;
- time on the clock beside a process that multiplies matrices with as many threads, as ratio to the fit alone, in turns;
- time on the clock of the fit alone, as ratio to its processor time. It is 1 or less on a machine without other work.
  Where it is above 1, other work takes the same cores, and the second ratio comes out too small.

With --digits, batch sizes and widths of the SRAE's first layer are compared at the fully connected layer of a network
for MNIST's digits, 64 dimensions, fitted to 600 examples: mean |surrogate - output| on 1,000 new digits in standard
deviations of the output, and the mean correlation of matched x-features between two seeds.

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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captum_xnn import SRAE, Recipe, XNNAttribution
from captum_xnn.metrics import matched_features
from captum_xnn.models._base import encode_all
from captum_xnn.training._fitting import fit as fit_form

FORMS = {"groups (default)": None, "SRAE": SRAE}
BUSY = (
    "import torch; torch.set_num_threads({threads}); a = torch.rand({size}, {size})\nprint(flush=True)\nwhile 1: a @ a"
)


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


def timed(form: type[SRAE] | None, model: nn.Module, data: Tensor, steps: int) -> tuple[float, float]:
    """Returns seconds of the processor and on the clock that a fit takes."""
    recipe = None if form is None else Recipe(steps=steps)
    xnn = XNNAttribution(model, "1", n_features=5, autoencoder=form, recipe=recipe)
    with torch.no_grad():
        target = int(model(data).argmax(1).mode().values)
    begin, clock = time.process_time(), time.perf_counter()
    xnn.fit(data, target=target, progress=False)
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
    turns: list[list[list[tuple[float, float]]]] = []
    with competitor(torch.get_num_threads(), size) as other:
        for _ in range(repeats):
            turns.append([])
            for signalled in (signal.SIGSTOP, signal.SIGCONT):
                other.send_signal(signalled)
                turns[-1].append([timed(form, model, data, steps) for form in FORMS.values()])
    return {name: _speed([(alone[i], beside[i]) for alone, beside in turns]) for i, name in enumerate(FORMS)}


def _speed(turns: list[tuple[tuple[float, float], tuple[float, float]]]) -> Speed:
    """Returns the figures of one form from turns of (processor, clock) alone and beside another process."""
    processor = [alone[0] for alone, _ in turns]
    clock, beside = (statistics.median(of[i][1] for of in turns) for i in (0, 1))
    seconds = statistics.median(processor)
    return Speed(seconds, min(processor), max(processor), beside / clock, clock / seconds)


def on_digits(
    choices: tuple[tuple[int, int], ...] = ((64, 800), (128, 800), (128, 256)),
    digits: tuple[int, ...] = (1, 4, 8),
    steps: int = 600,
) -> list[str]:
    """Returns for each batch size and width a line of its error on new digits, its agreement of seeds and its time."""
    from captum_xnn.datasets import load_digits

    data = load_digits(seed=0)
    cnn = data.trained_network(seed=0)
    seen: list[Tensor] = []
    with torch.no_grad(), cnn.get_submodule("fc1").register_forward_hook(lambda *call: seen.append(call[2].relu())):
        y, new = cnn(data.train_images[:600]), cnn(data.test_images)
    lines = []
    for size, width in choices:
        errors, same, seconds = [], [], []
        for digit in digits:
            made = []
            for seed in (0, 1):
                srae, begin = SRAE(seen[0].shape[1], 5, hidden=(width, 100)), time.process_time()
                positives, recipe = y.argmax(1) == digit, Recipe(batch_size=size, steps=steps)
                fit_form(srae, seen[0], y[:, [digit]], positives=positives, recipe=recipe, seed=seed)
                seconds.append(time.process_time() - begin)
                made.append(encode_all(srae, seen[1]))
                y_bar = srae.head(made[-1])[:, 0].detach()
                errors.append(float((y_bar - new[:, digit]).abs().mean() / new[:, digit].std()))
            same.append(matched_features(*made).mean)
        lines.append(
            f"batches of {size}, width {width}: error {statistics.mean(errors):.4f}, same {statistics.mean(same):.4f}, "
            f"{statistics.median(seconds):.2f} s"
        )
    return lines


def main(given: argparse.Namespace) -> None:
    """Prints the figures."""
    if given.digits:
        print("\n".join(on_digits()))
        return
    print(f"{given.examples} examples x {given.dimensions} dimensions, {torch.get_num_threads()} threads")
    made = fits(examples=given.examples, dimensions=given.dimensions, repeats=given.repeats)
    for name, speed in made.items():
        print(
            f"  {name:<18} {speed.seconds:5.2f} s of the processor ({speed.least:.2f} to {speed.most:.2f}, bar 1.5), "
            f"beside another {speed.beside:.2f} x (bar 2.5), alone {speed.waits:.2f} s on the clock for each"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--digits", action="store_true", help="compare batch sizes and widths instead")
    main(parser.parse_args())
