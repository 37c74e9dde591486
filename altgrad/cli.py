"""The command line: `altgrad` with its commands, and what a sweep file calls.

Flags and configuration files say the same things as a `SweepSpec`; nothing is interpreted here that the spec
does not validate. Bad input ends with exit code 2 and one line that names the flag or path, the value, what
is allowed and the nearest match, before Ray starts and before any folder is touched. Exit code 1 means that
trials are left unfinished; an interrupt ends with 130, SIGTERM with 143, both with what is recorded kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

from altgrad.cluster_commands import add_cluster_command
from altgrad.sweep import monitor
from altgrad.sweep.folder import (
    PACKAGES,
    FolderError,
    check_folder,
    check_ledger,
    cores,
    installed,
    is_disk_full,
)
from altgrad.sweep.monitor import print_table
from altgrad.sweep.options import Executor, RunOptions
from altgrad.sweep.resolve import SpecError, resolve
from altgrad.sweep.run import SweepResult, preflight, run_sweep
from altgrad.sweep.spec import PRESETS, SweepSpec, check_choice, nearest
from altgrad.training.config import MODELS
from altgrad.training.data import NAMED, Corpus, Documents

SPEC_FLAGS = {
    "formats": ("formats", "E5M2,E4M3 or all: the eight 8-bit splits, BF16 and FP16; FP32 is the reference"),
    "optimizers": ("optimizers", "adamw,manifold,grid or all"),
    "rung-clip": ("rung_clip", "1,3,10: rungs, for arms that have them"),
    "policies": ("policies", "uniform,attention_bf16,head_bf16,classic or all"),
    "lrs": ("lrs", "1e-3,3e-3: learning rates; left out: each arm's own"),
    "seeds": ("seeds", "paired replicates, at least 1"),
    "steps": ("steps", "training steps of a trial"),
    "task": ("task", "lm or classify"),
    "data": ("data.source", f"{', '.join(NAMED)}, or a text, JSONL, parquet or CSV file, a folder or a glob"),
    "label-field": ("data.label_field", "the field that holds the labels, for --task classify; default labels"),
    "tokenizer": ("data.tokenizer", "bytes, bpe, bpe-N, or for --task classify words, words-N"),
    "model": ("model", f"{', '.join(MODELS)}; left out: the preset's"),
    "scheduler": ("scheduler", "none, or asha: races learning rates within a cell"),
    "guards": ("guards", "on, off, or rules like 'flip_yield/min < 0.2 for 3 after 50; grad_norm is nonfinite'"),
}
ADDRESS = re.compile(r"local|auto|(?!ray://)[\w.\-\[\]:]+:\d+")


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: as an interrupt it unwinds everything in order."""


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
    _add_sweep_flags(parser)
    parser.set_defaults(handler=_run, base=spec, file=None)
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
        word, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        print(f"{word}; what is recorded stays, and the same command goes on from there", file=sys.stderr)
        return code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """While it lasts, SIGTERM interrupts the main thread and leaves as Terminated."""
    came = False

    def stop(number: int, frame: object) -> NoReturn:
        nonlocal came
        came = True
        raise Terminated
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        # Inside Ray's calls any exception of a signal handler comes out as a bare KeyboardInterrupt.
        if came:
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a path is expected")
    return Path(text)


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

    for name, handler, help in (("plan", _plan, "what a sweep would run, and what it leaves out and why"),
                                ("run", _run, "run what a sweep's ledger lacks, then write its report")):
        added = command(name, handler, help)
        added.add_argument("file", nargs="?", type=Path, help="a sweep as YAML or JSON")
        added.set_defaults(base=PRESETS["quick"])
        _add_sweep_flags(added)
    for name, handler, help in (("status", _status, "how far a sweep is"),
                                ("report", _report, "write a sweep's report from its ledger")):
        command(name, handler, help).add_argument("out", type=Path, help="the sweep's folder")
    why = command("why", _why, "why trials stopped")
    why.add_argument("out", type=Path, help="the sweep's folder")
    why.add_argument("trial", nargs="?", help="a trial's id, or how it begins")
    command("formats", _formats, "the formats and their numbers")
    matrix = command("test-matrix", _test_matrix, "write TEST_MATRIX.md from the registries")
    matrix.add_argument("--check", action="store_true", help="write nothing; exit 1 where the file differs")
    command("doctor", _doctor, "versions, kernels and cores of this machine")
    add_cluster_command(command)
    return parser


