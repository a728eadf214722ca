"""The parts of `ood_protocol.py`, one idea a file."""

import sys
from pathlib import Path

# Loaders and models are those of the examples.
sys.path.append(str(Path(__file__).parents[2] / "examples"))
