"""The command line: `altgrad` with its commands, and what a sweep file calls.

Flags and configuration files say the same things as a `SweepSpec`; nothing is interpreted here that the spec
does not validate. Bad input ends with exit code 2 and one line that names the flag or path, the value, what
is allowed and the nearest match, before Ray starts and before any folder is touched. Exit code 1 means that
trials are left unfinished, or an answer could not be printed; an interrupt ends with 130, SIGTERM with 143, a terminal
that goes away with 129, all with what is recorded kept.

A command's file is imported when the command is called, and the flags of a sweep are defined where they are asked for:
`altgrad status` answers without loading torch.
"""

from __future__ import annotations

from altgrad import search_path  # isort: skip  (before anything that a file beside the program could hide)

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from altgrad.commands import output
from altgrad.commands.interrupts import Terminated
from altgrad.commands.sweep_file import check_started
from altgrad.sweep.complaints import SpecError, nearest, place_of
from altgrad.sweep.record.folder import FolderError
from altgrad.sweep.record.held import HeldError

if TYPE_CHECKING:
    from altgrad.sweep.space.spec import SweepSpec

os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")  # a sweep file's SweepSpec may be wrong: its line says how


def _wrong_values(error: BaseException) -> str | None:
    """A line on the values of a sweep file, where they are what is wrong."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    return place_of(error, program) if getattr(error, "title", None) == "SweepSpec" and program else None


search_path.EXPLAIN.append(_wrong_values)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, raised."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """The `altgrad` command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    return _answer(_parser(words), words)


def sweep_main(spec: SweepSpec, argv: Sequence[str] | None = None) -> int:
    """The command line of a sweep file: `spec` as it stands, changed by flags. Returns the exit code."""
    check_started()
    from altgrad.commands.flags import add_sweep_flags

    parser = Parser(description=f"Runs the sweep {spec.name!r}.", allow_abbrev=False)
    add_sweep_flags(parser)
    parser.set_defaults(handler="sweeps.run", base=spec, file=None)
    return _answer(parser, sys.argv[1:] if argv is None else list(argv))


def _answer(parser: Parser, argv: list[str]) -> int:
    """The exit code. A sweep goes on where its output is lost: what it is for is its folder."""
    os.environ["MPLBACKEND"] = "agg"  # matplotlib would end at its import of one that it does not know
    try:
        with output.guarded() as out:
            return _code(parser, argv, out)
    except output.LostError as error:
        # Of a reader that has left (head, less) nobody wants to hear.
        return 128 + signal.SIGPIPE if isinstance(error.cause, BrokenPipeError) else _complain(str(error), code=1)


def _code(parser: Parser, argv: list[str], out: output.Stream) -> int:
    try:
        if (line := search_path.hiding()) is not None:
            raise SpecError(line)
        _check_current_folder()
        request, unknown = parser.parse_known_args(argv)
        if unknown:
            raise SpecError(_unknown_argument(parser, request, unknown[0]))
        out.goes_on = request.handler == "sweeps.run" and not request.plan
        return handler_of(request.handler)(request)
    except FolderError as error:
        return _complain(f"--out: {error}")
    except (SpecError, HeldError) as error:
        return _complain(str(error))
    except KeyboardInterrupt as error:
        number, word = (error.number, "terminated") if isinstance(error, Terminated) else (signal.SIGINT, "interrupted")
        print(f"{word}; what is recorded stays, and the same command goes on from there", file=sys.stderr)
        return 128 + number


def _check_current_folder() -> None:
    try:
        Path.cwd()
    except OSError:
        raise SpecError("the current folder does not exist any more: go to another one") from None


def _complain(message: str, code: int = 2) -> int:
    if sys.stderr is not None:
        print(f"altgrad: {' '.join(message.split())}", file=sys.stderr)
    return code


