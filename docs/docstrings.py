"""A Griffe extension: docstrings as this project writes them, put into the Markdown that its parser expects."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

_TITLE = re.compile(r"^(Raises|Returns|Raises on leaving|Source|Assumption|Example): *(?=\S|$)", re.MULTILINE)
_ABOVE = re.compile(r"^( +[\w, ]+: )(?=>)", re.MULTILINE)
_DOCTEST = re.compile(r"^( *)>>> .+(?:\n *\S.*)*", re.MULTILINE)


class Spelled(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = spelled(obj.docstring.value)


def spelled(text: str) -> str:
    """Titles of paragraphs in bold, examples in fences, "> 0" not a quotation. `Args:` is left to the parser."""
    text = _DOCTEST.sub(lambda found: f"```pycon\n{dedent(found[0])}\n```", text)
    text = _ABOVE.sub(r"\1\\", text)
    return _TITLE.sub(lambda found: f"\n**{found[1]}:** ", text)
