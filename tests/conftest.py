"""What every test finds as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Older TrainingArguments leave their precision and compiler in the environment, for the next trainer to find."""
    with patch.dict(os.environ):
        yield
