"""Export a study's answers as a Psych-DS folder: tidy CSV files, with every column described.

The folder::

    README.md                                         what is in the folder
    dataset_description.json                          name, description and every column (schema.org)
    materials/design.json                             arms, data sets, scales and the preregistered exclusions
    data/study-NAME_description-participants_data.csv one row for each participant who began
    data/study-NAME_description-trials_data.csv       one for each batch that somebody completed
    data/study-NAME_description-placements_data.csv   one for each image in it: the group or the choice
    data/study-NAME_description-ratings_data.csv      one for each rating: confidence, performance, difficulty, check
    data/study-NAME_description-events_data.csv       one for each move, toggle and look
    data/study-NAME_description-images_data.csv       one for each image: the model's answer and its explanation's sums
    data/study-NAME_description-contributions_data.csv one for each image and x-feature

Safety:
    A spreadsheet takes a text for a formula if it begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break. Such a
    text is written with an apostrophe before it. Ids for withdrawal are not exported: participants are numbered.

Reference:
    Psych-DS 1.0, https://psych-ds.github.io: folder, names of files and ``variableMeasured``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from captum_xnn._files import replace_file
from captum_xnn.metrics._purity import clustering_purity
from captum_xnn.study._prepared import PreparedStudy
from captum_xnn.study._protocol import ATTENTION, BACKGROUND, CONFIDENCE, DIFFICULTY, PERFORMANCE, RATINGS
from captum_xnn.study._store import ANSWERS_FILE, Participant, StudyStore, UnknownLinkError

__all__ = ["COLUMNS", "export", "guarded", "load_answers", "unguarded"]

_WHERE = {
    "participant": "Number of the participant, from 1, with a p before it",
    "arm": "Arm of the study that the participant was in",
    "part": "Place of the stage in the participant's order, from 1",
    "stage": "Visualisation: none, single (1-Heatmap) or xnn (a map for each x-feature)",
    "heatmap": "Backend of the 1-Heatmap where the stage names one",
    "task": "sort (into groups), agreement, distinction or prediction",
    "dataset": "Data set of the images",
    "batch": "Fixed batch of images, from 0",
}
COLUMNS: dict[str, dict[str, str]] = {
    "participants": {
        "participant": _WHERE["participant"],
        "arm": _WHERE["arm"],
        "cell": "Cell of the design: arm, order of stages and order of data sets",
        "stages": "Stages in the participant's order, separated by |",
        "datasets": "Data sets in the participant's order within each stage, separated by |",
        "day": "Day on which the participant began, UTC",
        "minutes": "Time that the participant looked at the pages, in minutes",
        "steps_done": "Steps that the participant completed",
        "steps": "Steps of the whole session",
        "finished": "1 if the participant came to the end, else 0",
        "attention": "1 if the attention check was answered as asked, 0 if not, empty without a check",
        "practice_purity": "Purity of the practice batch, in (0, 1]; empty without practice",
        **{name: f"{question} Empty where it was left out" for name, (question, _) in BACKGROUND.items()},
        "comments": "Free comments at the end; an apostrophe stands before texts that look like formulas",
    },
    "trials": {
        **_WHERE,
        "images": "Images in the batch",
        "groups": "Groups to sort into, or classes to choose among",
        "seconds": "Time that the participant looked at the batch, in seconds",
        "moves": "Moves of images into groups or back, or choices",
        "undone": "Moves that were undone",
        "toggles": "How often a map was shown on, or taken from, all images",
        "inspections": "How often an image was looked at for 0.4 seconds or longer",
        "comparisons": "How often selected images were compared side by side",
    },
    "placements": {
        **_WHERE,
        "position": "Place of the image in the batch as it was shown, from 1",
        "image": "Id of the image",
        "answer": "Group from 1 in sorting; in distinction and prediction the chosen class's place from 0; in "
        "agreement 0 (surely wrong) to 3 (surely right)",
        "given": "Output of the model with the highest value: the class that purity is measured against",
        "given_place": "Its place among the data set's classes, from 0",
        "label": "True class where it is known",
    },
    "ratings": {
        **{name: text for name, text in _WHERE.items() if name != "batch"},
        "question": "confidence, performance (of the stage's agent), difficulty or attention",
        "value": "Point of the scale, from 0; see the question's points in materials/design.json",
        "said": "The point's words",
    },
    "events": {
        "participant": _WHERE["participant"],
        "step": "Step of the session, from 0",
        "kind": "Kind of the step",
        "part": _WHERE["part"],
        "stage": _WHERE["stage"],
        "dataset": _WHERE["dataset"],
        "number": "Place of the event among the participant's, from 1",
        "seconds": "Time within the step while the page was seen, in seconds",
        "event": "open, move, undo, select, toggle, inspect, compare, choose, fill, hide (page put away) or show",
        "image": "Id of the image, where the event is about one",
        "value": "Group of a move, map of a toggle, choice, 1 or 0 of a selection, or what was filled in; "
        "empty for drafts of comments",
    },
    "images": {
        "dataset": _WHERE["dataset"],
        "image": "Id of the image",
        "source": "Name of the image's file",
        "batch": f"{_WHERE['batch']}; empty for examples",
        "given": "Output of the model with the highest value",
        "class": "Name of that output",
        "label": "True class where it is known",
        "prediction": "The model's value for its class, in logits",
        "surrogate": "What bias and contributions sum to, in logits",
        "bias": "What the average training example gives, in logits",
    },
    "contributions": {
        "image": "Id of the image",
        "feature": "Number of the x-feature on the page, from 1",
        "contribution": "v_i E_i for the class that the model gives, in logits",
        "share": "The value above the map: the contribution over the sum of all sizes, in [-1, 1]",
    },
}
"""Tables with their columns and what these mean."""

_README = """Answers of a human study of explanations, as a Psych-DS dataset.

