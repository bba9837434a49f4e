"""`ruvllm cache`: packed weights that are kept, the size of everything in the cache, removing what is not needed."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from ruvllm.checkpoint.packed_cache import Kept, kept, least_used, limit, remove
from ruvllm.cli.show import show
from ruvllm.machine import size
from ruvllm.model.checks import parse_size
from ruvllm.paths import cache_directory


def cache(args: argparse.Namespace) -> None:
    """List the packed weights, tell how large the cache is, or remove some of them."""
    action = args.operands.pop(0) if args.operands else "list"
    if args.operands or action not in ("list", "size", "prune"):
        raise ValueError(f"expected list, size or prune, found {args.operands[0] if args.operands else action!r}")
    if action != "prune" and (args.all or args.to is not None):
        raise ValueError(f"--all, --to: only for prune, found {action}")
    {"list": _list, "size": _size, "prune": _prune}[action](args)


def _list(args: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("model", "weights", "size", "last used", "state"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "size" else "left")
    for file in kept():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used))
        table.add_row(file.model or file.path.name, file.weights, size(file.nbytes), used, file.fault or "ready")
    show(table)


def _size(args: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    root, most = cache_directory(), limit()
    rows = {"packed": f"packed weights, at most {size(most)}" if most else "packed weights, off"}
    rows |= {"kernels": "compiled kernels", "models": "models"}
    for name, what in rows.items():
        files = [entry for entry in (root / name).rglob("*") if entry.is_file()]
        table.add_row(what, str(root / name), f"{len(files)} files", size(sum(_bytes(file) for file in files)))
    show(table)


def _bytes(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except FileNotFoundError:  # removed meanwhile
        return 0


def _prune(args: argparse.Namespace) -> None:
    files = kept()
    chosen: list[Kept] = files if args.all else [file for file in files if file.fault]
    if args.to is not None and not args.all:
        rest = [file for file in files if not file.fault]
        chosen += least_used(rest, parse_size("--to", args.to))
    print(f"removed {len(chosen)} files, {size(remove(chosen))}")
