"""The command line: `altgrad` with its commands, and what a sweep file calls.

Flags and configuration files say the same things as a `SweepSpec`; nothing is interpreted here that the spec
does not validate. Bad input ends with exit code 2 and one line that names the flag or path, the value, what
is allowed and the nearest match, before Ray starts and before any folder is touched. Exit code 1 means that
trials are left unfinished; an interrupt ends with 130, SIGTERM with 143, both with what is recorded kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from altgrad.commands import machine, mirror, specs, submit, sweeps
from altgrad.commands.cluster import add_cluster_command
from altgrad.commands.flags import add_sweep_flags
from altgrad.sweep.folder import FolderError
from altgrad.sweep.resolve import SpecError
from altgrad.sweep.spec import PRESETS, SweepSpec, nearest


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, raised."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """The `altgrad` command; returns the exit code."""
    return _answer(_parser(), sys.argv[1:] if argv is None else list(argv))


def sweep_main(spec: SweepSpec, argv: Sequence[str] | None = None) -> int:
    """The command line of a sweep file: `spec` as it stands, changed by flags. Returns the exit code."""
    parser = Parser(description=f"Runs the sweep {spec.name!r}.", allow_abbrev=False)
    add_sweep_flags(parser)
    parser.set_defaults(handler=sweeps.run, base=spec, file=None)
    return _answer(parser, sys.argv[1:] if argv is None else list(argv))


def _answer(parser: Parser, argv: list[str]) -> int:
    try:
        request, unknown = parser.parse_known_args(argv)
        if unknown:
            raise SpecError(_unknown_argument(parser, request, unknown[0]))
        code = int(request.handler(request))
        sys.stdout.flush()
        return code
    except FolderError as error:
        return _complain(f"--out: {error}")
    except SpecError as error:
        return _complain(str(error))
    except BrokenPipeError:
        # The reader (head, less) has left; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        word, code = ("terminated", 143) if isinstance(error, sweeps.Terminated) else ("interrupted", 130)
        print(f"{word}; what is recorded stays, and the same command goes on from there", file=sys.stderr)
        return code


def _complain(message: str) -> int:
    print(f"altgrad: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _unknown_argument(parser: Parser, request: argparse.Namespace, word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    known = sorted(f for action in getattr(request, "parser", parser)._actions for f in action.option_strings
                   if f.startswith("--"))
    flag = word.split("=")[0]
    return f"unknown flag {flag}; allowed: {', '.join(known)}{nearest(flag, known)}"


def _parser() -> Parser:
    parser = Parser(prog="altgrad", allow_abbrev=False,
                    description="Which 8-bit floating-point format can a model be trained in?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, handler: Any, help: str) -> Parser:
        added: Parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(handler=handler, parser=added)
        return added

    for name, handler, help in (("plan", sweeps.plan, "what a sweep would run, and what it leaves out and why"),
                                ("run", sweeps.run, "run what a sweep's ledger lacks, then write its report")):
        added = command(name, handler, help)
        added.add_argument("file", nargs="?", type=Path, help="a sweep as YAML or JSON")
        added.set_defaults(base=PRESETS["quick"])
        add_sweep_flags(added)
    added = command("submit", submit.submit, "run a sweep as a job of the Ray cluster whose dashboard is at --address")
    added.add_argument("file", nargs="?", type=Path, help="a sweep as YAML, JSON or Python")
    add_sweep_flags(added)
    added.set_defaults(base=PRESETS["quick"], address=submit.default_address())
    for name, handler, help in (("status", sweeps.status, "how far a sweep is"),
                                ("report", sweeps.report, "write a sweep's report from its ledger")):
        command(name, handler, help).add_argument("out", type=Path, help="the sweep's folder")
    why = command("why", sweeps.why, "why trials stopped")
    why.add_argument("out", type=Path, help="the sweep's folder")
    why.add_argument("trial", nargs="?", help="a trial's id, or how it begins")
    best = command("best", specs.show_best, "the configuration that a sweep found best, by its mean over seeds")
    best.add_argument("out", type=Path, help="the sweep's folder")
    best.add_argument("--export", type=Path, metavar="FILE", help="write it as a sweep of one, YAML or JSON")
    sync = command("wandb-sync", mirror.wandb_sync, "make a sweep's W&B runs again from its trials' records")
    sync.add_argument("out", type=Path, help="the sweep's folder")
    sync.add_argument("--mode", dest="wandb", metavar="MODE", help="offline or online; default as for a sweep")
    command("schema", specs.schema, "the JSON schema of a sweep's YAML or JSON file")
    command("formats", machine.formats, "the formats and their numbers")
    matrix = command("test-matrix", machine.test_matrix, "write TEST_MATRIX.md from the registries")
    matrix.add_argument("--check", action="store_true", help="write nothing; exit 1 where the file differs")
    command("doctor", machine.doctor, "versions, kernels and cores of this machine")
    add_cluster_command(command)
    return parser
