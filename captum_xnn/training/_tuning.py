r"""Choose settings and the number of x-features by cross-validation on the training set.

The data are split into folds, each with its share of positives. For each fold in turn, every combination of settings is
fitted without the fold and scored on it. The default score is F_reg. Lower scores are better.

F_reg can choose the number of x-features (:func:`choose_n`), the Lasso's alpha, steps and sizes of layers. It does not
measure distinct x-features or reconstruction. For ``beta`` and ``eta`` it therefore shows only the values at which
faithfulness begins to suffer. A choice of ``beta`` and ``eta`` by F_reg alone tends to the baseline NN. The paper does
not state the score of its cross-validation.

To tune :class:`~captum_xnn.XNNAttribution`, collect its layer's activations first::

    found = collect(model, "classifier.0", loader)
    y, given = found.y_hat[:, 46:47], found.y_hat.argmax(1) == 46
    tuned = tune(found.Z, y, grid={"n_features": [1, 2, 3, 5, 8]}, positives=given, checkpoint="tuning.jsonl")
    print(tuned.table())                                  # every combination, or tuned.curve("n_features")
    xnn = XNNAttribution(model, "classifier.0", choose_n(tuned)).fit(loader, target=46)

Conventions:
    M examples, D dimensions of Z, C outputs. A diverged fit has a score of NaN and counts as the worst.

Reference:
    Qi, Khorram, Li, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence, 2021, section 4.2:
    "tuned to the optimal parameters by cross-validation on the training set". The rule of one standard error: Hastie,
    Tibshirani, Friedman, "The Elements of Statistical Learning", 2009, section 7.10.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_xnn.layers._fingerprint import checksum
from captum_xnn.metrics._faithfulness import regression_faithfulness
from captum_xnn.models._base import Autoencoder, encode_all
from captum_xnn.models._srae import SRAE
from captum_xnn.models.baselines._selection import lasso
from captum_xnn.training._fitting import fit
from captum_xnn.training._recipe import Recipe
from captum_xnn.training._sampler import Sampler

__all__ = ["Trial", "Tuning", "choose_n", "held_out_f_reg", "tune", "tune_alpha"]

Score = Callable[[Autoencoder, Tensor, Tensor], float]


@dataclass(frozen=True)
class Trial:
    """One combination of settings with its scores."""

    settings: dict[str, Any]
    """Values of the settings by name."""
    scores: tuple[float, ...]
    """Score on each fold after learning from the others; lower is better."""

    @property
    def mean(self) -> float:
        """Mean score over the folds."""
        return math.fsum(self.scores) / len(self.scores)

    @property
    def std(self) -> float:
        """Standard deviation of the scores over the folds."""
        return math.sqrt(math.fsum((s - self.mean) ** 2 for s in self.scores) / (len(self.scores) - 1))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / math.sqrt(len(self.scores))


@dataclass(frozen=True)
class Tuning:
    """Result of a cross-validation."""

    trials: tuple[Trial, ...]
    """All combinations, in the order of the grid: the last setting changes fastest."""

    @property
    def best(self) -> Trial:
        """The combination with the lowest mean score; of several, the first.

        Raises:
            ValueError: If every combination has NaN among its scores.
        """
        measured = [t for t in self.trials if not math.isnan(t.mean)]
        if not measured:
            raise ValueError(
                f"all {len(self.trials)} combinations have a mean score of NaN; look for infinite values and NaN in "
                "the data, or lower the learning rate"
            )
        return min(measured, key=lambda t: t.mean)

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings of the best combination."""
        return self.best.settings

    def curve(self, name: str) -> list[tuple[Any, float, float]]:
        """List each value of one setting with mean and standard error at the best values of the other settings.

        Args:
            name: A setting of the grid.

        Raises:
            ValueError: If the setting is not in the grid.

        Example:
            >>> trials = [Trial({"n": n, "eta": eta}, (n + eta, n + eta)) for n in (3, 5) for eta in (0.0, 1.0)]
            >>> Tuning(tuple(trials)).curve("n")
            [(3, 3.0, 0.0), (5, 5.0, 0.0)]
        """
        if not all(name in t.settings for t in self.trials):
            raise ValueError(f"{name!r} is not in the grid; pass one of {[*self.trials[0].settings]}")
        points: list[tuple[Any, float, float]] = []
        for value in [t.settings[name] for t in self.trials]:
            if value not in [seen for seen, _, _ in points]:
                trials = [t for t in self.trials if t.settings[name] == value]
                best = min(trials, key=lambda t: math.inf if math.isnan(t.mean) else t.mean)
                points.append((value, best.mean, best.error))
        return points

    def table(self) -> str:
        """Format all combinations with mean and standard error as a Markdown table. The chosen one is bold.

        Example:
            >>> print(Tuning((Trial({"n": 3}, (2.0, 4.0)), Trial({"n": 5}, (1.0, 1.0)))).table())
            | n | mean | standard error |
            |---|---|---|
            | 3 | 3 | 1 |
            | **5** | **1** | **0** |
        """
        best, names = self.best, [*self.trials[0].settings, "mean", "standard error"]
        rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for t in self.trials:
            cells = [*map(str, t.settings.values()), f"{t.mean:.4g}", f"{t.error:.4g}"]
            rows.append(f"| {' | '.join(f'**{cell}**' if t is best else cell for cell in cells)} |")
        return "\n".join(rows)


