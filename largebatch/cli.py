"""The command line: ``largebatch train CONFIG``, ``largebatch plan CONFIG``, ``largebatch study CONFIG``.

A user's mistake is one line on standard error and exit code 2; a run that diverged ends with 3, an interrupted one with 130.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from largebatch.section import UserError

EXIT_CODES = {"finished": 0, "diverged": 3, "interrupted": 130}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise what `main` prints as one line."""
        raise UserError(f"command line: {message}; see {self.prog} --help")


def create_parser() -> Parser:
    """Return the parser of everything but ``--section.key VALUE``."""
    parser = Parser(
        prog="largebatch", description="Hyper-parameters tuned at a small batch, trained at any batch size."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    train = commands.add_parser("train", add_help=False, help="train a config, alone or under torchrun")
    train.add_argument("config", nargs="?", type=Path)
    train.add_argument("--out", type=Path, help="run folder (default: runs/CONFIG-DATE-TIME)")
    plan = commands.add_parser("plan", add_help=False, help="show what a config would do, without training")
    plan.add_argument("config", nargs="?", type=Path)
    plan.add_argument("--world-size", type=int, default=1, help="ranks to plan for")
    study = commands.add_parser("study", add_help=False, help="train a table of variants and seeds; compare them")
    study.add_argument("config", nargs="?", type=Path)
    study.add_argument("--out", type=Path, help="study folder (default: runs/CONFIG); finished runs in it are kept")
    study.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    for command in (train, plan, study):
        command.add_argument("-h", "--help", action="store_true", help="show this help, with the config's values")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    try:
        return _main(sys.argv[1:] if arguments is None else list(arguments))
    except UserError as error:
        rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        if not error.everywhere and rank != "0":
            print(f"largebatch: error: rank {rank}: {' '.join(str(error).split())}", file=sys.stderr)
        elif local_rank in ("0", ""):  # under torchrun, one line a node
            print(f"largebatch: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return EXIT_CODES["interrupted"]


def _main(arguments: list[str]) -> int:
    parser = create_parser()
    known, rest = parser.parse_known_args(arguments)
    if known.help and known.config is None:
        print(_usage(known.command))
        return 0
    if known.config is None:
        raise UserError(f"command line: name a config, like: largebatch {known.command} configs/digits.yaml")
    if known.help and known.command == "study":
        print(_usage(known.command))
        return 0
    if known.command == "study":
        from largebatch.study import run_study

        return run_study(known.config, known.out, known.jobs, rest)

    from largebatch.config_file import load_config, parse_flags
    from largebatch.help import describe_settings
    from largebatch.report import create_console

    run, warnings = load_config(known.config, parse_flags(rest))
    console = create_console()
    if known.help:
        print(_usage(known.command))
        console.print(describe_settings(run), highlight=False)
        return 0
    if known.command == "plan":
        from largebatch.run import describe_plan

        if known.world_size < 1:
            raise UserError(f"--world-size: expected at least 1 rank, got {known.world_size}")
        for warning in warnings:
            console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
        describe_plan(run, known.world_size, console)
        return 0

    from largebatch.run import default_folder, train

    folder = known.out or default_folder(known.config.stem)
    result = train(run, folder, console, warnings=tuple(warnings))
    if result.summary.message and result.folder is not None:
        print(f"largebatch: {result.summary.status}: {result.summary.message}", file=sys.stderr)
    return EXIT_CODES[result.summary.status]


def _usage(command: str) -> str:
    """Return the lines above the settings in ``--help``."""
    own = {"train": "[--out DIR] [--section.key VALUE ...]", "plan": "[--world-size N] [--section.key VALUE ...]"}
    own["study"] = "[--out DIR] [--jobs N] [--section.key VALUE ...]"
    lines = [
        f"usage: largebatch {command} CONFIG {own[command]}",
        "       --section.key VALUE sets a config key; values are YAML: 0.1, true, [128, 128].",
    ]
    if command != "study":
        lines.append(f"       largebatch {command} CONFIG --help lists every key with its value in that config.")
    return "\n".join(lines)