- `dataset_description.json` describes every column of the CSV files in `data/`.
- `materials/design.json` holds the arms, the scales and the exclusions that were fixed beforehand.
- Texts that a spreadsheet would run as formulas carry an apostrophe.
- Comments are free text. Read them before you publish: somebody may have written their name.
"""

_FORMULA = re.compile(r"\s*[=+\-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}"
                      "\N{FULLWIDTH COMMERCIAL AT}]")  # fmt: skip
_TRIALS = ("sort", "agree", "distinguish", "predict")


def export(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, answers: Sequence[str | os.PathLike[str]] = ()
) -> Path:
    """Write everything that participants answered as a Psych-DS folder.

    Args:
        folder: The study.
        out: Folder to write; an earlier export in it is replaced.
        answers: Files, or folders of files, that participants of a static study downloaded; merged first.

    Raises:
        ValueError: If the study is missing.
    """
    study = PreparedStudy.read(folder)
    root = Path(out)
    (root / "data").mkdir(parents=True, exist_ok=True)
    (root / "materials").mkdir(exist_ok=True)
    with StudyStore(Path(folder) / ANSWERS_FILE) as store:
        if answers:
            load_answers(store, answers)
        tables = _tables(study, store)
        withdrawn = int(store.fact("withdrawn") or 0)
        invited = len(store.participants())
    slug = re.sub(r"[^a-z0-9]", "", study.facts["title"].lower())[:24] or "study"
    for old in (root / "data").glob("study-*_description-*_data.csv"):
        old.unlink()
    for table, rows in tables.items():
        replace_file(root / "data" / f"study-{slug}_description-{table}_data.csv", _csv(COLUMNS[table], rows))
    design = {
        "title": study.facts["title"],
        "seed": study.facts["seed"],
        "arms": study.facts["arms"],
        "none_first": study.facts["none_first"],
        "exclusions": study.facts["exclusions"],
        "backends": study.facts.get("backends", {}),
        "datasets": [
            {"name": d.name, "title": d.title, "classes": list(d.classes), "class_names": list(d.class_names),
             "batches": len(d.batches)}
            for d in study.datasets.values()
        ],
        "scales": {
            "confidence": CONFIDENCE, "performance": PERFORMANCE, "difficulty": DIFFICULTY, "agreement": RATINGS,
        },
        "attention": ATTENTION,
        "invited": invited,
        "withdrawn": withdrawn,
    }  # fmt: skip
    replace_file(root / "materials" / "design.json", json.dumps(design, indent=1, ensure_ascii=False).encode())
    replace_file(root / "README.md", _README.encode())
    replace_file(root / "dataset_description.json", json.dumps(_description(study), indent=1).encode())
    return root


def load_answers(store: StudyStore, paths: Iterable[str | os.PathLike[str]]) -> tuple[int, list[str]]:
    """Merge files that participants of a static study sent, and return how many were new and what was left out.

    Args:
        store: Database of the study, with its sessions.
        paths: Files, or folders of files.
    """
    loaded, left_out = 0, []
    for path in map(Path, paths):
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                found = json.loads(file.read_bytes())
                if not isinstance(found, Mapping) or found.get("captum_xnn") != "answers" or found.get("version") != 1:
                    raise ValueError("it holds no answers of a study")
                answers, events = found.get("answers"), found.get("events")
                if not isinstance(answers, list) or not isinstance(events, list):
                    raise ValueError("its answers are damaged")
                if not all(isinstance(answer, Mapping) for answer in answers):
                    raise ValueError("its answers are damaged")
                started = found.get("started")
                store.load(str(found.get("session")), answers, events, started if type(started) is int else 0)
                loaded += 1
            except (OSError, ValueError, UnknownLinkError, RecursionError) as error:
                left_out.append(f"{file.name}: {error}")
    return loaded, left_out


def guarded(text: str) -> str:
    """Return a text that a spreadsheet does not take for a formula.

    Args:
        text: Any text.

    Example:
        >>> guarded("=1+1"), guarded("fine"), guarded(" @x")
        ("'=1+1", 'fine', "' @x")
    """
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(text: str) -> str:
    """Return the text that :func:`guarded` was given.

    Args:
        text: From an exported table.

    Example:
        >>> unguarded("'=1+1"), unguarded("'twas"), unguarded("fine")
        ('=1+1', "'twas", 'fine')
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def _csv(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        assert set(row) <= set(columns), set(row) - set(columns)
        writer.writerow([_cell(row.get(name)) for name in columns])
    return buffer.getvalue().encode(errors="replace")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.9g}"
    text = str(value).replace("\r\n", "\n").replace("\0", "")
    return guarded(text) if isinstance(value, str) else text


