"""A MkDocs hook: what stands in the repository's own pages is shown on the site, not written twice.

A line that is nothing but a link out of `docs`, such as `[Limits](../README.md#limits)`, becomes that page, or
that section of it, without its heading.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
_LINE = re.compile(r"^\[[^\]]+\]\(\.\./([\w./-]+\.md)(?:#([\w-]+))?\)$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    return _LINE.sub(lambda found: section(found[1], found[2]), markdown)


def section(path: str, anchor: str | None) -> str:
    """The text below the heading of this anchor, or below the title, up to the next heading of its level."""
    level, wanted, kept = 0, anchor, []
    fenced = False
    for line in (ROOT / path).read_text().splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(#+) (.+)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if level:
            kept.append(line)
        elif heading and wanted in (None, slug(heading[2])):
            level = len(heading[1])
    if not kept:
        raise PluginError(f"{path} has no section #{anchor}.")
    return _LINK.sub(lambda link: link_from_docs(link[1], link[2]), "\n".join(kept).strip())


def slug(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def link_from_docs(text: str, target: str) -> str:
    """Pages of the site stay links; what lies elsewhere in the repository is named alone."""
    return f"[{text}]({target.removeprefix('docs/')})" if target.startswith("docs/") else text
