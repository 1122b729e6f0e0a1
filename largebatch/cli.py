"""The command line: ``largebatch COMMAND CONFIG`` (train, plan, noise, limit, bench, study), and ``largebatch inspect PATH``.

A user error is reported in one line on standard error with exit code 2. The exit code is 3 if a run diverged, 4 if a finished
run's last state could not be written, 5 if a rank was lost, 6 if a process that loads data or trains a run of a study was lost,
130 if a run was interrupted, and 75 ("try again", on which launchers requeue) if it was preempted or reached its time limit.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from largebatch.errors import LostRankError, LostWorkerError, UserError
from largebatch.process.launched import Place, hand_over, is_under_torchrun, launched_place, tell_begun
from largebatch.process.limits import OPEN_FILES_ADVICE, is_out_of_files
from largebatch.process.output import outlive_output, output_failure
from largebatch.process.surroundings import settle
from largebatch.section import displayable, user_path

if TYPE_CHECKING:
    from rich.console import Console

    from largebatch.config.schema import Config

EXIT_CODES = {
    "finished": 0,
    "damaged": 1,
    "diverged": 3,
    "unsaved": 4,
    "lost": 5,
    "lost worker": 6,
    "preempted": 75,
    "interrupted": 130,
}
# Commands whose result is in a folder; the result of the others is their output.
WITH_A_FOLDER = ("train", "noise", "study")


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise the error, which `main` prints in one line."""
        raise UserError(f"command line: {message}; see {self.prog} --help")


