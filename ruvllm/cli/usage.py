"""The classes of the command line's grammar: a parser whose errors are one line, and its help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    commands: Mapping[str, Parser]  # of the whole command line's

    @property
    def options(self) -> list[str]:
        """The options that its help shows."""
        return re.findall(r"(?:^  |, )(--?[a-z][a-z0-9-]*)", self.format_help(), re.MULTILINE)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message} (see `{self.prog} --help`)")


class UsageError(SystemExit):
    """A command line that cannot be read; exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; option names in a column wide enough for most of them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)
