"""What `python -m xlinfer.plan` prints."""

import pytest

from tests.commands.test_plan_command import CONFIGS, PARAMETERS, ROOT
from xlinfer.commands.plan import main

BIGGEST = pytest.param("deepseek-v3", marks=pytest.mark.slow)  # half a minute


@pytest.mark.parametrize("model", [BIGGEST, *sorted(PARAMETERS.keys() - {"deepseek-v3"}), "demo"])
@pytest.mark.parametrize("target", ["v6e-8", "v5p-512", "h100-8", "b200", "tpu7x-4", "cpu"])
def test_the_text_fits_a_hundred_columns(capsys, model, target):
    path = ROOT / "xlinfer" / "demo" if model == "demo" else CONFIGS / f"{model}.json"
    main(["xlinfer.plan", f"--model={path}", f"--target={target}"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.startswith(f"{model} on {target}: ")
