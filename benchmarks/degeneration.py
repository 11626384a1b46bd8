"""Do the x-features stay several, faithful and distinct? On real birds, for the default recipe and for what was tried.

One-vs-all explainers of n = 5 x-features at CubNet's `relu6`: 50 positives (by label) and 80 % of the negatives to
train, the rest to test. Printed for each recipe, as mean over classes and seeds with the worst case behind the slash:

F_reg     mean |surrogate - prediction| in logits, training and test data, and the test ratio to NN, the same network
          trained for faithfulness alone on the same class
F_cls     share of test examples whose predicted class stays
eff       effective number of x-features on the positives: exp of the entropy of their mean absolute contribution
          shares; not a quality, as `balance` sets it
corr      mean absolute correlation between x-features on all data (dead x-features left out)
live      x-features that vary
least     smallest share of the mean absolute contributions on the positives: what the least of the x-features does
R2>.5     dimensions of Z (of 2,048) reconstructed with R2 above .5
same      mean correlation of matched x-features between two seeds, on test data

    python -m benchmarks.degeneration --root CUB_200_2011 --network FILE.py --layer relu6 --out DIR

Every fit is a line of OUT/results.jsonl; a run with the same OUT resumes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import birds
from benchmarks.birds import Birds
from benchmarks.one_vs_all import effective
from benchmarks.runs import Line, measured, settings, write
from captum_xnn import SRAE, PaperSRAE, Recipe
from captum_xnn.metrics import classification_faithfulness, regression_faithfulness
from captum_xnn.models._losses import (
    RunningMean,
    faithfulness,
    log_penalty,
    pull_away_of_moments,
    reconstruction_error,
    second_moments,
)
from captum_xnn.training._anchors import anchors
from captum_xnn.training._fitting import fit


class Fitted(NamedTuple):
    """What a recipe learned, as functions of raw Z."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    v: Tensor
    bias: Tensor


def by_recipe(recipe: Recipe, form: type[SRAE | PaperSRAE] = SRAE) -> Callable[..., Fitted]:
    """Returns a function that fits with the package's own training."""

    def run(Z: Tensor, y: Tensor, positives: Tensor, seed: int) -> Fitted:
        srae = form(Z.shape[1], 5)
        fit(srae, Z, y, positives=positives, recipe=recipe, seed=seed)
        return Fitted(srae.encode, srae.decoder, srae.head.weight[0], srae.head.bias[0])

    return run


