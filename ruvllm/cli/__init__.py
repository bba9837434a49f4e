"""The command line: `ruvllm COMMAND`, also `python -m ruvllm COMMAND`."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import os
import sys
import traceback

from ruvllm.cli import ranks
from ruvllm.cli.parser import parse, take_last
from ruvllm.cli.usage import UsageError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 after an error, 130 after Ctrl-C, 141 into a closed pipe.

    An error is one line on stderr; `--debug` shows its trace. Only what argparse answers itself (help, version, a
    command line it cannot read) raises SystemExit. Under mpiexec an error on one rank ends all with its code.
    """
    _print_what_can_be()
    rank, size = ranks.place()
    if rank:
        ranks.silence()
    try:
        args = parse(argv)
    except UsageError as error:
        line = f"ruvllm: error: {error}"
        sys.stderr.write(f"{line}\n")
        if size > 1:
            ranks.refuse(line)
        raise
    args.comm = None
    line = ""
    try:
        _show_log(getattr(args, "debug", False), quiet=getattr(args, "quiet", False))
        if size > 1 and args.command in ranks.COMMANDS:
            args.comm = ranks.connect()
            ranks.require_same(args)
        if args.comm is not None and ranks.splits_model(args) and rank:
            _follow(args)
        else:
            _COMMANDS[args.command](args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        line, code = "ruvllm: error: interrupted", 130
        print("\nruvllm: interrupted", file=sys.stderr)
    except BrokenPipeError:
        _drop_stdout()
        code = 141
    except Exception as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        line, code = f"ruvllm: error: {_one_line(error)}", 2
        sys.stderr.write(f"{line}\n")  # at once: print writes the line's end apart, which mpiexec may lose
    if args.comm is not None:
        ranks.end_all(args.comm, line, code)
    return code


def _print_what_can_be() -> None:
    """Print "?" for characters that stdout's encoding lacks, and the raw bytes of paths, so that no answer breaks off.

    Python's default raises an error in the middle of an answer. The user's choice (PYTHONIOENCODING) is kept.
    """

    def replace(error: UnicodeError) -> tuple[str | bytes, int]:
        try:
            return codecs.lookup_error("surrogateescape")(error)
        except UnicodeError:
            return codecs.lookup_error("replace")(error)

    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        codecs.register_error("ruvllm.replace", replace)
        sys.stdout.reconfigure(errors="ruvllm.replace")


class _Line(logging.Formatter):
    """`ruvllm: ...`, with the level unless it is INFO."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return f"ruvllm: {level}{record.getMessage()}"


def _show_log(debug: bool, quiet: bool) -> None:
    """Log to stderr: the library's info messages (not with --quiet), and all warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])
    logging.getLogger("ruvllm").setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    logging.getLogger("numba").setLevel(logging.WARNING)  # its debug log is pages of the compiler's


def _one_line(error: Exception) -> str:
    """The error on one line; an unexpected one with its type."""
    from ruvllm.errors import RuvllmError, printable

    if isinstance(error, RuvllmError | ValueError):
        text = str(error)
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (--debug shows where)"
    return printable(text.replace("\n", " "), limit=4096)


def _drop_stdout() -> None:
    """Let the interpreter's last flush of stdout go nowhere, so that it does not complain about the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _pull(args: argparse.Namespace) -> None:
    from ruvllm.checkpoint.hub import pull
    from ruvllm.cli.tables import show_known_models

    if not args.operands:
        show_known_models()
    for name in args.operands:
        print(pull(name, verify=args.verify))
        if args.pack:
            from ruvllm.loading import pack

            print(pack(name))


def _generate(args: argparse.Namespace) -> None:
    from ruvllm.cli.talk import generate

    generate(args)


def _chat(args: argparse.Namespace) -> None:
    from ruvllm.cli.talk import chat

    chat(args)


def _follow(args: argparse.Namespace) -> None:
    from ruvllm.cli.talk import follow

    follow(args)


def _serve(args: argparse.Namespace) -> None:
    from ruvllm.cli.serve import serve

    serve(args)


def _train(args: argparse.Namespace) -> None:
    from ruvllm.cli.train import train

    train(args)


def _perplexity(args: argparse.Namespace) -> None:
    from ruvllm.cli.talk import perplexity

    perplexity(args)


def _info(args: argparse.Namespace) -> None:
    from ruvllm.cli.tables import show_info

    model = take_last(args)
    if args.calibrate:
        from ruvllm.kernels.matmul.public import calibrate_blas

        calibrate_blas()
    if args.comm is None and (args.shares is not None or args.wire != "auto"):
        logging.getLogger("ruvllm").warning("--shares, --wire: ignored, as there is one rank")
    show_info(model, args.comm, args.shares, args.wire)


def _memory(args: argparse.Namespace) -> None:
    from ruvllm.cli.tables import show_memory

    show_memory(args.operands)


def _quantize(args: argparse.Namespace) -> None:
    if len(args.operands) != 2:
        raise ValueError(f"expected MODEL and OUT.gguf, found {len(args.operands)} arguments")
    from ruvllm.quantizing import quantize

    source, target = args.operands
    try:
        print(quantize(source, target, args.type, overwrite=args.force))
    except FileExistsError as error:
        raise FileExistsError(f"{error}; --force replaces it") from None


def _warmup(args: argparse.Namespace) -> None:
    if args.operands:
        raise ValueError(f"unexpected argument {args.operands[0]!r}")
    import ruvllm
    from ruvllm.kernels.jit.cache import kernel_cache_directory

    ruvllm.warmup(progress=True)
    directory = kernel_cache_directory()
    print("nothing was cached: there is no private cache directory" if directory is None else directory)


def _cache(args: argparse.Namespace) -> None:
    from ruvllm.cli.cache import cache

    cache(args)


def _explain(args: argparse.Namespace) -> None:
    from ruvllm.lab import explain

    name = take_last(args)
    if name is None:
        raise ValueError("which kernel? for example: ruvllm explain rms_norm")
    found = explain(name, target=args.target)
    print(f"{found}\n\n{found.annotated()}" if args.asm else found)


def _report(args: argparse.Namespace) -> None:
    from ruvllm.cli.report import report

    report(args)


_COMMANDS = {
    "pull": _pull,
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "perplexity": _perplexity,
    "train": _train,
    "info": _info,
    "memory": _memory,
    "quantize": _quantize,
    "warmup": _warmup,
    "cache": _cache,
    "explain": _explain,
    "report": _report,
}
