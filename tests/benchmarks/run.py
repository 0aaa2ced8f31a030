"""All benchmarks in one run, as one table: ours, a peer's, and their ratio.

    python tests/benchmarks/run.py
    python tests/benchmarks/run.py --only norms,grouping
    python tests/benchmarks/run.py --growth examples/growth.png

Figures are medians; both sides of a ratio take their turn in each round. Peers that are not installed are left out, and
so is what needs a GPU. Everything takes some twelve minutes on two cores, and 12 GB of memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import grouping
import growth
import importing
import norms
import training
import watching
from measuring import FULL, SMALL, machine, table

PARTS = {
    "norms": norms.rows,
    "training": training.rows,
    "watching": watching.rows,
    "grouping": grouping.rows,
    "importing": importing.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument(
        "--growth", metavar="PICTURE", type=Path, help="draw the cost against the growth, instead of the table"
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table as the README has it, too")
    parser.add_argument("--small", action="store_true", help="only see that it runs")
    args = parser.parse_args()
    sizes = SMALL if args.small else FULL
    unknown = set(args.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(PARTS)}")
    for path in filter(None, (args.growth, args.markdown)):
        if not path.absolute().parent.is_dir():
            parser.error(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")
    if args.growth:
        growth.draw(args.growth, sizes)
        print(f"saved {args.growth}")
        return
    print(machine(), flush=True)
    rows = [row for part in args.only.split(",") for row in PARTS[part](sizes)]
    print(table(rows))
    if args.markdown:
        args.markdown.write_text(table(rows, markdown=True) + "\n")


if __name__ == "__main__":
    main()
