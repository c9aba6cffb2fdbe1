"""What import-linter cannot see: that every module has its place, and what importing costs."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_module_has_a_place_in_the_import_order():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    placed = {name.strip(" ()") for layer in layers for name in layer.split("|")}
    modules = {
        f"xlinfer.{path.stem}"
        for path in (ROOT / "xlinfer").iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }
    assert modules <= placed


def test_host_logic_is_imported_without_jax():
    modules = "xlinfer, xlinfer.config, xlinfer.request, xlinfer.plan, xlinfer.score.command"
    code = f"import sys, {modules}; print('jax' in sys.modules, 'flax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False False\n", done.stderr