def by_hand(
    *,
    relu: bool = False,
    centred: bool = True,
    start: str = "none",
    scale: str = "one",
    q: float = 1.0,
    beta: float = 1.0,
    eta: float = 1.0,
) -> Callable[..., Fitted]:
    """Returns a function that fits with the same budget and schedule, but the choices that were tried and left."""
    recipe = Recipe()

    def run(Z: Tensor, y: Tensor, positives: Tensor, seed: int) -> Fitted:
        generator = torch.Generator().manual_seed(seed)
        srae = SRAE(Z.shape[1], 5)
        srae.reset(generator)
        if relu:  # x-features that cannot be negative need weights of both signs
            with torch.no_grad():
                srae.head.weight.uniform_(-1, 1, generator=generator)
        mean, std = Z.mean(0), Z.std(0)
        std = std.clamp_min(std.mean() * 0.1) if scale == "each" else Z.var(0).mean().sqrt().expand_as(std)
        X, t = (Z - mean) / std, (y - y.mean()) / y.std()
        pools = positives.nonzero()[:, 0], (~positives).nonzero()[:, 0]
        batch = recipe.batch_for(len(Z))
        counts = batch // 4, batch - batch // 4
        share = [len(pool) / len(Z) for pool in pools]
        weight = torch.cat([torch.full((c,), s / c) for s, c in zip(share, counts, strict=True)])
        row_weight = torch.where(positives, 0.25 / share[0], 0.75 / share[1])
        anchored = anchors(X, t, 5, weight=row_weight, balance=recipe.balance) if start == "anchors" else None
        encode = (lambda x: srae.encode(x).relu()) if relu else srae.encode
        weights = [p for name, p in srae.named_parameters() if name.endswith("weight") and "head" not in name]
        others = [p for name, p in srae.named_parameters() if not name.endswith("weight") or "head" in name]
        groups = [{"params": weights, "weight_decay": srae.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, srae.learning_rate, fused=True)
        Q_mean, E_mean, G_mean = RunningMean(recipe.rho), RunningMean(recipe.rho), RunningMean(recipe.rho)
        for step in range(recipe.steps):
            done = step / recipe.steps
            rate = min(done / 0.05, 1) * 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.1) / 0.9))
            for group in optimiser.param_groups:
                group["lr"] = srae.learning_rate * max(rate, 1e-3)
            rows = torch.cat(
                [p[torch.randint(len(p), (c,), generator=generator)] for p, c in zip(pools, counts, strict=True)]
            )
            E = encode(X[rows])
            Q = reconstruction_error(srae.decoder(E), X[rows])
            middle = E_mean(weight @ E).detach() if centred else torch.zeros(5)
            pull = pull_away_of_moments(G_mean(second_moments(E - middle, weight=weight)))
            warm = start != "none" and done < 0.3
            loss = faithfulness(srae.head(E), t[rows])
            loss = loss + (Q.mean() if warm and start == "sae" else beta * log_penalty(Q_mean(Q), q))
            loss = loss + (0.0 if warm and start == "sae" else eta * pull)
            if anchored is not None:  # a rectified x-layer can follow an anchor on its positive side only
                loss = loss + max(0.0, min(1.0, 1 - (done - 0.3) / 0.1)) * ((E - anchored.E[rows]) ** 2).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            middle = torch.zeros(5) if relu else encode(X).mean(0)
            v, bias = srae.head.weight[0], srae.head.bias[0]
            return Fitted(
                lambda z: encode((z - mean) / std) - middle,
                lambda e: srae.decoder(e + middle) * std + mean,
                v * y.std(),
                (bias + v @ middle) * y.std() + y.mean(),
            )

    return run


RECIPES: dict[str, Callable[..., Fitted]] = {
    "default": by_recipe(Recipe()),
    "NN, faithfulness alone": by_recipe(Recipe(beta=0, eta=0, pretraining=0)),
    "Eq. 5 as printed": by_recipe(Recipe(), PaperSRAE),
    "ReLU, cosines": by_hand(relu=True, centred=False),
    "ReLU, correlations": by_hand(relu=True),
    "ReLU, correlations, SAE first": by_hand(relu=True, start="sae"),
    "ReLU, correlations, anchors": by_hand(relu=True, start="anchors"),
    "linear, cosines": by_hand(centred=False),
    "linear, correlations": by_hand(),
    "linear, correlations, SAE first": by_hand(start="sae"),
    "default, no weight decay": by_recipe(Recipe(weight_decay=0.0)),
    "default, twice the steps at a third of the rate": by_recipe(Recipe(steps=1200, learning_rate=1e-3)),
    "default, balance = 0": by_recipe(Recipe(balance=0.0)),
    "default, balance = 0.3": by_recipe(Recipe(balance=0.3)),
    "default, balance = 1": by_recipe(Recipe(balance=1.0)),
    "default, no anchors": by_recipe(Recipe(pretraining=0)),
    "default, a scale for each dimension": by_hand(start="anchors", scale="each"),
    "default, eta = 0": by_recipe(Recipe(eta=0.0)),
}