def _unknown_argument(parser: Parser, request: argparse.Namespace, word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    known = sorted(
        f for action in getattr(request, "parser", parser)._actions for f in action.option_strings if f.startswith("--")
    )
    flag = word.split("=")[0]
    return f"unknown flag {flag}; allowed: {', '.join(known)}{nearest(flag, known)}"


def handler_of(place: str) -> Callable[[argparse.Namespace], int]:
    """The function that `file.name` in `altgrad.commands` stands for."""
    file, name = place.split(".")
    handler: Callable[[argparse.Namespace], int] = getattr(import_module(f"altgrad.commands.{file}"), name)
    return handler


def _parser(words: Sequence[str]) -> Parser:
    """The parser for a command line; the flags of a sweep are there where its first word asks for them."""
    parser = Parser(
        prog="altgrad", allow_abbrev=False, description="Which 8-bit floating-point format can a model be trained in?"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, handler: str, help: str) -> Parser:
        added: Parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(handler=handler, parser=added)
        return added

    asked = next(iter(words), None)
    for name, file, help in (
        ("plan", "YAML or JSON", "what a sweep would run, and what it leaves out and why"),
        ("run", "YAML or JSON", "run what a sweep's ledger lacks, then write its report"),
        ("submit", "YAML, JSON or Python", "run a sweep as a job of the Ray cluster whose dashboard is at --address"),
    ):
        added = command(name, "submit.submit" if name == "submit" else f"sweeps.{name}", help)
        if name == asked:
            _add_sweep(added, file)
    if asked == "submit":
        from altgrad.commands.submit import default_address

        commands.choices["submit"].set_defaults(address=default_address())
        commands.choices["submit"].add_argument(
            "--send",
            type=Path,
            action="append",
            default=[],
            metavar="PATH",
            help="a file or folder that the sweep needs there too, like a module that FILE.py imports; may be repeated",
        )
    command("status", "ledgers.status", "how far a sweep is").add_argument("out", type=Path, help="the sweep's folder")
    report = command("report", "reports.report", "write a sweep's report from its ledger, or from its W&B runs")
    report.add_argument("out", type=Path, nargs="?", help="the sweep's folder")
    report.add_argument(
        "--wandb", metavar="PROJECT|FOLDER", help="its runs: entity/project, or a folder of W&B's files"
    )
    report.add_argument("--group", metavar="NAME", help="with --wandb: the sweep, where there are several")
    report.add_argument(
        "--to", type=Path, metavar="DIR", help="where the report is written; default OUT/report, of W&B PROJECT-report"
    )
    compare = command("compare", "reports.compare", "what changed between two sweeps, cell by cell")
    compare.add_argument("out", type=Path, metavar="OUT1", help="a sweep's folder")
    compare.add_argument("other", type=Path, metavar="OUT2", help="another's")
    for added in (report, compare):
        added.add_argument("--margin", metavar="X", help="how far above BF16's loss a format still trains; .1 is 10 %%")
        added.add_argument("--equal-within", metavar="NATS", help="within which two gains count as equal")
    why = command("why", "ledgers.why", "why trials stopped")
    why.add_argument("out", type=Path, help="the sweep's folder")
    why.add_argument("trial", nargs="?", help="a trial's id, or how it begins")
    best = command("best", "specs.show_best", "the configuration that a sweep found best, by its mean over seeds")
    best.add_argument("out", type=Path, help="the sweep's folder")
    best.add_argument("--per", metavar="FIELDS", help="the best of each: format, arm, policy, or several by commas")
    best.add_argument("--export", type=Path, metavar="FILE", help="write it as a sweep of one, YAML or JSON")
    export = command("export", "transfer.export", "add what an export lacks of a sweep, as compact parquet files")
    export.add_argument("out", type=Path, metavar="OUT", help="the sweep's folder, also of one that is running")
    export.add_argument("folder", type=Path, metavar="DIR", help="the export's folder; what it holds stays as it is")
    export.add_argument(
        "--lean",
        action="store_true",
        help="signals at 8 checks, those of layers at the last, in 12 bits; losses of evaluations stay exact",
    )
    take = command("import", "transfer.import_", "make a sweep of an export, to go on with or to look at")
    take.add_argument("folder", type=Path, metavar="DIR", help="the export's folder")
    take.add_argument("out", type=Path, metavar="OUT", help="the sweep's folder: new, or of the same sweep")
    sync = command("wandb-sync", "mirror.wandb_sync", "make a sweep's W&B runs again from its trials' records")
    sync.add_argument("out", type=Path, help="the sweep's folder")
    sync.add_argument("--mode", dest="wandb", metavar="MODE", help="offline or online; default as for a sweep")
    command("schema", "specs.schema", "the JSON schema of a sweep's YAML or JSON file")
    formats = command("formats", "machine.formats", "the formats and their numbers")
    formats.add_argument("names", nargs="*", metavar="NAME", help="E4M3fnuz, binary8p3, INT8, float8_e4m3fn, …")
    matrix = command("test-matrix", "machine.test_matrix", "write TEST_MATRIX.md from the registries")
    matrix.add_argument("--check", action="store_true", help="write nothing; exit 1 where the file differs")
    command("doctor", "machine.doctor", "versions, kernels and cores of this machine")
    added = command("cluster", "cluster.cluster", "doctor, status, cost and gc of a GPU cluster on RunPod")
    added.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="doctor | status | cost | gc", help="and the cluster's YAML file"
    )
    return parser


def _add_sweep(parser: Parser, file: str) -> None:
    from altgrad.commands.flags import add_sweep_flags
    from altgrad.sweep.space.presets import PRESETS

    parser.add_argument("file", nargs="?", type=Path, help=f"a sweep as {file}")
    parser.set_defaults(base=PRESETS["quick"])
    add_sweep_flags(parser)