def _add_sweep_flags(parser: Parser) -> None:
    parser.add_argument("--preset", help=", ".join(PRESETS))
    parser.add_argument(
        "--config", type=_path, metavar="FILE", help="the same keys as YAML or JSON; flags win over it"
    )
    for flag, (key, help) in SPEC_FLAGS.items():
        parser.add_argument(f"--{flag}", dest=f"spec:{key}", metavar="X", help=help)
    parser.add_argument("--out", type=_path, help="the sweep's folder; default runs/<name>")
    parser.add_argument("--max-concurrent", metavar="N", help="trials at a time; default one per core")
    parser.add_argument("--executor", default="auto", help="auto, actor (one worker, reused) or train (Ray Train)")
    parser.add_argument("--workers-per-trial", default="1", metavar="N", help="data-parallel processes of a trial")
    parser.add_argument("--gpus-per-trial", default="0", metavar="F", help="GPUs of each worker; .25: four share one")
    parser.add_argument("--interval-timeout", default="900", metavar="S", help=(
        "seconds after which a log interval counts as hung, and its trial starts again; 0 for never"))
    parser.add_argument(
        "--address", default="local", help="local, auto, or the HOST:PORT of a Ray cluster's head"
    )
    parser.add_argument("--fresh", action="store_true", help="move an old sweep in OUT aside and start again")
    parser.add_argument("--plan", action="store_true", help="say what would run, and run nothing")


def _spec(request: argparse.Namespace) -> SweepSpec:
    if request.file is not None and request.config is not None:
        raise SpecError(f"{request.file} and --config {request.config}: one file, please")
    try:
        preset = None if request.preset is None else check_choice(request.preset, PRESETS, "preset")
    except ValueError as error:
        raise SpecError(f"--preset: {error}") from None
    flags = {name.removeprefix("spec:"): value for name, value in vars(request).items()
             if name.startswith("spec:") and value is not None}
    return resolve(PRESETS[preset] if preset else request.base, flags, request.file or request.config)


def _options(request: argparse.Namespace, spec: SweepSpec) -> RunOptions:
    if not ADDRESS.fullmatch(request.address):
        raise SpecError(
            f"--address: {request.address!r} is not allowed: local, auto, or the HOST:PORT of a head "
            f"(for ray:// submit the command as a job){nearest(request.address, ('local', 'auto'))}"
        )
    concurrent = request.max_concurrent
    try:
        options = RunOptions(
            out=request.out or Path("runs") / spec.name,
            address=request.address,
            fresh=request.fresh,
            max_concurrent=None if concurrent is None else _number_of("--max-concurrent", concurrent),
            executor=cast(Executor, check_choice(request.executor, get_args(Executor), "executor")),
            workers_per_trial=_number_of("--workers-per-trial", request.workers_per_trial),
            gpus_per_trial=_amount_of("--gpus-per-trial", request.gpus_per_trial),
            interval_timeout=_amount_of("--interval-timeout", request.interval_timeout),
        )
        options.check(spec.data.batch)
    except ValueError as error:
        text = str(error)
        raise SpecError(text if text.startswith("--") else f"--executor: {text}") from None
    return options