def _tables(study: PreparedStudy, store: StudyStore) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in COLUMNS}
    for participant in store.participants():
        answers = store.answers(participant.id)
        events = store.events(participant.id)
        if not answers:
            continue
        _Rows(study, participant, answers, events).add_to(tables)
    for dataset in study.datasets.values():
        batch_of = {image: b for b, batch in enumerate(dataset.batches) for image in batch}
        for name, image in dataset.images.items():
            tables["images"].append(
                {
                    "dataset": dataset.name,
                    "image": name,
                    "batch": batch_of.get(name),
                    "class": dataset.class_names[dataset.classes.index(image["given"])],
                    **{key: image[key] for key in ("source", "given", "label", "prediction", "surrogate", "bias")},
                }
            )
            total = sum(map(abs, image["contributions"]))
            tables["contributions"] += [
                {"image": name, "feature": k + 1, "contribution": c, "share": c / total if total else 0.0}
                for k, c in enumerate(image["contributions"])
            ]
    return tables


class _Rows:
    """Rows of one participant in all tables."""

    def __init__(
        self,
        study: PreparedStudy,
        participant: Participant,
        answers: Mapping[int, Mapping[str, Any]],
        events: Sequence[Mapping[str, Any]],
    ) -> None:
        self.study, self.participant, self.answers, self.events = study, participant, answers, events
        self.name = f"p{participant.slot + 1:03d}"

    def add_to(self, tables: dict[str, list[dict[str, Any]]]) -> None:
        """Add the participant's rows to all tables."""
        tables["participants"].append(self._participant())
        for number, step in enumerate(self.participant.steps):
            answer = self.answers.get(number)
            here = self._where(step)
            if answer is not None and step["kind"] in _TRIALS:
                tables["trials"].append({**here, **self._trial(number, step, answer)})
                tables["placements"] += [{**here, **row} for row in self._placements(step, answer["data"])]
            if answer is not None and step["kind"] in ("confidence", "final"):
                tables["ratings"] += self._ratings(step, answer["data"], here)
        steps = self.participant.steps
        number = 0
        for event in self.events:
            step = steps[event["step"]] if event["step"] < len(steps) else {"kind": ""}
            for row in _event_rows(event):
                number += 1
                tables["events"].append(
                    {
                        "participant": self.name,
                        "step": event["step"],
                        "kind": step["kind"],
                        "part": step.get("part"),
                        "stage": step.get("stage", "").partition(":")[0],
                        "dataset": step.get("dataset"),
                        "number": number,
                        "seconds": event["at"] / 1000,
                        "event": event["kind"],
                        **row,
                    }
                )

    def _where(self, step: Mapping[str, Any]) -> dict[str, Any]:
        stage, _, heatmap = step.get("stage", "").partition(":")
        return {
            "participant": self.name,
            "arm": self.participant.plan["arm"],
            "part": step.get("part"),
            "stage": stage,
            "heatmap": heatmap,
            "task": step.get("task"),
            "dataset": step.get("dataset"),
            "batch": step.get("batch"),
        }

    def _participant(self) -> dict[str, Any]:
        plan, answers = self.participant.plan, self.answers
        by_kind = {step["kind"]: answers[i]["data"] for i, step in enumerate(plan["steps"]) if i in answers}
        attention = [
            answers[i]["data"]["attention"] == ATTENTION
            for i, step in enumerate(plan["steps"])
            if i in answers and step.get("attention")
        ]
        return {
            "participant": self.name,
            "arm": plan["arm"],
            "cell": plan["cell"],
            "stages": "|".join(plan["stages"]),
            "datasets": "|".join(plan["datasets"]),
            "day": time.strftime("%Y-%m-%d", time.gmtime(min(a["saved"] for a in answers.values()) / 1000)),
            "minutes": sum(a["at"] for a in answers.values()) / 60000,
            "steps_done": len(answers),
            "steps": len(plan["steps"]),
            "finished": self.participant.finished is not None,
            "attention": all(attention) if attention else None,
            "practice_purity": self._practice(by_kind.get("practice")),
            **by_kind.get("background", {}),
            "comments": by_kind.get("final", {}).get("comments"),
        }

    def _practice(self, data: Mapping[str, Any] | None) -> float | None:
        if data is None:
            return None
        kinds = {image["id"]: image["given"] for image in self.study.facts["practice_batch"]["images"]}
        groups = data["groups"]
        return clustering_purity([groups[i] for i in groups], [kinds[i] for i in groups])

    def _trial(self, number: int, step: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
        kinds = [event["kind"] for event in self.events if event["step"] == number]
        return {
            "images": len(step["order"]),
            "groups": step["groups"],
            "seconds": answer["at"] / 1000,
            "moves": kinds.count("move") + kinds.count("choose"),
            "undone": kinds.count("undo"),
            "toggles": kinds.count("toggle"),
            "inspections": kinds.count("inspect"),
            "comparisons": kinds.count("compare"),
        }

    def _placements(self, step: Mapping[str, Any], data: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        dataset = self.study.datasets[step["dataset"]]
        answers = data.get("groups", data.get("choices", {}))
        for position, image in enumerate(step["order"]):
            facts = dataset.images[image]
            yield {
                "position": position + 1,
                "image": image,
                "answer": answers[image],
                "given": facts["given"],
                "given_place": dataset.classes.index(facts["given"]),
                "label": facts["label"],
            }

    def _ratings(
        self, step: Mapping[str, Any], data: Mapping[str, Any], here: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        where = {name: here[name] for name in COLUMNS["ratings"] if name in here}
        if step["kind"] == "confidence":
            rows = [
                {**where, "dataset": d, "question": "confidence", "value": v, "said": CONFIDENCE[v]}
                for d, v in data["confidence"].items()
            ]
            if "attention" in data:
                v = data["attention"]
                rows.append({**where, "question": "attention", "value": v, "said": CONFIDENCE[v]})
            return rows
        rows = []
        for agent, v in data["agents"].items():
            stage, _, heatmap = agent.partition(":")
            rows.append(
                {**where, "stage": stage, "heatmap": heatmap, "question": "performance", "value": v,
                 "said": PERFORMANCE[v]}
            )  # fmt: skip
        v = data["difficulty"]
        return [*rows, {**where, "question": "difficulty", "value": v, "said": str(v)}]


def _event_rows(event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each image of an event; one row if the event has no image. Pages may send data of any kind."""
    data = event["data"] if isinstance(event["data"], Mapping) else {}
    to = data.get("to")
    if event["kind"] in ("move", "undo") and isinstance(to, list):
        pairs = [pair for pair in to if isinstance(pair, list) and len(pair) == 2]
        return [{"image": _plain(image), "value": _plain(group)} for image, group in pairs] or [{}]
    if event["kind"] == "compare" and isinstance(data.get("images"), list):
        return [{"image": _plain(image)} for image in data["images"]] or [{}]
    if event["kind"] == "fill" and data.get("name") == "comments":
        return [{}]  # drafts may hold text that a participant took back
    value = next((data[name] for name in ("value", "on", "map") if data.get(name) is not None), None)
    return [{"image": _plain(data.get("image")), "value": _plain(value)}]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _description(study: PreparedStudy) -> dict[str, Any]:
    """Make the description that Psych-DS requires."""
    measured: dict[str, dict[str, Any]] = {}
    for table, columns in COLUMNS.items():
        for name, text in columns.items():
            if name in measured and text not in measured[name]["description"]:
                measured[name]["description"] += f"; in {table}: {text}"
            measured.setdefault(name, {"@type": "PropertyValue", "name": name, "description": text})
    for name, unit in (("minutes", "minute"), ("seconds", "second"), ("prediction", "logit"), ("surrogate", "logit"),
                       ("bias", "logit"), ("contribution", "logit")):  # fmt: skip
        measured[name]["unitText"] = unit
    return {
        "@context": "https://schema.org/",
        "@type": "Dataset",
        "name": study.facts["title"],
        "description": "Answers of a human study of explanations: people sort images with and without heatmaps. One "
        "CSV file for each kind of row in data/; the design is in materials/design.json.",
        "schemaVersion": "Psych-DS 1.0",
        "keywords": ["explainable AI", "human study", "x-features"],
        "variableMeasured": list(measured.values()),
    }
