"""The help of every command of ``ruvllm``, as Markdown."""

import argparse
import os

from ruvllm.cli.parser import build_parser


def text() -> str:
    """A section for each command, with what ``ruvllm COMMAND --help`` prints."""
    os.environ["COLUMNS"] = "100"  # as wide as the page
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sections = []
    for name, command in commands.choices.items():
        sections += [f"## ruvllm {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(sections)
