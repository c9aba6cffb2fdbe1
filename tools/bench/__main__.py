"""`./run bench [name ...]`: run benchmarks, print a table for each and one JSON line last."""

import argparse
import importlib
import json
import pkgutil
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tools.bench import report

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__main__", "report"}


def names() -> list[str]:
    """Every benchmark, in alphabetical order."""
    found = (module.name for module in pkgutil.iter_modules([str(HERE)]))
    return sorted(set(found) - NOT_BENCHMARKS)


def about(name: str) -> str:
    """The first line of the benchmark's docstring, read without importing it."""
    module = compile((HERE / f"{name}.py").read_text(), name, "exec", dont_inherit=True)
    return str(module.co_consts[0]).splitlines()[0]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run bench", description="Measure this machine, and xlinfer on it."
    )
    parser.add_argument("names", nargs="*", metavar="name", help="which to run; none: all")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(names())):
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(names())}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json={args.json}: its folder does not exist")
    return args


def main(argv: Sequence[str]) -> int:
    """Run what is asked for; 1 if any benchmark raised, after the others have run."""
    args = arguments(argv)
    if args.list:
        for name in names():
            print(f"{name:12} {about(name)}")
        return 0
    results, failed = {}, []
    for name in args.names or names():
        print(f"{name}: {about(name)}", flush=True)
        started = time.perf_counter()
        try:
            result = importlib.import_module(f"tools.bench.{name}").main()
            results[name] = report.checked(result)
        except Exception:  # one broken benchmark must not cost the others' results
            traceback.print_exc()
            failed.append(name)
            continue
        print(report.table(results[name]))
        print(f"  ({time.perf_counter() - started:.1f} s)\n", flush=True)
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    document = report.document(shlex.join(["./run", "bench", *argv]), results)
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
