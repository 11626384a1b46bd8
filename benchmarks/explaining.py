"""How many images are explained per second with five maps each, against the same work done by a loop over Captum.

A ResNet-50 of torchvision with random weights, 224 x 224 pixels, with x-features of a random encoder at its last
pooling layer. The default backend has no equal in Captum; of the others the loop calls Captum's own class on the whole
batch, for one x-feature after the other. Both take turns, and the medians are printed, with the peak of the GPU's
memory.

    python -m benchmarks.explaining
    python -m benchmarks.explaining --device cuda --batch 64

With --calls, `attribute` and `explain` of VGG16, ResNet-50 and ViT-B/16 are timed instead, by processor time on a CPU,
with groups of contributions and with an SRAE, against the parts that they cannot do without:

maps         the default backend, called on a network to the x-features that is at hand
integral     the path integral of groups, where the layer's output is known
rest         what `attribute` takes beyond both: it guards the model's state. For one image it is negative: `attribute`
             runs the modules up to the layer once, and the two parts on their own run them twice
ratio        `attribute` and `explain` over maps, and over maps and integral: median, lowest and highest of the turns

    python -m benchmarks.explaining --calls --models resnet50 --batches 1 8
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from captum.attr import Attribution, InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from benchmarks.backend_speed import K, composed
from benchmarks.excitation_speed import network
from captum_xnn import SRAE, XNNAttribution
from captum_xnn.explainer import Explainer
from captum_xnn.heatmaps import ExcitationMaps, FromCaptum, GradientMaps
from captum_xnn.heatmaps._network import ContributionNetwork, ExplanationNetwork
from captum_xnn.layers._reader import Reader
from captum_xnn.layers._trace import trace
from captum_xnn.models import ContributionGroups

METHODS: dict[str, tuple[type[Attribution], dict[str, int]]] = {
    "Saliency": (Saliency, {}),
    "InputXGradient": (InputXGradient, {}),
    "IntegratedGradients": (IntegratedGradients, {"n_steps": 8}),
}
LAYER = "avgpool"
LAYERS = {"vgg16": "classifier.4", "resnet50": "avgpool", "vit_b_16": "encoder.ln"}
FORMS = ("groups", "SRAE")


def rate(run: Callable[[], object], x: Tensor) -> float:
    """Returns images per second."""
    begin = time.perf_counter()
    run()
    if x.is_cuda:
        torch.cuda.synchronize()
    return len(x) / (time.perf_counter() - begin)


def jobs(net: ExplanationNetwork, x: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object] | None]]:
    """Returns by backend what draws all maps here, and in a loop over Captum."""
    default = ExcitationMaps()
    found: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
        "ExcitationBP": (lambda: default(net, (x,), range(K)), None)
    }
    for name, (method, settings) in METHODS.items():
        backend, captums = FromCaptum(method, **settings), method(net)

        def ours(backend: FromCaptum = backend) -> object:
            return backend(net, (x,), range(K), internal_batch_size=len(x))

        def loop(captums: Attribution = captums, settings: dict[str, int] = settings) -> object:
            return [captums.attribute(x, target=k, **settings) for k in range(K)]

        found[name] = ours, loop
    return found


def explainer(model: nn.Module, layer: str, x: Tensor, form: str) -> XNNAttribution:
    """Returns explainers of output 0 with random x-features. A fit would change no time of an explanation."""
    reader = Reader.of(model, layer)
    with torch.no_grad():
        Z, _ = reader.read((x[:2],))
    xnn = XNNAttribution(model, layer, K, autoencoder=SRAE if form == "SRAE" else None)
    made = _groups(Z) if form == "groups" else SRAE(tuple(Z.shape[1:]), K, hidden=(100,)).to(x.device)
    xnn.explainers_[reader.name, (0,)] = Explainer(reader.name, (0,), made, 0.0, 2, None)
    return xnn


def _groups(Z: Tensor) -> ContributionGroups:
    """Returns groups that divide the channels in turn, from the mean of two examples."""
    form = ContributionGroups(tuple(Z.shape[1:]), K).to(Z.device)
    form.base.copy_(form.mean_of([Z], len(Z)))
    D = len(form.groups)
    form.groups[torch.arange(D), torch.arange(D) % K] = 1.0
    return form


def calls(xnn: XNNAttribution, x: Tensor) -> dict[str, Callable[[], object]]:
    """Returns what is timed: both calls, and the parts that they cannot do without."""
    form, reader = xnn.explainer(0).form, Reader.of(xnn.model, xnn.layer)
    ran = trace(reader.model, reader.layer, (x[:1],), name=reader.name)
    gradients, networks = GradientMaps(), ExcitationMaps()
    found: dict[str, Callable[[], object]] = {
        "attribute": lambda: xnn.attribute(x, target=0),
        "explain": lambda: xnn.explain(x, target=0),
    }
    if not isinstance(form, ContributionGroups):
        network = ExplanationNetwork(reader.model, reader.layer, form, trace=ran)
        return found | {"maps": lambda: networks(network, (x,), range(K))}
    with torch.no_grad():
        Z, y = reader.read((x,))
    targets, own = [[0] * len(x)], y[None, :, 0]
    slopes = form.integral(reader.tail(), (x,), None, targets, predictions=own, Z=Z).slopes[0]
    groups = ContributionNetwork(form, reader.tail(), 0, trace=ran)
    found["maps"] = lambda: gradients(groups, (x,), range(K), additional_forward_args=(slopes,))
    found["integral"] = lambda: form.integral(reader.tail(), (x,), None, targets, predictions=own, Z=Z)
    return found


def seconds(run: Callable[[], object], x: Tensor) -> float:
    """Returns seconds, of the processor or of the GPU."""
    clock = time.perf_counter if x.is_cuda else time.process_time
    begin = clock()
    run()
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - begin


def parts(xnn: XNNAttribution, x: Tensor, repeats: int) -> str:
    """Returns a line with the times of `attribute` and `explain`, of their parts, and the ratios."""
    runs = calls(xnn, x)
    for run in [*runs.values(), runs["attribute"]]:  # later calls of attribute take fewer passes
        run()
    turns = [{name: seconds(run, x) for name, run in runs.items()} for _ in range(repeats)]
    median = {name: statistics.median(turn[name] for turn in turns) for name in runs}
    needed = median["maps"] + median.get("integral", 0.0)
    text = "  ".join(f"{name} {1000 * value:.0f}" for name, value in median.items())
    text += f"  rest {1000 * (median['attribute'] - needed):.0f} ms; "
    return text + ", ".join(f"{name} {ratios(turns, name)}" for name in ("attribute", "explain"))


def ratios(turns: list[dict[str, float]], name: str) -> str:
    """Returns the ratio of a call to its maps, and to all its parts: median, lowest and highest of the turns."""
    to_maps = [turn[name] / turn["maps"] for turn in turns]
    to_parts = [turn[name] / (turn["maps"] + turn.get("integral", 0.0)) for turn in turns]
    texts = [f"{statistics.median(some):.2f} ({min(some):.2f} to {max(some):.2f})" for some in (to_maps, to_parts)]
    return f"/ maps {texts[0]}, / (maps + integral) {texts[1]}"


def print_calls(models: list[str], batches: list[int], forms: list[str], device: str, repeats: int) -> None:
    """Prints what explaining takes beyond its maps."""
    for name in models:
        model = network(name)
        with torch.no_grad():  # the head of torchvision's new vision transformers gives zeros
            model.get_submodule(
                {"resnet50": "fc"}.get(name, "classifier.6" if name == "vgg16" else "heads.head")
            ).get_parameter("weight").normal_(0, 0.05)
        model = model.to(device)
        for form in forms:
            for batch in batches:
                x = torch.randn(max(batch, 2), 3, 224, 224, device=device)
                xnn = explainer(model, LAYERS[name], x, form)
                print(f"{name} {form} batch {batch}: {parts(xnn, x[:batch], repeats)}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", action="store_true", help="time attribute and explain against their parts")
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    if given.calls:
        print_calls(given.models, given.batches, given.forms, given.device, given.repeats)
        return
    warnings.simplefilter("ignore")  # Captum says of every gradient that it set requires_grad
    x = torch.randn(given.batch, 3, 224, 224)
    net = composed(network("resnet50"), LAYER, x).to(given.device)
    x = x.to(given.device)
    where = torch.cuda.get_device_name() if x.is_cuda else f"{torch.get_num_threads()} threads"
    print(f"batch {len(x)}, {K} maps each, {where}, medians of {given.repeats} turns, in images per second")
    for name, (ours, loop) in jobs(net, x).items():
        runs = [ours] if loop is None else [ours, loop]
        for run in runs:
            rate(run, x)
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        turns = [[rate(run, x) for run in runs] for _ in range(given.repeats)]
        here, *captum = (statistics.median(column) for column in zip(*turns, strict=True))
        text = f"  {name:<20} {here:8.2f}"
        if captum:
            ratio = statistics.median(a / b for a, b in turns)
            text += f"  loop over Captum {captum[0]:8.2f}  ratio {ratio:.2f}"
        if x.is_cuda:
            text += f"  peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
        print(text, flush=True)


if __name__ == "__main__":
    main()
