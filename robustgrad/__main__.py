"""The command line: `robustgrad` or `python -m robustgrad`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run it; what is wrong with a file or an option is said in one line, without a traceback."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("robustgrad", "torch")):
            raise
        package = error.name.partition(".")[0]
        sys.exit(f'robustgrad: error: {package} is missing. Install it with pip install "robustgrad[cli]".')
    try:
        app(prog_name="robustgrad")
    except (ValueError, ImportError, OSError) as problem:
        print(f"robustgrad: error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
