"""The commands below ``captum-xnn study``, in the order of a study."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands import what they need when they run
    from captum_xnn.study._prepared import PreparedStudy

__all__ = ["add_parsers"]


def add_parsers(commands: Any) -> None:
    """Add the command ``study`` with all its own commands.

    Args:
        commands: The sub-parsers of ``captum-xnn``.
    """
    study = commands.add_parser(
        "study",
        help="run a human study: prepare, serve, export, analyse",
        description="Runs a human study of explanations, from fitted explainers to figures and tests. Needs the extra "
        "study: pip install captum-xnn[study].",
    )
    steps = study.add_subparsers(dest="step", required=True, metavar="step")
    _add_demo(steps)
    _add_prepare(steps)
    _add_links(steps)
    _add_serve(steps)
    _add_static(steps)
    _add_export(steps)
    _add_analyse(steps)
    _add_simulate(steps)
    _add_withdraw(steps)


def _add_demo(steps: Any) -> None:
    parser = _step(steps, "demo", _demo, "try a study out on digits that are hard to tell")
    parser.add_argument("--out", default="xnn-study-demo", metavar="DIR", help="folder to write to (xnn-study-demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--no-serve", action="store_true", help="prepare only")
    _add_address(parser)


def _add_prepare(steps: Any) -> None:
    parser = _step(steps, "prepare", _prepare, "draw and render everything beforehand")
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file of the study")
    parser.add_argument("--out", metavar="DIR", help="folder of the prepared study, in place of the file's")


def _add_links(steps: Any) -> None:
    parser = _step(steps, "links", _links, "add participants and print the link of each")
    _add_folder(parser)
    parser.add_argument("--count", type=_positive, default=1, metavar="N", help="how many (1)")
    parser.add_argument("--address", default="http://127.0.0.1:8080", help="where the study is served")


def _add_serve(steps: Any) -> None:
    parser = _step(steps, "serve", _serve, "run the study until it is interrupted")
    _add_folder(parser)
    _add_address(parser)
    parser.add_argument(
        "--links", type=int, default=0, metavar="N", help="participants to add, whose links are printed"
    )


def _add_static(steps: Any) -> None:
    parser = _step(steps, "static", _static, "write the page as a folder for any web server")
    _add_folder(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--count", type=_positive, default=1, metavar="N", help="sessions to add (1)")
    parser.add_argument("--address", default=".", help="where the folder will be served, for the links")


def _add_export(steps: Any) -> None:
    parser = _step(steps, "export", _export, "write all answers as a Psych-DS folder")
    _add_folder(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--answers", nargs="+", default=[], metavar="PATH", help="files that participants of a static study sent"
    )


def _add_analyse(steps: Any) -> None:
    parser = _step(steps, "analyse", _analyse, "make figures, tests and one page of findings")
    parser.add_argument("export", metavar="EXPORT", help="folder that export wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling (0)")


def _add_simulate(steps: Any) -> None:
    parser = _step(steps, "simulate", _simulate, "let simulated participants take part, or plan how many you need")
    _add_folder(parser)
    parser.add_argument("--participants", type=_positive, default=30, metavar="N", help="how many (30)")
    parser.add_argument(
        "--behaviour", default="paper", choices=("random", "noisy", "perfect", "features", "paper"),
        help="how they answer; paper: with the paper's mean purities",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of their behaviour (0)")
    parser.add_argument(
        "--power", nargs=2, type=float, metavar=("PURITY", "PURITY"),
        help="without participants: print how often N people would show the difference of these mean purities",
    )  # fmt: skip


def _add_withdraw(steps: Any) -> None:
    parser = _step(steps, "withdraw", _withdraw, "delete everything of participants")
    _add_folder(parser)
    parser.add_argument("ids", nargs="+", metavar="CODE", help="as it stood at the foot of their page")


def _step(steps: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = steps.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    parser.set_defaults(run=run)
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="STUDY", help="folder that prepare wrote")


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (this machine only)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at, 0 for any (8080)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return value


def _demo(arguments: argparse.Namespace) -> str:
    import torch

    from captum_xnn.study._demo import make
    from captum_xnn.study._preparation import prepare

    torch.set_num_threads(1)  # the network is tiny: threads would wait for each other
    study = prepare(make(arguments.out, seed=arguments.seed, progress=True))
    if arguments.no_serve:
        return f"Prepared: {study.folder}"
    arguments.folder, arguments.links = str(study.folder), 1
    return _serve(arguments)


def _prepare(arguments: argparse.Namespace) -> str:
    from captum_xnn.study._configuration import StudyConfiguration
    from captum_xnn.study._preparation import prepare

    study = prepare(StudyConfiguration.read(arguments.config, {"out": arguments.out}))
    lines = [
        f"{d.name}: {len(d.batches)} batches of {len(d.batches[0])} images, {len(d.classes)} groups"
        for d in study.datasets.values()
    ]
    arms = ", ".join(f"{arm['name']} ({', '.join(arm['stages'])})" for arm in study.arms)
    return "\n".join([*lines, f"arms: {arms}", f"Prepared: {study.folder}"])


def _links(arguments: argparse.Namespace) -> str:
    from captum_xnn.study._prepared import PreparedStudy
    from captum_xnn.study._server import invite
    from captum_xnn.study._store import ANSWERS_FILE, StudyStore

    study = PreparedStudy.read(arguments.folder)
    with StudyStore(Path(arguments.folder) / ANSWERS_FILE) as store:
        tokens = invite(study, store, arguments.count)
    return "\n".join(f"{arguments.address.rstrip('/')}/s/{token}" for token in tokens)


def _serve(arguments: argparse.Namespace) -> str:
    from captum_xnn.study._server import serve

    def announce(address: str, links: list[str]) -> None:
        print(f"The study runs at {address}; Ctrl-C ends it.", flush=True)
        for link in links:
            print(f"Open this: {link}", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        serve(arguments.folder, host=arguments.host, port=arguments.port, links=arguments.links, announce=announce)
    return "The study has ended. All answers are in the folder."


def _static(arguments: argparse.Namespace) -> str:
    from captum_xnn.study._static import write_static

    links = write_static(arguments.folder, arguments.out, count=arguments.count, address=arguments.address)
    return "\n".join([*links, f"Written: {arguments.out}"])


def _export(arguments: argparse.Namespace) -> str:
    from captum_xnn.study._export import export, load_answers
    from captum_xnn.study._store import ANSWERS_FILE, StudyStore

    lines = []
    if arguments.answers:
        with StudyStore(Path(arguments.folder) / ANSWERS_FILE) as store:
            loaded, left_out = load_answers(store, arguments.answers)
        lines += [f"{loaded} files merged", *(f"left out: {told}" for told in left_out)]
    return "\n".join([*lines, f"Written: {export(arguments.folder, arguments.out)}"])


def _analyse(arguments: argparse.Namespace) -> str:
    from captum_xnn.study._findings import PAGE, write_findings

    results = write_findings(arguments.export, arguments.out, seed=arguments.seed)
    analysed = len(results.participants) - len(results.excluded)
    lines = [f"{analysed} participants analysed, {len(results.excluded)} left out"]
    for c in results.comparisons:
        where = f" ({', '.join(filter(None, (c.task if c.task != c.measure else '', c.dataset)))})"
        lines.append(
            f"{c.measure}{where}, {c.a} against {c.b}: {c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}], "
            f"corrected p {c.holm_p:.4f}"
        )
    return "\n".join([*lines, f"Open this: {Path(arguments.out) / PAGE}"])


def _simulate(arguments: argparse.Namespace) -> str:
    from captum_xnn.study._prepared import PreparedStudy
    from captum_xnn.study._simulation import BEHAVIOURS, paper_behaviour, simulate
    from captum_xnn.study._store import ANSWERS_FILE, StudyStore

    study = PreparedStudy.read(arguments.folder)
    if arguments.power:
        return _power(arguments, study)
    behaviour = paper_behaviour(study) if arguments.behaviour == "paper" else BEHAVIOURS[arguments.behaviour]
    with StudyStore(Path(arguments.folder) / ANSWERS_FILE) as store:
        simulate(study, store, behaviour, participants=arguments.participants, seed=arguments.seed)
    return (
        f"{arguments.participants} simulated participants took part. They are among the answers: use a copy of the "
        "study, not the one that people will use"
    )


def _power(arguments: argparse.Namespace, study: PreparedStudy) -> str:
    from captum_xnn.study._simulation import counts_of, expected_purity, power, skill_for

    counts = counts_of(next(iter(study.datasets.values())))
    low, high = sorted(arguments.power)
    least = expected_purity(0.0, counts)
    if not least <= low <= high <= 1:
        raise ValueError(
            f"mean purities are {low:g} and {high:g}; pass numbers from {least:.2f}, that of random groups, to 1"
        )
    skills = skill_for(low, counts), skill_for(high, counts)
    share = power(skills, counts, participants=arguments.participants, seed=arguments.seed)
    return f"{share:.0%} of simulated studies of {arguments.participants} people tell {low:g} from {high:g}"


def _withdraw(arguments: argparse.Namespace) -> str:
    from captum_xnn.study._prepared import PreparedStudy
    from captum_xnn.study._store import ANSWERS_FILE, StudyStore

    PreparedStudy.read(arguments.folder)
    lines = []
    with StudyStore(Path(arguments.folder) / ANSWERS_FILE) as store:
        for code in arguments.ids:
            gone = store.withdraw(code.strip().upper())
            lines.append(f"{code}: {'deleted' if gone else 'no such participant'}")
    return "\n".join([*lines, "Export anew, and delete earlier exports."])