def mean_correlation(E: Tensor) -> float:
    """Returns the mean absolute correlation between x-features (M, n) that vary; 0 if fewer than two do."""
    E = E[:, E.std(0) > 1e-6]
    n = E.shape[1]
    return float((torch.corrcoef(E.T).abs().sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def agreement(a: Tensor, b: Tensor) -> float:
    """Returns the mean correlation of x-features (M, n) of two seeds under the best matching."""
    n = a.shape[1]
    table = torch.corrcoef(torch.cat([a, b], 1).T)[:n, n:].nan_to_num()
    return max(float(table[range(n), order].mean()) for order in map(list, itertools.permutations(range(n))))


@torch.no_grad()
def figures(fitted: Fitted, of: Birds, label: int, train: Tensor, test: Tensor) -> Line:
    """Returns the figures of one fit, and its contributions on the test data."""
    Z, y = of.Z, of.y_hat[:, label]
    E_train, E_test = fitted.encode(Z[train]), fitted.encode(Z[test])
    surrogate, new = E_train @ fitted.v + fitted.bias, E_test @ fitted.v + fitted.bias
    contributions = E_train[of.images.labels[train] == label] * fitted.v
    residual = fitted.decode(E_train) - Z[train]
    r2 = 1 - residual.var(0) / Z[train].var(0).clamp_min(1e-12)
    return {
        "train": regression_faithfulness(surrogate, y[train]),
        "test": regression_faithfulness(new, y[test]),
        "f_cls": classification_faithfulness(of.y_hat[test], new, label),
        "eff": effective(contributions),
        "least": float((size := contributions.abs().mean(0)).min() / size.sum()),
        "corr": mean_correlation(torch.cat([E_train, E_test])),
        "live": int((E_train.std(0) > 1e-6).sum()),
        "r2": int((r2 > 0.5).sum()),
        "contributions": [round(c, 2) for c in contributions.mean(0).tolist()],
        "E_test": (E_test * fitted.v).tolist(),
    }


def measure(of: Birds, job: Line) -> Line:
    """Returns the figures of one recipe on one class."""
    train, test, _ = birds.split(of.images.labels, job["class"])
    y_hat = of.y_hat[train]
    begin = time.perf_counter()
    fitted = RECIPES[job["recipe"]](
        of.Z[train], y_hat[:, job["class"] : job["class"] + 1], y_hat.argmax(1) == job["class"], job["seed"]
    )
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 1), **figures(fitted, of, job["class"], train, test)}


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the table of all recipes in the log, in markdown."""
    nn_test = {(line["class"], line["seed"]): line["test"] for line in lines if line["recipe"].startswith("NN")}
    out = [
        "| recipe | fits | F_reg train | test | x NN | F_cls | eff mean/min | least mean/min | corr mean/max | live "
        "| R2>.5 | same |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in RECIPES:
        of = [line for line in lines if line["recipe"] == name]
        if not of:
            continue
        column = {
            key: [line[key] for line in of] for key in ("train", "test", "f_cls", "eff", "least", "corr", "live", "r2")
        }
        mean = {key: sum(values) / len(values) for key, values in column.items()}
        fair = [nn_test[key] for line in of if (key := (line["class"], line["seed"])) in nn_test]
        ratio = f"{sum(column['test']) / sum(fair):.2f}" if len(fair) == len(of) else "-"
        pairs = [
            agreement(*(torch.tensor(line["E_test"]) for line in two))
            for label in {line["class"] for line in of}
            if len(two := [line for line in of if line["class"] == label][:2]) == 2
        ]
        same = f"{sum(pairs) / len(pairs):.2f}/{min(pairs):.2f}" if pairs else "-"
        out.append(
            f"| {name} | {len(of)} | {mean['train']:.3f} | {mean['test']:.3f} | {ratio} | {mean['f_cls']:.2%} "
            f"| {mean['eff']:.2f}/{min(column['eff']):.2f} | {mean['least']:.1%}/{min(column['least']):.1%} "
            f"| {mean['corr']:.3f}/{max(column['corr']):.3f} | {mean['live']:.1f} | {mean['r2']:.0f} | {same} |"
        )
    return "\n".join(out)


def main(given: argparse.Namespace) -> None:
    """Fits what OUT lacks and prints the table."""
    of = birds.read_options(given)
    chosen = birds.some_classes(of.images.labels, given.classes)
    jobs = [
        {"recipe": name, "class": label, "seed": seed}
        for name in RECIPES
        for label in chosen[: given.classes if name in list(RECIPES)[:2] else given.tried_classes]
        for seed in range(given.seeds if name in list(RECIPES)[:2] else given.tried_seeds)
    ]
    lines = measured(given.out, jobs, lambda job: measure(of, job), title="fits", under=settings(given))
    write(given.out, table(lines), {"fits": [{k: v for k, v in line.items() if k != "E_test"} for line in lines]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    birds.options(parser)
    parser.add_argument("--classes", type=int, default=10, help="for the default recipe and NN")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tried-classes", type=int, default=2, help="for the recipes that were tried")
    parser.add_argument("--tried-seeds", type=int, default=2)
    main(parser.parse_args())
