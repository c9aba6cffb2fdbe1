"""`xlinfer.plan` of a model whose encoder reads the prompt."""

import json

from tests.checkpoints import GOLDENS
from xlinfer.commands.plan import main
from xlinfer.compile import SINGLE


def test_an_encoders_programs_and_pages(capsys):
    """Pages for prompt and answer, programs that encode; a decode step reads no encoder."""
    argv = ["xlinfer.plan", f"--model={GOLDENS / 't5'}", "--target=h200", "--num_pages=100"]
    assert main([*argv, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    programs, cache = made["programs"], made["kv_cache"]
    assert programs["encode_buckets"] == [128, 256, 512]
    buckets = [n for name, n in programs.items() if name.endswith("buckets")]
    assert programs["count"] == sum(map(len, buckets)) + len(SINGLE)
    assert programs["attention_impl"] == "reference"
    assert cache["sequences_of_max_model_len"] == 99 // (2 * 512 // 64)
    assert made["prefill"] == [] and any("encoder reads" in note for note in made["notes"])
    own = [w["bytes"] for w in made["weights"] if w["name"].startswith("decoder.layers.")]
    read = made["decode"][0]["weight_bytes"]
    assert 0 < read < sum(own) + sum(w["bytes"] for w in made["weights"] if w["name"] == "embed_VD")
    assert main(argv) == 0
    assert "encode, tokens   128 256 512" in capsys.readouterr().out
