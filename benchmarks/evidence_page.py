"""Write docs/evidence.md and its pictures from the committed results of the protocol.

    python benchmarks/evidence_page.py [--results FOLDER --page FILE]

For results of your own the page has the tables and no conclusions: those were drawn from ours.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from evidence.page import page
from evidence.pictures import draw
from evidence.results import Results

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "ood_protocol", ROOT / "docs" / "evidence.md"


def text(folder: Path = RESULTS, target: Path = PAGE) -> str:
    pictures = Path(os.path.relpath(folder, target.parent)).as_posix()
    return page(Results(folder), pictures, judged=folder == RESULTS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        written = text(args.results, args.page)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    args.page.write_text(written, encoding="utf-8")
    draw(Results(args.results), args.results)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
