"""The paper's human study with simulated participants: do its means and its tests come out of the analysis?

Participants sort as in section 4.1 of the paper: two data sets of four classes, stages without maps, with one heatmap
and with x-features, ten images a batch. Each places an image rightly with a probability that gives the paper's mean
purity of the stage. Printed are the paper's means beside those that the analysis finds, and what the tests say. The
page of findings, with Figures 4 and 5, is written.

    python -m benchmarks.human_study --participants 30 --out DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from captum_xnn.study._prepared import PreparedStudy


def by_hand(folder: Path, *, classes: int = 4, **facts: Any) -> PreparedStudy:
    """Returns a prepared study without a model: two data sets, 5 batches of 10 images, contributions by class."""
    datasets, media = [], {}
    (folder / "media").mkdir(parents=True, exist_ok=True)
    pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
    arms = facts.get("arms") or [{"name": "one", "stages": ["none", "single", "xnn"], "task": "sort"}]
    for name in ("cub", "cel"):
        images, batches = [], []
        for b in range(5):
            ids = []
            for i in range(10):
                given = i % classes
                contributions = [3.0 if k == given else 0.1 * (i + 1) for k in range(classes)]
                images.append(
                    {
                        "id": f"{name}{b}{i}", "source": f"{b}{i}.png", "given": given, "contributions": contributions,
                        # The model is wrong about every fifth image.
                        "label": given if i % 5 else (given + 1) % classes,
                        "bias": 0.0, "surrogate": sum(contributions), "prediction": sum(contributions),
                    }
                )  # fmt: skip
                ids.append(images[-1]["id"])
            batches.append(ids)
            for arm in arms:
                for stage in arm["stages"]:
                    key = f"{name}/{b}/{stage}/{arm['task']}"
                    media[key] = f"m-{key.replace('/', '-').replace(':', '')}.json"
                    media[f"{name}/examples/{stage}/{arm['task']}"] = media[f"{name}/examples/none/{arm['task']}"] = (
                        "m-e.json"
                    )
                    shown = []
                    for image in images[-10:]:
                        total = sum(image["contributions"])
                        maps = (
                            [{"src": pixel, "c": c / total} for c in image["contributions"]] if stage == "xnn" else []
                        )
                        shown.append({"id": image["id"], "src": pixel, "pixels": False, "maps": maps})
                    (folder / "media" / media[key]).write_text(json.dumps({"images": shown}))
        datasets.append(
            {
                "name": name, "title": name.upper(), "classes": list(range(classes)), "images": images,
                "class_names": [f"class {c}" for c in range(classes)], "batches": batches, "examples": [],
            }
        )  # fmt: skip
    practice = [{"id": f"p{i}", "given": i % 3} for i in range(6)]
    (folder / "media" / "m-e.json").write_text('{"images": []}')
    media["practice"] = "m-e.json"
    made_facts = {
        "title": "By hand", "consent": ["Do."], "contact": "", "seed": 0, "none_first": True, "background": True,
        "practice": True, "attention": True, "arms": arms, "practice_batch": {"groups": 3, "images": practice},
        "exclusions": {
            "unfinished": True, "failed_attention": True, "min_practice_purity": 0.8, "min_trial_seconds": 0,
        },
        "datasets": datasets, "media": media,
    }  # fmt: skip
    study = PreparedStudy.of(folder, {**made_facts, **facts})
    study.write()
    return PreparedStudy.read(folder)


def main(participants: int, out: Path, seed: int = 0) -> None:
    """Prints the paper's means beside those of simulated participants, and writes the page of findings."""
    from captum_xnn.study._export import export
    from captum_xnn.study._findings import PAGE, write_findings
    from captum_xnn.study._simulation import PAPER, paper_behaviour, simulate
    from captum_xnn.study._store import ANSWERS_FILE, StudyStore

    shutil.rmtree(out / "study", ignore_errors=True)
    study = by_hand(out / "study", title="The paper's study, simulated")
    with StudyStore(study.folder / ANSWERS_FILE) as store:
        simulate(study, store, paper_behaviour(study), participants=participants, seed=seed)
    results = write_findings(export(study.folder, out / "export"), out / "findings")
    print(f"mean purity of {participants} simulated participants, with its standard error")
    for dataset, means in PAPER.items():
        for condition, mean in means.items():
            own = [t.score for t in results.trials if (t.dataset, t.condition) == (dataset, condition)]
            error = np.std(own, ddof=1) / np.sqrt(len(own))
            print(f"{dataset}  {condition:<6}  paper {mean:.3f}  found {np.mean(own):.3f} +- {error:.3f}")
    for c in results.comparisons:
        if c.measure == "purity" and c.a == "xnn":
            interval = f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]"
            print(f"{c.dataset}  xnn against {c.b:<6}  {interval}  p {c.holm_p:.4f}")
    print(f"Open this: {out / 'findings' / PAGE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--participants", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    main(**vars(parser.parse_args()))