def _number_of(flag: str, text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise ValueError(f"{flag}: {text!r} is not allowed: a whole number, at least 1, is expected")
    return int(text)


def _amount_of(flag: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+", text):
        raise ValueError(f"{flag}: {text!r} is not allowed: a number, at least 0, is expected")
    return float(text)


def _checked_corpus(spec: SweepSpec, options: RunOptions, request: argparse.Namespace) -> Corpus | Documents:
    """The corpus, its notes printed; SpecError or FolderError, before a word is said, where a run can't be."""
    try:
        corpus = preflight(spec)
    except ValueError as error:
        path = Path(spec.data.source)
        is_missing = spec.data.source not in NAMED and not path.exists() and path.parent.is_dir()
        close = nearest(path.name, [*NAMED, *(item.name for item in path.parent.iterdir())]) if is_missing else ""
        file = request.file or request.config
        where = "--" if getattr(request, "spec:data.source") is not None or file is None else f"{file}: "
        raise SpecError(f"{where}{error}{close}") from None
    check_folder(options.out, fresh=options.fresh)
    for note in corpus.notes:
        print(f"data: {note}")
    return corpus


def _run(request: argparse.Namespace) -> int:
    if request.plan:
        return _plan(request)
    spec = _spec(request)
    options = _options(request, spec)
    _checked_corpus(spec, options, request)
    try:
        with _terminable():
            result = run_sweep(spec, options)
    except BrokenPipeError:
        raise
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"--address: {options.address!r}: no Ray cluster answers ({reason})") from None
    except Exception as error:  # Ray wraps what its callbacks raise in errors of its own
        if not is_disk_full(error):
            raise
        print(f"altgrad: the disk of {options.out} is full; what is recorded is whole, and the same command goes on "
              "from there", file=sys.stderr)  # fmt: skip
        return 1
    return _conclude(result)


def _conclude(result: SweepResult) -> int:
    from altgrad.analysis.report import write_report
    finding = write_report(result.out)
    print(finding.headline)
    print(finding.certainty)
    endings = ", ".join(f"{count} {name}" for name, count in result.endings.most_common())
    print(f"{result.trials} trials: {endings}" + ("" if result.ran else "; nothing was left to run"))
    print(f"report: {finding.path}")
    if result.broken is not None:
        print(f"altgrad: the sweep ended early, three trials failed alike: {result.broken}", file=sys.stderr)
    if result.left:
        print(f"altgrad: {result.left} trials are unfinished; altgrad why {result.out} says why, and the same "
              "command goes on", file=sys.stderr)
    return 1 if result.left else 0


def _plan(request: argparse.Namespace) -> int:
    spec = _spec(request)
    options = _options(request, spec)
    trials = spec.trials(_checked_corpus(spec, options, request).sha256)
    cells = Counter((config.format, config.arm, config.policy) for config in trials.values())
    print(f"{spec.name}: {len(trials)} trials of {spec.steps} steps in {len(cells)} cells, "
          f"{spec.seeds} seeds")
    rows = [(*cell, str(count)) for cell, count in cells.items()]
    print_table([("format", "arm", "policy", "trials"), *rows])
    for exclusion in spec.exclusions():
        print(f"left out: {exclusion.trials} trials by {exclusion.rule} ({exclusion.reason})")
    if not options.fresh and check_ledger(options.out / "ledger.sqlite"):
        with monitor.open_ledger(options.out) as ledger:
            print(f"{options.out} lacks {len(ledger.remaining(trials))} of them")
    return 0


def _status(request: argparse.Namespace) -> int:
    headline, counts = monitor.status(request.out)
    print(headline)
    print_table(counts)
    return 0


def _why(request: argparse.Namespace) -> int:
    table = monitor.why(request.out, request.trial)
    if table:
        print_table([monitor.WHY_COLUMNS, *table])
    else:
        print("no trial was stopped")
    return 0


def _report(request: argparse.Namespace) -> int:
    monitor.open_ledger(request.out).close()
    from altgrad.analysis.report import write_report
    finding = write_report(request.out)
    print(f"{finding.headline}\n{finding.certainty}\nreport: {finding.path}")
    return 0


def _formats(request: argparse.Namespace) -> int:
    from altgrad.quantization import FORMATS
    table: list[tuple[str, ...]] = [("format", "bits", "exponent", "mantissa", "bias", "max", "min normal",
                                     "min subnormal", "inf", "nan")]
    for name, fmt in FORMATS.items():
        whole = (fmt.total_bits, fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)
        real = (fmt.max, fmt.min_normal, fmt.min_subnormal)
        table.append((name, *map(str, whole), *map(_number, real), *map(_yes_no, (fmt.has_inf, fmt.has_nan))))
    print_table(table)
    return 0


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _test_matrix(request: argparse.Namespace) -> int:
    from altgrad.analysis.test_matrix import render
    path, text = Path("TEST_MATRIX.md"), render()
    if request.check:
        same = path.exists() and path.read_text() == text
        print(f"{path} is {'current' if same else 'not current: run altgrad test-matrix'}")
        return 0 if same else 1
    path.write_text(text)
    print(f"{path} written")
    return 0


def _doctor(request: argparse.Namespace) -> int:
    import platform

    import torch

    from altgrad.quantization.kernels.dispatch import kernel_report
    try:
        kernels = kernel_report()
    except (ValueError, ModuleNotFoundError) as error:
        raise SpecError(str(error)) from None
    versions = [(name, installed(name) or "missing") for name in PACKAGES]
    print_table(
        [
            ("python", platform.python_version()),
            *versions,
            ("cores", str(cores())),
            *kernels,
            ("cuda", _yes_no(torch.cuda.is_available())),
        ]
    )
    missing = [name for name, version in versions if version == "missing"]
    if missing:
        print(f"altgrad: missing: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0
