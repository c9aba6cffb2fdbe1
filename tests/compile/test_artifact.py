"""An artifact starts without tracing or compiling, gives the same bits, and is refused with a
reason wherever it is not exactly what was written for this place."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import jax
import pytest

from xlinfer import LLM, PlanError, SamplingParams
from xlinfer.commands.compile import main
from xlinfer.compile.artifact import FORMAT, ArtifactError, own_digest
from xlinfer.inspect import main as inspect
from xlinfer.serve.build import DEMO_MODEL

SIZES = ("--max_model_len=64", "--max_num_seqs=4", "--max_num_batched_tokens=32")
PROMPTS = ["def add(a, b):\n", "class", "import os\n\n"]
SAMPLED = SamplingParams(temperature=0.8, seed=7, max_tokens=12, logprobs=2, prompt_logprobs=1)
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=2)


def compile_demo(output: Path, *flags: str, cache: Path, model: Path = DEMO_MODEL) -> int:
    given = [f"--model={model}", "--target=cpu", f"--output={output}", *SIZES, *flags]
    # A worker sees one device where these tests see four; the artifact is for one.
    return main(["compile", *given, f"--compile_cache_dir={cache}"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache") / "programs"


@pytest.fixture(scope="module")
def written(tmp_path_factory, cache) -> Path:
    output = tmp_path_factory.mktemp("artifact") / "demo"
    assert compile_demo(output, "--weights", cache=cache) == 0
    return output


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def answers(llm: LLM) -> list:
    outputs = [*llm.generate(PROMPTS, GREEDY), *llm.generate(PROMPTS, SAMPLED)]
    return [(o.prompt_logprobs, o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]


def edit(folder: Path, **changes) -> None:
    """As another xlinfer would have written it."""
    file = folder / "compiled.json"
    manifest = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(manifest | {"sha256": own_digest(manifest)}))


def test_replicas_start_from_one_artifact(written):
    """Each on a device of its own, though the programs were compiled for the first."""
    alone, two = LLM(artifact=written), LLM(artifact=written, data_parallel_size=2)
    # Fewer rows share a step, and another bucket may round otherwise: tokens, not their scores.
    assert [tokens for _, tokens, _ in answers(two)] == [tokens for _, tokens, _ in answers(alone)]
    engines = two.engine.engines
    lies = [{d.id for x in e._executor.params for d in x.sharding.device_set} for e in engines]
    assert lies == [{0}, {1}]
    assert all(engine.stats().generation_tokens > 0 for engine in engines), "each took part"


def test_nothing_is_traced_or_compiled_and_the_bits_are_the_same(written):
    heard: Counter[str] = Counter()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        heard.update([event])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        got = answers(LLM(artifact=written))
        compiles = {name: n for name, n in heard.items() if "compile" in name or "trace" in name}
        assert not compiles
        fresh = LLM(DEMO_MODEL, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
        assert any("compile" in name for name in heard), "the listener heard nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert got == answers(fresh)


def test_a_start_without_an_artifact_says_what_it_found(tmp_path, caplog):
    sizes = {"max_model_len": 32, "max_num_seqs": 1, "max_num_batched_tokens": 16}
    one = {**sizes, "deterministic": True, "compile_cache_dir": tmp_path / "cache"}
    (tmp_path / "cache").mkdir(mode=0o700)
    old = jax.config.jax_compilation_cache_dir
    try:
        with caplog.at_level("INFO", logger="xlinfer.engine"):
            first = LLM(DEMO_MODEL, **one)
            assert caplog.text.count("miss, it was never compiled here") == 6
            caplog.clear()
            again = LLM(DEMO_MODEL, **one)
            assert caplog.text.count(": hit") == 6 and "miss" not in caplog.text
            caplog.clear()
            LLM(DEMO_MODEL, **one | {"max_model_len": 48})
            assert "program forward-16: miss, the program is another" in caplog.text
            assert "program score: hit" in caplog.text
    finally:
        jax.config.update("jax_compilation_cache_dir", old)
    tokens = [llm.generate("a", GREEDY)[0].outputs[0].token_ids for llm in (first, again)]
    assert tokens[0] == tokens[1]


def test_the_same_command_finds_what_it_compiled(written, cache, tmp_path, capsys):
    assert compile_demo(tmp_path / "again", cache=cache) == 0
    report = capsys.readouterr().out
    assert "8 programs for cpu, 8 of them compiled before" in report
    for file in sorted((written / "programs").iterdir()):
        assert (tmp_path / "again/programs" / file.name).read_bytes() == file.read_bytes()


def test_programs_alone_serve_the_checkpoint_they_were_compiled_for(written, cache, tmp_path):
    bare = tmp_path / "bare"
    assert compile_demo(bare, cache=cache, model=DEMO_MODEL / "config.json") == 0
    assert not (bare / "parameters").exists()
    with pytest.raises(ValueError, match="holds programs and no weights: name the checkpoint"):
        LLM(artifact=bare)
    assert answers(LLM(DEMO_MODEL, artifact=bare)) == answers(LLM(artifact=written))
    other = Path(shutil.copytree(DEMO_MODEL, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ArtifactError, match=r"another model than .* differs in rms_norm_eps"):
        LLM(other, artifact=bare)


@pytest.mark.parametrize(
    "name", ["programs/decode-4.xla", "programs/sample.json", "config.json", "tokenizer.json"]
)
def test_a_flipped_bit_is_refused(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"damaged: {name} is not what was written"):
        LLM(artifact=copy)


def test_a_program_without_a_digest_is_refused(copy):
    files = json.loads((copy / "compiled.json").read_text())["files"]
    del files["programs/sample.xla"]
    edit(copy, files=files)
    with pytest.raises(ArtifactError, match=r"no digest of programs/sample\.xla"):
        LLM(artifact=copy)


def test_a_flipped_bit_of_the_weights_is_refused(copy):
    largest = max((copy / "parameters").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 128
    largest.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"damaged: parameters/.* is not what was written"):
        LLM(artifact=copy)


def test_a_manifest_that_says_something_else_is_refused(copy):
    file = copy / "compiled.json"
    text = file.read_text()
    assert '"max_num_seqs": 4' in text
    file.write_text(text.replace('"max_num_seqs": 4', '"max_num_seqs": 5'))
    with pytest.raises(ArtifactError, match=r"compiled.json is damaged: it is not what"):
        LLM(artifact=copy)


def test_a_missing_file_is_refused(copy):
    (copy / "programs/admit.xla").unlink()
    with pytest.raises(ArtifactError, match=r"damaged: programs/admit.xla is missing"):
        LLM(artifact=copy)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"versions": {"jax": "0.11.1", "jaxlib": "0.11.2"}}, "compiled with jax 0.11.1"),
        ({"device": "TPU v6 lite"}, "it is for TPU v6 lite, and here is cpu"),
        ({"mesh": {"tensor": 8}}, "it is for 8 devices, and here are"),
        ({"host": "x86_64 000000000000"}, "a CPU with other instructions"),
        ({"xlinfer": "0.0.9"}, "compiled with xlinfer 0.0.9"),
        ({"format": 99}, f"is of format 99; this xlinfer reads {FORMAT}"),
        ({"plan": {}}, "compiled.json is damaged"),
    ],
)
def test_what_differs_is_named(copy, changes, says):
    edit(copy, **changes)
    with pytest.raises(ArtifactError, match=says) as error:
        LLM(artifact=copy)
    if "plan" not in changes:
        command = "python -m xlinfer.compile --model=... --target=cpu --tensor_parallel_size=1"
        assert command in str(error.value) and "--weights --output=NEW" in str(error.value)


def test_allow_recompile_is_explicit(copy, caplog):
    edit(copy, versions={"jax": "0.11.1"})
    with pytest.raises(ValueError, match="name the checkpoint"):
        LLM(artifact=copy, allow_recompile=True)
    llm = LLM(
        DEMO_MODEL, artifact=copy, allow_recompile=True, deterministic=True, max_num_seqs=1,
        max_num_batched_tokens=16, max_model_len=32,
    )  # fmt: skip
    assert "Compiling instead" in caplog.text and "jax 0.11.1" in caplog.text
    assert llm.generate("a", GREEDY)[0].outputs[0].token_ids


def test_an_option_it_was_not_compiled_for_is_refused(written):
    with pytest.raises(
        ArtifactError, match="max_num_seqs=8 is asked for, and it was compiled for 4"
    ):
        LLM(artifact=written, max_num_seqs=8)
    LLM(artifact=written, max_num_seqs=4)


@pytest.mark.slow
def test_an_8_bit_cache(cache, tmp_path, capsys):
    assert compile_demo(tmp_path / "fp8", "--weights", "--kv_cache_dtype=fp8", cache=cache) == 0
    assert inspect(["inspect", str(tmp_path / "fp8")]) == 0
    assert "KV cache float8_e4m3fn" in capsys.readouterr().out
    llm = LLM(artifact=tmp_path / "fp8")
    assert llm.engine.kv_cache_dtype == "float8_e4m3fn"
    for name in ("fp8", "fp8_e4m3"):
        same = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32}
        assert answers(LLM(DEMO_MODEL, kv_cache_dtype=name, **same)) == answers(llm)
        LLM(artifact=tmp_path / "fp8", kv_cache_dtype=name)
    with pytest.raises(ArtifactError, match="kv_cache_dtype=float32 is asked for, and it was com"):
        LLM(artifact=tmp_path / "fp8", kv_cache_dtype="float32")


@pytest.mark.parametrize("place", [".", "programs", "programs/admit.xla", "compiled.json"])
def test_what_others_may_write_is_refused(copy, place):
    (copy / place).chmod((copy / place).stat().st_mode | 0o020)
    with pytest.raises(PlanError, match="writable by nobody else"):
        LLM(artifact=copy)


def test_a_file_outside_is_refused(copy, tmp_path):
    code = tmp_path / "code.xla"
    shutil.move(copy / "programs/admit.xla", code)
    os.symlink(code, copy / "programs/admit.xla")
    with pytest.raises(ArtifactError, match=r"programs/admit.xla lies outside of it"):
        LLM(artifact=copy)


def test_no_pickle(written):
    for file in (p for p in written.rglob("*") if p.is_file()):
        assert not file.read_bytes().startswith(b"\x80"), f"{file.name} looks like a pickle"
    for file in (written / "programs").glob("*.json"):
        assert json.loads(file.read_text())["arguments"]["tree"][0] == "tuple"


def test_it_appears_whole_or_not_at_all(cache, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/something").touch()
    assert compile_demo(tmp_path / "taken", cache=cache) == 1
    assert "is not empty; give a new directory" in capsys.readouterr().err
    broken = Path(shutil.copytree(DEMO_MODEL, tmp_path / "broken"))
    next(broken.glob("*.safetensors")).unlink()
    assert compile_demo(tmp_path / "out", "--weights", cache=cache, model=broken) == 1
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


@pytest.mark.parametrize(
    "flags, code, says",
    [
        (["--target=v7"], 1, "target 'v7' is none of"),
        (["--target=v6e-3"], 1, "v6e comes as v6e-1, v6e-4, v6e-8"),
        (["--target=b200"], 1, "b200: nothing is compiled for it: its tensor cores"),
        (["--max_model_len=4096"], 1, "past the model's max_position_embeddings=2048"),
        (["--tensor_parallel_size=2"], 1, "does not divide the 1 devices"),
        (["--no_such_flag=1"], 2, "no_such_flag"),
        (["--quantization=int4", "--model=/nowhere"], 1, "there is no folder with a config.json"),
    ],
)
def test_bad_flags(flags, code, says, tmp_path, capsys):
    given = [f"--model={DEMO_MODEL}", "--target=cpu", f"--output={tmp_path / 'out'}", *flags]
    assert main(["compile", *given, f"--compile_cache_dir={tmp_path / 'cache'}"]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect(written, tmp_path, capsys):
    assert inspect(["inspect", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "8 programs for cpu, with weights" in shown and "decode-4" in shown
    assert inspect(["inspect", "--json", str(written)]) == 0
    rows = {r["program"]: r for r in json.loads(capsys.readouterr().out)["programs"]}
    # 7.3 million parameters, but the embedding, in float32: all are read once for a token.
    assert 25e6 < rows["decode-1"]["bytes"] < 35e6
    assert rows["decode-4"]["flops"] == pytest.approx(4 * rows["decode-1"]["flops"], rel=0.01)
    assert inspect(["inspect", str(tmp_path)]) == 1
    assert "is no compiled artifact" in capsys.readouterr().err
