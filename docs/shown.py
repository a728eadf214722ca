"""A MkDocs hook: what stands elsewhere in the repository is shown on the site, not written twice.

A line that is nothing but a link out of `docs` becomes what it leads to: `[Limits](../README.md#limits)` that section,
without its heading, `[All](../README.md)` the whole page, `[a script](../examples/quickstart.py)` its code. Pictures of
the benchmarks are taken along; other links out of `docs` keep their text alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINE = re.compile(r"^\[[^\]]+\]\(\.\./([\w./-]+)(?:#([\w-]+))?\)$", re.MULTILINE)
_OUT = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)")
_PICTURE_OUT = re.compile(r"(!\[[^\]]*\]\()\.\./(benchmarks/)")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")
_PICTURE = re.compile(r"(!\[[^\]]*\]\()(?!https?:)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: object) -> str:
    markdown = _LINE.sub(lambda found: shown(found[1], found[2]), markdown)
    # In a folder of docs `../` leads to docs.
    return markdown if "/" in page.file.src_uri else _OUT.sub(r"\1", _PICTURE_OUT.sub(r"\1\2", markdown))


def shown(path: str, anchor: str | None) -> str:
    if path.endswith(".md"):
        return section(path, anchor)
    return f"```{Path(path).suffix[1:]}\n{(ROOT / path).read_text()}```"


def section(path: str, anchor: str | None) -> str:
    text = "\n".join(below(path, anchor)).strip()
    if not text:
        raise PluginError(f"{path} has no section #{anchor}.")
    folder = "" if "/" not in path else f"{path.rpartition('/')[0]}/"
    text = _PICTURE.sub(rf"\1{folder}", text)
    return _LINK.sub(lambda link: link_from_docs(link[1], link[2]), text)


def below(path: str, anchor: str | None) -> list[str]:
    """The lines below the heading of this anchor, or below the title, up to the next heading of its level."""
    level, kept, fenced = 0, [], False
    for line in (ROOT / path).read_text().splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(#+) (.+)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if level:
            kept.append(line)
        elif heading and (anchor is None or slug(heading[2]) == anchor):
            level = len(heading[1])
    return kept


def slug(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def link_from_docs(text: str, target: str) -> str:
    """Pages of the site stay links; what lies elsewhere in the repository is named alone."""
    return f"[{text}]({target.removeprefix('docs/')})" if target.startswith("docs/") else text