def held_out_f_reg(xnn: Autoencoder, Z: Tensor, y: Tensor) -> float:
    """Compute F_reg of a fitted network on held-out data, in logits.

    Args:
        xnn: The network.
        Z: Activations (M, ...).
        y: Outputs (M, C).

    Example:
        >>> network = SRAE(4, 2)
        >>> Z = torch.rand(9, 4)
        >>> held_out_f_reg(network, Z, network(Z).y_bar.detach())
        0.0
    """
    with torch.no_grad():
        return regression_faithfulness(xnn.head(encode_all(xnn, Z)), y)


def tune(
    Z: Tensor,
    y: Tensor,
    *,
    grid: Mapping[str, Sequence[Any]],
    folds: int = 5,
    seed: int = 0,
    positives: Tensor | None = None,
    autoencoder: Callable[..., Autoencoder] = SRAE,
    recipe: Recipe | None = None,
    score: Score = held_out_f_reg,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Tuning:
    """Score all combinations of settings by cross-validation.

    Args:
        Z: Activations (M, D), or (M, channels, H, W) for the convolutional form.
        y: Outputs (M, C), in logits.
        grid: Values to try by name: a field of the recipe (``beta``, ``eta``, ``q``, ...), ``n_features``, or another
            argument of the network's constructor (``hidden``, ...). JSON must be able to hold the values.
        folds: Number of parts of the data, at least 2.
        seed: Seed of the split into folds, and of every fit.
        positives: Boolean (M,): the examples of the explained class, split evenly over the folds.
        autoencoder: Class of the network, or a partial of it, called with ``(shape of Z, n_features, n_outputs=...)``.
        recipe: Settings of the training that are not in the grid.
        score: Function of the fitted network and the held-out Z and y. Lower is better.
        progress: Whether to show a progress bar.
        checkpoint: File of JSON lines, one for each finished combination and fold. A run with the same data, seed,
            recipe and network reads finished scores from the file and resumes. It keeps the lines of other runs, so one
            file serves many targets. It repeats the fit of a line cut short by a crash.

    Raises:
        ValueError: If the grid is empty or names an unknown setting, if the shapes of Z, y and positives do not match,
            or if there are fewer examples than folds.

    Example:
        >>> Z = torch.rand(120, 6, generator=torch.Generator().manual_seed(0))
        >>> network = partial(SRAE, hidden=())
        >>> found = tune(Z, Z[:, :1] - Z[:, 1:2], grid={"n_features": [1, 2], "eta": [0.5, 1.0]}, folds=3,
        ...              autoencoder=network, recipe=Recipe(steps=60), progress=False)
        >>> len(found.trials), sorted(found.chosen), len(found.best.scores)
        (4, ['eta', 'n_features'], 3)
    """
    recipe = recipe or Recipe()
    of_recipe = {f.name for f in fields(Recipe)}
    _check_names(grid, of_recipe, autoencoder)

    def run(settings: dict[str, Any], learn: Tensor, test: Tensor) -> float:
        arguments = {k: v for k, v in settings.items() if k not in of_recipe}
        with torch.random.fork_rng(devices=[]):  # torch draws weights at construction; the fit draws its own
            xnn = autoencoder(tuple(Z.shape[1:]), arguments.pop("n_features", 5), n_outputs=y.shape[1], **arguments).to(
                Z
            )
        chosen = replace(recipe, **{k: v for k, v in settings.items() if k in of_recipe})
        marked = None if positives is None else positives.to(Z.device)[learn]
        fit(xnn, Z[learn], y[learn], positives=marked, recipe=chosen, seed=seed)
        return score(xnn, Z[test], y[test])

    about = [asdict(recipe), _described(autoencoder), _described(score)]
    return _cross_validated(run, Z, y, grid, folds, seed, positives, about, progress, checkpoint)


def tune_alpha(
    Z: Tensor,
    y: Tensor,
    *,
    alphas: Sequence[float],
    folds: int = 5,
    seed: int = 0,
    positives: Tensor | None = None,
    recipe: Recipe | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Tuning:
    """Compute F_reg of the Lasso for each alpha by cross-validation, for any number of selected dimensions of Z.

    Args:
        Z: Activations (M, D).
        y: Outputs (M, C), in logits.
        alphas: Values to try. The paper's are 2.5, 1.5, 0.5, 0.1 (Table .4) and 15, 10, 5, 2.5, 1, 0.1 (Table .6).
        folds: Number of parts of the data, at least 2.
        seed: Seed of the split into folds.
        positives: Boolean (M,): the examples of the explained class. They count for their share of the batches.
        recipe: Settings with this share.
        progress: Whether to show a progress bar.
        checkpoint: File of finished scores, as in :func:`tune`.

    Raises:
        ValueError: If there are no alphas, or fewer examples than folds.

    Example:
        >>> Z = torch.rand(100, 6, generator=torch.Generator().manual_seed(0))
        >>> found = tune_alpha(Z, Z[:, :1] - Z[:, 1:2], alphas=[0.1, 0.01, 0.001], progress=False)
        >>> found.chosen
        {'alpha': 0.001}
    """
    recipe = recipe or Recipe()
    flat = Z.flatten(1)

    def run(settings: dict[str, Any], learn: Tensor, test: Tensor) -> float:
        marked = None if positives is None else positives.to(Z.device)[learn]
        weight = Sampler(marked, len(learn), recipe, torch.Generator()).row_weight
        made = lasso(flat[learn], y[learn], settings["alpha"], weight=weight)
        return regression_faithfulness(flat[test] @ made.coefficients.T + made.intercept, y[test])

    about = [recipe.positive_share, "lasso"]
    return _cross_validated(run, Z, y, {"alpha": alphas}, folds, seed, positives, about, progress, checkpoint)


def choose_n(tuning: Tuning) -> int:
    """Choose the smallest sufficient number of x-features.

    It is the smallest n with a score, at the best other settings, within one standard error of the best score.

    Args:
        tuning: Result of :func:`tune` for a grid with ``n_features``.

    Raises:
        ValueError: If n_features is not in the grid, or if every combination has NaN among its scores.

    Example:
        >>> trials = {1: (4.0, 4.2), 2: (1.0, 1.6), 3: (1.1, 1.2), 4: (1.0, 1.2)}
        >>> choose_n(Tuning(tuple(Trial({"n_features": n}, scores) for n, scores in trials.items())))
        3
    """
    if not all("n_features" in t.settings for t in tuning.trials):
        raise ValueError(
            f"the grid has {[*tuning.trials[0].settings]}, but not n_features; pass "
            "grid={'n_features': [1, 2, ...]} to tune"
        )
    enough = tuning.best.mean + tuning.best.error
    return min(int(n) for n, mean, _ in tuning.curve("n_features") if mean <= enough)


def _check_names(grid: Mapping[str, Sequence[Any]], of_recipe: set[str], autoencoder: Callable[..., Any]) -> None:
    """Raise ValueError for a name that is a setting of neither the recipe nor the network."""
    taken = inspect.signature(autoencoder).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return
    of_network = {*taken} - {"shape", "n_outputs"}
    unknown = grid.keys() - of_recipe - of_network
    if unknown:
        raise ValueError(
            f"the grid has unknown settings {sorted(unknown)}; check the spelling: the recipe has {sorted(of_recipe)}, "
            f"the network {sorted(of_network)}"
        )


def _cross_validated(
    run: Callable[[dict[str, Any], Tensor, Tensor], float],
    Z: Tensor,
    y: Tensor,
    grid: Mapping[str, Sequence[Any]],
    folds: int,
    seed: int,
    positives: Tensor | None,
    about: list[Any],
    progress: bool,
    checkpoint: str | os.PathLike[str] | None,
) -> Tuning:
    """Run every combination on every fold, except for those whose scores are known."""
    _check(Z, y, grid, positives)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    fold = _folds(len(Z), folds, seed, positives)
    sums = [checksum(m) for m in (Z, y, fold, *(() if positives is None else (positives,)))]
    finished = _Scores(checkpoint, hashlib.blake2b(json.dumps([sums, seed, about]).encode(), digest_size=8).hexdigest())
    scores: list[list[float]] = [[] for _ in combinations]
    todo = [(i, k) for i in range(len(combinations)) for k in range(folds)]
    for i, k in tqdm(todo, "cross-validating", disable=not progress):
        score = finished.score(combinations[i], k)
        if score is None:
            rows = (fold != k).nonzero()[:, 0].to(Z.device), (fold == k).nonzero()[:, 0].to(Z.device)
            score = run(combinations[i], *rows)
            finished.add(combinations[i], k, score)
        scores[i].append(score)
    return Tuning(tuple(Trial(c, tuple(s)) for c, s in zip(combinations, scores, strict=True)))


def _check(Z: Tensor, y: Tensor, grid: Mapping[str, Sequence[Any]], positives: Tensor | None) -> None:
    """Raise ValueError where data, grid or positives have another shape."""
    for name, values in grid.items():
        if not isinstance(values, Sequence):
            raise ValueError(
                f"the grid needs a list of values for {name}, not {values!r}; pass [{values!r}] for a single value"
            )
    if y.dim() != 2 or Z.dim() < 2 or len(Z) != len(y):
        raise ValueError(
            f"Z has shape {tuple(Z.shape)} and y {tuple(y.shape)}, not (M, ...) and (M, C); pass "
            "y_hat[:, target:target + 1] for one output"
        )
    if positives is not None and (positives.dtype != torch.bool or positives.shape != (len(Z),)):
        raise ValueError(
            f"positives are {positives.dtype} of shape {tuple(positives.shape)}, not boolean of shape ({len(Z)},); "
            "pass y_hat.argmax(1) == target"
        )
    if not grid or not all(grid.values()):
        raise ValueError(f"the grid {dict(grid)} has no values; pass for example grid={{'n_features': [3, 5, 7]}}")


def _folds(rows: int, folds: int, seed: int, positives: Tensor | None) -> Tensor:
    """Assign every example to a fold, (M,): shuffle the positives, then the others, and deal them out in turn."""
    if not 2 <= folds <= rows:
        raise ValueError(f"{folds} folds do not fit {rows} examples; pass 2 to {rows} folds, 5 by default")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed), device="cpu")
    if positives is not None:
        order = order[(~positives.cpu()[order]).int().argsort(stable=True)]
    dealt = torch.empty(rows, dtype=torch.int64, device="cpu")
    dealt[order] = torch.arange(rows, device="cpu") % folds
    return dealt


