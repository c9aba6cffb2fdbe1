"""Everything a change must pass. CI and developers run this and nothing else."""

import subprocess
import sys
import time

PYTHON = sys.executable
STEPS = {
    "format": [PYTHON, "-m", "ruff", "format", "--check", "."],
    "lint": [PYTHON, "-m", "ruff", "check", "."],
    "types": [PYTHON, "-m", "pyright"],
    "imports": [
        PYTHON,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
    ],
    "size": [PYTHON, "-m", "tools.loc"],
    "compiles": [PYTHON, "-m", "tools.aot", "--fast"],
    "tests": ["./run", "test"],
}


def main() -> int:
    """Run every step, whatever the others say; 1 if any failed."""
    rows = []
    for name, command in STEPS.items():
        print(f"== {name}", flush=True)
        started = time.monotonic()
        passed = subprocess.run(command).returncode == 0
        rows.append((name, passed, time.monotonic() - started))
    print("== summary")
    for name, passed, seconds in rows:
        print(f"{name:8} {'ok' if passed else 'FAILED':6} {seconds:7.1f} s")
    return int(not all(passed for _, passed, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
