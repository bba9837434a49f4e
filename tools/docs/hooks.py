"""What mkdocs calls while it builds the site: adds pages of kernels, and to pages the drawn figures that they name.

A line ``<!-- figure: NAME -->`` in a page becomes the drawing NAME of ``tools/docs/drawings.py``, inline, so that its
colours follow the theme; ``<!-- include: NAME -->`` a text of the repository.
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # mkdocs loads this file by its path
    sys.path.insert(0, str(ROOT))

from tools.docs import commands, drawings, kernel_pages  # noqa: E402

_INCLUDE = re.compile(r"^<!-- include: ([\w.]+) -->$", re.MULTILINE)
_FIGURE = re.compile(r"^<!-- figure: (\w+) -->$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of kernels in the navigation, by subject."""
    assert config.nav is not None
    for section in config.nav:
        if "Kernels" in section:
            section["Kernels"] = ["kernels/index.md", *kernel_pages.navigation()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of kernels."""
    for name, text in kernel_pages.pages().items():
        files.append(File.generated(config, f"kernels/{name}.md", content=text))
    return files


# Where links of the repository's own texts lead on the site.
_LINKS = {"SECURITY.md": "security.md", "BENCHMARKS.md": "benchmarks.md", "CHANGELOG.md": "changelog.md"}


def _included(name: str, url: str) -> str:
    """A text of the repository, with its links as they are from the page; those to other files become plain text."""
    text = (ROOT / name).read_text(encoding="utf-8")
    up = "../" * url.count("/")

    def link(match: re.Match[str]) -> str:
        target = match[2]
        if target.startswith(("http", "#")):
            return match[0]
        if target.startswith("docs/"):
            return f"[{match[1]}]({up}{target.removeprefix('docs/')})"
        return f"[{match[1]}]({up}{_LINKS[target]})" if target in _LINKS else match[1]

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, text)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put in the drawings, the texts of the repository, and the help of the commands."""
    markdown = _INCLUDE.sub(lambda match: _included(match[1], page.file.src_uri), markdown)
    markdown = _FIGURE.sub(lambda match: drawings.DRAWINGS[match[1]](), markdown)
    return markdown.replace("<!-- commands -->", commands.text()) if "<!-- commands -->" in markdown else markdown


# The list of pages of a section: the theme names it by a label, which is empty if the section has a page of its own.
_SECTION = re.compile(
    r'aria-labelledby="__nav_\d+_label"([^>]*>\s*<label class="md-nav__title"[^>]*>\s*<span [^>]*></span>\s*)'
    r"([^<]*[^<\s])(?=\s*</label>)"
)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Mend the theme's HTML: a script from elsewhere, and parts without a name for screen readers.

    The script lets pages opened as files search; this site has its own copy.
    """
    up = "../" * page.file.dest_uri.count("/")
    output = output.replace("https://unpkg.com/iframe-worker/shim", f"{up}assets/iframe-worker.js")
    output = output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
    return _SECTION.sub(r'aria-label="\2"\1\2', output)