def _described(form: Any) -> str:
    """Build a name of a class or function that is the same in every run."""
    if isinstance(form, partial):
        return f"{_described(form.func)}{form.args}{sorted(form.keywords.items())}"
    return f"{form.__module__}.{form.__qualname__}"


class _Scores:
    """Keep the scores of finished fits, in a file if a path is given."""

    def __init__(self, path: str | os.PathLike[str] | None, problem: str) -> None:
        self.path, self.problem = None if path is None else Path(path), problem
        self.done: dict[str, float] = {}
        for line in self.path.read_text().splitlines() if self.path and self.path.exists() else ():
            try:
                entry = json.loads(line)
                self.done[self._key(entry["problem"], entry["settings"], entry["fold"])] = float(entry["score"])
            except (KeyError, TypeError, ValueError):
                continue  # a line cut short by a crash: its fit runs again

    @staticmethod
    def _key(problem: str, settings: dict[str, Any], fold: int) -> str:
        return json.dumps([problem, settings, fold], sort_keys=True)

    def score(self, settings: dict[str, Any], fold: int) -> float | None:
        """Look up a finished score; None without one."""
        return self.done.get(self._key(self.problem, settings, fold))

    def add(self, settings: dict[str, Any], fold: int, score: float) -> None:
        """Append a score as a new line, even after a line cut short by a crash."""
        if not self.path:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"problem": self.problem, "settings": settings, "fold": fold, "score": score}
        with self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(entry).encode() + b"\n")
