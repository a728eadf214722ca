"""An ambiguity set and the options beside it, from a configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .._balls import BALLS
from ..ambiguity import AmbiguitySet

_SETS = {one.__name__: one for one in BALLS.values()}
_EXAMPLE = "Write for example {ambiguity: TotalVariation, radius: 0.1}."


def read(config: Any, options: tuple[str, ...], where: str) -> tuple[AmbiguitySet, dict[str, Any]]:
    """The set named by `ambiguity`, built from the keys that it takes, and the other keys as options.

    Args:
        config: a mapping like `{"ambiguity": "TotalVariation", "radius": 0.1, "pool": "memory"}`.
        options: the names allowed beside the set's own.
        where: what the user calls the mapping, for the errors.
    Raises: ValueError: no such set, or a key that nobody takes; the set's own errors for its numbers.
    """
    if not isinstance(config, Mapping) or config.get("ambiguity") is None:
        raise ValueError(f"{where} must name an ambiguity set, got {config!r}. {_EXAMPLE}")
    given = {str(name): value for name, value in config.items()}
    name = given.pop("ambiguity")
    if name not in _SETS:
        raise ValueError(f"{where}.ambiguity must be one of {', '.join(_SETS)}, got {name!r}. {_EXAMPLE}")
    own = {field.name for field in fields(_SETS[name])}  # type: ignore[arg-type]  # every set is a dataclass
    unknown = sorted(given.keys() - own - set(options))
    if unknown:
        allowed = ", ".join(sorted(own | set(options)))
        raise ValueError(f"{where} must hold keys of {allowed} beside ambiguity={name}, got {unknown}. Leave them out.")
    numbers = {key: value for key, value in given.items() if key in own}
    return _SETS[name](**numbers), {key: value for key, value in given.items() if key not in own}


def one_pass(pool: str, framework: str) -> str:
    """The pool, in a loop that runs each batch forward once."""
    if pool not in ("memory", "batch"):
        raise ValueError(
            f'pool must be "memory" or "batch", got {pool!r}: {framework} runs each batch forward once. '
            "Leave pool out for the default."
        )
    return pool