class Once(argparse.Action):
    """Stores a flag's value, and refuses a second one, because the first would be lost without notice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the value."""
        given = vars(namespace).setdefault("given", set())
        if self.dest in given:
            parser.error(f"{option_string} is there twice; leave one out")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def create_parser() -> Parser:
    """Return the parser of all arguments except ``--section.key VALUE``."""
    parser = Parser(
        prog="largebatch", description="Hyper-parameters tuned at a small batch, trained at any batch size."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    train = commands.add_parser("train", add_help=False, help="train a config, alone or under torchrun")
    noise = commands.add_parser("noise", add_help=False, help="train a config and say which batch size it bears")
    for command in (train, noise):
        command.add_argument("config", nargs="?", type=Path)
        command.add_argument("--out", action=Once, type=Path, help="run folder (default: runs/CONFIG-DATE-TIME)")
        command.add_argument(
            "--resume", action=Once, default="never", help="auto, never, or a checkpoint or run folder to continue from"
        )
    plan = commands.add_parser("plan", add_help=False, help="show what a config would do, without training")
    plan.add_argument("config", nargs="?", type=Path)
    plan.add_argument("--world-size", action=Once, type=int, default=1, help="ranks to plan for")
    bench = commands.add_parser("bench", add_help=False, help="time a config here, with and without tracked squares")
    bench.add_argument("config", nargs="?", type=Path)
    bench.add_argument(
        "--updates", action=Once, type=int, default=10, help="timed updates of each variant, three times over"
    )
    limit = commands.add_parser("limit", add_help=False, help="measure up to which batch size steps are stable")
    limit.add_argument("config", nargs="?", type=Path)
    limit.add_argument(
        "--checkpoint", action=Once, type=Path, help="a checkpoint, or a run folder for all of its checkpoints"
    )
    limit.add_argument("--samples", action=Once, type=int, default=1024, help="training samples to measure on")
    study = commands.add_parser("study", add_help=False, help="train a table of variants and seeds; compare them")
    study.add_argument("config", nargs="?", type=Path)
    study.add_argument(
        "--out", action=Once, type=Path, help="study folder (default: runs/CONFIG); finished runs in it are kept"
    )
    study.add_argument(
        "--jobs", action=Once, type=int, default=1, help="runs at a time, each with its share of the cores"
    )
    inspect = commands.add_parser(
        "inspect", help="show what is in a run folder or a checkpoint, and whether it is whole"
    )
    inspect.add_argument("path", type=Path)
    for command in (train, noise, plan, limit, bench, study):
        command.add_argument("-h", "--help", action="store_true", help="show this help, with the config's values")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    outlive_output()
    tell_begun()
    # Figures are written to files, and the backend that a notebook sets may not be installed here.
    os.environ["MPLBACKEND"] = "agg"
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = _main(arguments)
        _tell_of_lost_output(arguments[0])
        return code
    except UserError as error:
        place = _place_of(arguments)
        if not error.everywhere and place.rank > 0:
            print(f"largebatch: error: rank {place.rank}: {_one_line(error)}", file=sys.stderr)
        elif place.rank == 0 or place.local_rank == 0:  # under torchrun, one line per node
            print(f"largebatch: error: {_one_line(error)}", file=sys.stderr)
        return hand_over(2)
    except OSError as error:
        name = str(error.filename)
        if is_out_of_files(error):
            mistake = f"{_one_line(error)}; {OPEN_FILES_ADVICE}"
        elif error.errno == errno.ENAMETOOLONG:  # only a name causes it, whichever flag gave it
            mistake = f"{name[:80]}... of {len(name):,} characters is no name of a file: too long"
        else:
            raise
        print(f"largebatch: error: {mistake}", file=sys.stderr)
        return hand_over(2)
    except KeyboardInterrupt:
        return hand_over(EXIT_CODES["interrupted"])
    except LostWorkerError as error:
        place = _place_of(arguments)
        rank = f"rank {place.rank} stops: " if place.world_size > 1 else ""
        print(f"largebatch: error: {rank}{_one_line(error)}", file=sys.stderr)
        return hand_over(EXIT_CODES["lost worker"])
    except LostRankError as error:
        print(
            f"largebatch: error: rank {_place_of(arguments).rank} stops: {_one_line(error)}",
            file=sys.stderr,
            flush=True,
        )
        code = 2 if error.is_mistake else EXIT_CODES["lost"]
        os._exit(hand_over(code))  # threads that wait for the lost rank would keep the process alive


def _one_line(message: object) -> str:
    """Return a message in one line, with unprintable characters escaped."""
    return displayable(re.sub(r"\s*\n\s+", " ", str(message).strip()))  # an error's cause may span several lines


def _place_of(arguments: Sequence[str]) -> Place:
    """Return the position of this process among the ranks, to decide which of them prints an error."""
    if not arguments or arguments[0] not in ("train", "noise", "limit", "bench"):  # the others use one process
        return Place()
    try:
        return launched_place()
    except UserError:
        return Place()


def _tell_of_lost_output(command: str) -> None:
    """Report that standard output could not be written.

    Raises:
        UserError: if the output is the only result of the command.
    """
    failure = output_failure()
    if failure is None:
        return
    if command not in WITH_A_FOLDER:
        raise UserError(f"standard output cannot be written ({failure})")
    print(
        f"largebatch: warning: standard output could not be written ({failure}); the run's folder holds all that it has lost",
        file=sys.stderr,
    )


def _main(arguments: list[str]) -> int:
    with _told_to_others("".join(arguments[:1])):
        if "--out=" in arguments or any(pair == ("--out", "") for pair in itertools.pairwise(arguments)):
            raise UserError("command line: --out is empty; name a folder, or '.' for this one")
        known, rest = create_parser().parse_known_args(arguments)
    settle(getattr(known, "out", None))
    try:
        return _command(known, rest)
    except SystemExit as error:
        mistake = UserError(
            f"the code that the config names (model or data) exits (code {error.code}) where it should return or raise"
        )
        mistake.everywhere = False  # it may concern only one rank
        raise mistake from error


def _command(known: argparse.Namespace, rest: list[str]) -> int:
    if known.command == "inspect":
        return _inspect(known, rest)
    if known.help and (known.config is None or known.command == "study"):
        print(_usage(known.command))
        return 0
    if known.config is None:
        with _told_to_others(known.command):
            raise UserError(f"command line: name a config, like: largebatch {known.command} configs/digits.yaml")
    if known.command == "study":
        from largebatch.studies.study import run_study

        return run_study(known.config, known.out and user_path(known.out, "--out"), known.jobs, rest)

    with _told_to_others(known.command):
        from largebatch.config.file import load_config, parse_flags
        from largebatch.reporting.tables import create_console

        flags = parse_flags(rest)
        if known.command == "noise" and flags.setdefault("noise.measure", True) is not True:
            raise UserError("--noise.measure: noise is there to measure: leave the flag out, or use train")
        config, warnings = load_config(known.config, flags)
    console = create_console()
    if known.help:
        from largebatch.config.help import describe_settings

        print(_usage(known.command))
        console.print(describe_settings(config), highlight=False)
        return 0
    if known.command == "plan":
        from largebatch.planner.show import describe_plan, print_warnings

        if known.world_size < 1:
            raise UserError(f"--world-size: expected at least 1 rank, got {known.world_size}")
        print_warnings(console, warnings)
        describe_plan(config, known.world_size, console)
        return 0
    if known.command == "limit":
        from largebatch.studies.limit import measure_limit

        measure_limit(config, known.checkpoint, known.samples, console)
        return 0
    if known.command == "bench":
        from largebatch.studies.bench import bench

        bench(config, known.updates, console)
        return 0
    return _train(known, config, tuple(warnings), console)


def _inspect(known: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"command line: inspect takes one path, got '{rest[0]}' too")
    from largebatch.reporting.inspection import inspect
    from largebatch.reporting.tables import create_console

    return 0 if inspect(user_path(known.path, "inspect"), create_console()) else EXIT_CODES["damaged"]


def _train(known: argparse.Namespace, config: Config, warnings: tuple[str, ...], console: Console) -> int:
    with _told_to_others(known.command):
        from largebatch.training.resume import run_folder_of
        from largebatch.training.run import train
        from largebatch.training.run_folder import default_folder

        if known.out is None and known.resume == "auto":
            raise UserError("--resume: auto needs --out, the run folder to continue or to begin")
        is_default = known.out is None and known.resume == "never"
        if known.out is not None:
            folder = user_path(known.out, "--out")
        else:
            folder = default_folder(known.config.stem) if is_default else run_folder_of(known.resume)
    result = train(config, folder, console=console, warnings=warnings, resume=known.resume, may_rename=is_default)
    if known.command == "noise" and result.folder is not None:
        from largebatch.reporting.tables import print_noise

        print_noise(console, result.folder)
    if result.summary.message and result.folder is not None:
        print(f"largebatch: {result.summary.status}: {result.summary.message}", file=sys.stderr)
    is_over = result.summary.stopped_by == "time_limit" and is_under_torchrun()
    code = hand_over(EXIT_CODES[result.summary.status], is_final=is_over)
    return 0 if is_over else code  # torchrun would restart it; summary.json shows that it is not finished


def _told_to_others(command: str) -> AbstractContextManager[None]:
    """Return the context for the time before the ranks meet, which reports an error of this rank to the others."""
    place = _place_of([command]) if command in ("train", "noise") else Place()
    if place.world_size == 1:
        return nullcontext()
    from largebatch.distributed import Ranks, before_the_meeting

    return before_the_meeting(Ranks(place.rank, place.local_rank, place.world_size))


def _usage(command: str) -> str:
    """Return the lines that precede the settings in ``--help``."""
    own = {
        "train": "[--out DIR] [--resume auto|never|PATH] [--section.key VALUE ...]",
        "plan": "[--world-size N] [--section.key VALUE ...]",
    }
    own["noise"] = own["train"]
    own["limit"] = "[--checkpoint RUN|CHECKPOINT] [--samples N] [--section.key VALUE ...]"
    own["bench"] = "[--updates N] [--section.key VALUE ...]"
    own["study"] = "[--out DIR] [--jobs N] [--section.key VALUE ...]"
    lines = [
        f"usage: largebatch {command} CONFIG {own[command]}",
        "       --section.key VALUE sets a config key; values are YAML: 0.1, true, [128, 128]; a text is a text.",
    ]
    if command != "study":
        lines.append(f"       largebatch {command} CONFIG --help lists every key with its value in that config.")
    return "\n".join(lines)
