"""Stand-ins for packages that a framework imports, but that the part of it under test never calls."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import MagicMock


class _Hollow(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # What looks like a class may be inherited from.
        return type(name, (), {}) if name[0].isupper() else MagicMock(name=f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    """Last in line: what is installed is found before."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        ours = name in self.names or name.split(".")[0] in self.names
        return ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def hollow(*names: str) -> Iterator[None]:
    """Imports inside find these packages, if need be as empty shells, and may warn. Then they are absent again."""
    finder = _Finder(names)
    sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Hollow)]:
            del sys.modules[name]
