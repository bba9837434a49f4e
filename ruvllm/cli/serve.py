"""The command `serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from ruvllm.cli.parser import DEFAULT_MODEL, take_last, take_model
from ruvllm.cli.ranks import place
from ruvllm.cli.talk import context_of, load_model

API_KEY = "RUVLLM_API_KEY"  # environment variable, as a command line can be seen by others


def serve(args: argparse.Namespace) -> None:
    """Load a model and answer requests."""
    from ruvllm.model.checks import parse_size
    from ruvllm.serving.server import LOOPBACK
    from ruvllm.serving.server import serve as run
    from ruvllm.serving.settings import Settings

    model = take_model(args, DEFAULT_MODEL)
    if (operand := take_last(args)) is not None:
        raise ValueError(f"unexpected argument {operand!r}")
    if place()[1] > 1:
        raise ValueError("serve: runs one process; start it without mpiexec")
    key = args.api_key if args.api_key is not None else os.environ.get(API_KEY) or None
    local = args.host in LOOPBACK
    if not local and key is None:
        logging.getLogger("ruvllm").warning(
            "anyone who reaches %s can use this server: set --api-key or %s", args.host, API_KEY
        )
    memory = None if args.memory is None else parse_size("--memory", args.memory)
    llm = load_model(args, model)
    settings = Settings(
        name=args.alias or Path(model).name.removesuffix(".gguf") or model, context=context_of(llm, args), kv=args.kv,
        memory=memory, sequences=args.sequences, queue=args.queue, timeout=args.timeout, api_key=key, local_only=local,
    )  # fmt: skip
    run(llm, settings, args.host, args.port, lambda url: _tell(url, settings.name))


def _tell(url: str, name: str) -> None:
    print(f"{name} answers at {url}v1, and to a browser at {url}; Ctrl-C ends it", file=sys.stderr, flush=True)
