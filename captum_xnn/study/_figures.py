"""Draw the paper's Figures 4 and 5 for a study: boxplots of scores, histograms of confidence and of performance."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from captum_xnn.plots._colours import NEUTRAL, SINGLES, STAGES
from captum_xnn.study._analysis import Results

__all__ = ["box_statistics", "confidence_figure", "histogram", "performance_figure", "scores_figure", "svg"]


def called(condition: str) -> str:
    """Return the name of a condition in figures.

    Args:
        condition: A condition, such as ``single:DeepLift``.

    Example:
        >>> called("none"), called("single:DeepLift").split(), called("xnn")
        ('NoVis', ['1-Heatmap', '(DeepLift)'], 'XNN')
    """
    stage, _, heatmap = condition.partition(":")
    name = {"none": "NoVis", "single": "1-Heatmap", "xnn": "XNN"}[stage]
    return f"{name}\n({heatmap})" if heatmap else name


def _colours(conditions: Sequence[str]) -> dict[str, str]:
    singles = iter(SINGLES * len(conditions))
    return {c: next(singles) if c.startswith("single") else STAGES[c] for c in conditions}


def box_statistics(scores: Sequence[float]) -> dict[str, float]:
    """Compute the numbers of a box: quartiles, whiskers at the last points within 1.5 of their distance, and the mean.

    Args:
        scores: Scores, at least one.

    Example:
        >>> box_statistics([0.1, 0.5, 0.6, 0.7])["median"]
        0.55
    """
    x = np.asarray(scores, dtype=float)
    q1, median, q3 = (float(q) for q in np.quantile(x, (0.25, 0.5, 0.75)))
    inside = x[(x >= q1 - 1.5 * (q3 - q1) - 1e-12) & (x <= q3 + 1.5 * (q3 - q1) + 1e-12)]
    return {
        "n": len(x), "mean": float(x.mean()), "sd": float(x.std(ddof=1)) if len(x) > 1 else 0.0,
        "low": float(inside.min()), "q1": q1, "median": median, "q3": q3, "high": float(inside.max()),
    }  # fmt: skip


def scores_figure(results: Results, task: str = "sort") -> Figure:
    """Return Figure 4: a boxplot for each condition, one panel for each data set.

    Args:
        results: Results of a study.
        task: Task of the scores.
    """
    titles = {d["name"]: d["title"] for d in results.design["datasets"]}
    trials = [t for t in results.trials if t.task == task]
    datasets = [name for name in titles if any(t.dataset == name for t in trials)]
    conditions = results.conditions(task)
    colours = _colours(conditions)
    figure = Figure(figsize=(1.2 + (0.9 + 0.95 * len(conditions)) * len(datasets), 3.9), layout="constrained")
    axes = figure.subplots(1, len(datasets), squeeze=False, sharey=True)[0]
    generator = np.random.default_rng(0)
    for ax, dataset in zip(axes, datasets, strict=True):
        groups = [[t.score for t in trials if (t.dataset, t.condition) == (dataset, c)] for c in conditions]
        shown = [i for i, g in enumerate(groups) if g]
        boxes = ax.boxplot(
            [groups[i] for i in shown],
            positions=shown, widths=0.6, patch_artist=True, showmeans=True, showfliers=False,
            medianprops={"color": "black", "linewidth": 1.6},
            meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 6},
        )  # fmt: skip
        for box, i in zip(boxes["boxes"], shown, strict=True):
            box.set(facecolor=colours[conditions[i]], alpha=0.65)
        for i in shown:
            x = i + generator.uniform(-0.16, 0.16, len(groups[i]))
            ax.plot(x, groups[i], "o", color="black", alpha=0.3, markersize=3.2, markeredgewidth=0)
        chance = float(np.mean([t.chance for t in trials if t.dataset == dataset]))
        ax.axhline(chance, color=NEUTRAL, linestyle="--", linewidth=1, zorder=0)
        ax.annotate("chance", (len(conditions) - 0.5, chance), va="bottom", ha="right", fontsize=8, color=NEUTRAL)
        ax.set_xticks(range(len(conditions)), [called(c) for c in conditions])
        ax.set_xlim(-0.6, len(conditions) - 0.4)
        ax.set_title(titles[dataset].replace("$", r"\$"), fontsize=11)
        ax.grid(axis="y", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1.03)
    axes[0].set_ylabel("clustering purity" if task == "sort" else f"share right ({task})")
    return figure


def confidence_figure(results: Results, task: str = "sort") -> Figure:
    """Return Figure 5 (a, b): how confident people were in each condition, one panel for each data set.

    Args:
        results: Results of a study.
        task: Task of the ratings.
    """
    titles = {d["name"]: d["title"] for d in results.design["datasets"]}
    confidence = results.confidence[task]
    panels = {titles[name]: confidence[name] for name in titles if name in confidence}
    return _histograms(panels, results.design["scales"]["confidence"], "confidence")


def performance_figure(results: Results, task: str = "sort") -> Figure:
    """Return Figure 5 (c): how people rate the agents.

    Args:
        results: Results of a study.
        task: Task of the ratings.
    """
    panels = {"Performance of the agents": results.performance[task]}
    return _histograms(panels, results.design["scales"]["performance"], "rating")


def histogram(counts: Sequence[int]) -> list[float]:
    """Return counts as shares of their sum; zeros if the sum is 0.

    Args:
        counts: Count of each point of the scale.

    Example:
        >>> histogram([1, 3])
        [0.25, 0.75]
    """
    total = sum(counts)
    return [c / total if total else 0.0 for c in counts]


def _histograms(panels: Mapping[str, Mapping[str, Sequence[int]]], points: Sequence[str], what: str) -> Figure:
    conditions = list(dict.fromkeys(c for counts in panels.values() for c in counts))
    colours = _colours(conditions)
    figure = Figure(figsize=(0.8 + 5.6 * max(1, len(panels)), 3.9), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)[0]
    width = 0.8 / max(1, len(conditions))
    for ax, (title, counts) in zip(axes, panels.items(), strict=False):
        for i, condition in enumerate(conditions):
            if condition in counts:
                x = np.arange(len(points)) + (i - (len(conditions) - 1) / 2) * width
                shares = [100 * share for share in histogram(counts[condition])]
                ax.bar(x, shares, width, color=colours[condition], edgecolor="black", linewidth=0.4,
                       hatch="//" if condition.startswith("single") else None,
                       label=f"{called(condition)} (n = {sum(counts[condition])})".replace("\n", " "))  # fmt: skip
        ax.set_xticks(range(len(points)), [p.replace(" ", "\n") for p in points], fontsize=8)
        ax.set_title(title.replace("$", r"\$"), fontsize=11)
        ax.set_xlabel(what)
        ax.grid(axis="y", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if counts:
            ax.legend(
                fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=min(3, len(counts))
            )
    axes[0].set_ylabel("answers in %")
    return figure


def svg(figure: Figure) -> str:
    """Convert a figure to SVG text; equal figures give equal text.

    Args:
        figure: A figure.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "captum_xnn", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
