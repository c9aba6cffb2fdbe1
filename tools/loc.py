"""Fail when the source grows past its budget. Raise a number only in a commit of its own."""

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

MAX_FILE = 400  # lines
BUDGET: dict[str, int | None] = {  # lines of a package; None bounds its files only
    "xlinfer": 26000,
    "pallas_kernels": 11000,
    "converters": 8000,
    "tools": None,
    "tests": None,
}


def measure(folder: Path) -> dict[Path, int]:
    """Lines of each Python file below `folder`, blank lines and comments included."""
    return {p: len(p.read_text().splitlines()) for p in sorted(folder.rglob("*.py"))}


def excesses(package: str, sizes: Mapping[Path, int], budget: int | None) -> list[str]:
    """One sentence for each limit that `package`, with files of these sizes, breaks."""
    over = [f"{p}: {n} lines, at most {MAX_FILE}" for p, n in sizes.items() if n > MAX_FILE]
    total = sum(sizes.values())
    if budget is not None and total > budget:
        over.append(f"{package}: {total} lines, at most {budget}")
    return over


def main(root: Path) -> int:
    """Print a row per package of `root` and what is over; 1 if anything is."""
    over = []
    print(f"{'package':16}{'files':>6}{'lines':>7}{'budget':>8}{'median':>8}{'largest':>9}")
    for package, budget in BUDGET.items():
        sizes = measure(root / package)
        lines = [n for n in sizes.values() if n] or [0]  # an empty __init__.py says nothing
        row = (len(sizes), sum(lines), budget or "-", f"{median(lines):.0f}", max(lines))
        print(f"{package:16}{row[0]:>6}{row[1]:>7}{row[2]:>8}{row[3]:>8}{row[4]:>9}")
        over += excesses(package, sizes, budget)
    for sentence in over:
        print(sentence)
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main(Path.cwd()))
