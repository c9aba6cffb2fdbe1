"""The engine against transformers' greedy tokens, and against itself under every kind of load."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import FAMILIES, GOLDENS
from xlinfer.compile.store import Store
from xlinfer.engine.engine import Engine
from xlinfer.plan import PlanError
from xlinfer.request import InvalidRequest, Request, SamplingParams, TokenOutput
from xlinfer.weights import load_model

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def request(name, prompt, sampling=GREEDY, **fields) -> Request:
    return Request(
        request_id=str(name), prompt_token_ids=tuple(map(int, prompt)), sampling=sampling, **fields
    )


def run(engine: Engine, requests) -> dict[str, TokenOutput]:
    """Everything each request got, pages counted after every step."""
    for r in requests:
        engine.add_request(r)
    return drain(engine)


def drain(engine: Engine) -> dict[str, TokenOutput]:
    total: dict[str, TokenOutput] = {}
    while engine.has_work:
        for out in engine.step():
            if (sofar := total.get(out.request_id)) is None:
                total[out.request_id] = out
                continue
            assert sofar.finish_reason is None, "heard of after its end"
            sofar.token_ids += out.token_ids
            sofar.logprobs = (sofar.logprobs or []) + (out.logprobs or []) or None
            sofar.prompt_logprobs = sofar.prompt_logprobs or out.prompt_logprobs
            sofar.finish_reason, sofar.stop_reason = out.finish_reason, out.stop_reason
        engine.check()
    assert engine.stats().kv_cache_usage == 0
    return total


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDENS / "llama")


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=128)


@pytest.fixture(scope="module")
def prompts():
    golden = load_file(GOLDENS / "llama" / "golden.safetensors")
    return golden["input_ids"]


def random_prompts(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 160, rng.integers(1, longest)) for _ in range(count)]


# What sets the others apart is no business of the engine's: the forward's own tests have them all.
QUICK = (
    "llama", "llama4", "mistral-window",
)  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES],
)
def test_greedy_equals_transformers(family):
    golden = load_file(GOLDENS / family / "golden.safetensors")
    prompts, want = golden["input_ids"], golden["greedy"].tolist()
    model = load_model(GOLDENS / family)

    roomy = Engine(model, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=128)
    for i in (0, 1):  # alone
        assert run(roomy, [request(i, prompts[i])])[str(i)].token_ids == want[i]
    # In a mixed batch of 16, the second time around with prefix hits.
    others = [request(f"other{i}", p) for i, p in enumerate(random_prompts(14))]
    for round_ in (1, 2):
        got = run(roomy, [request(0, prompts[0]), *others, request(1, prompts[1])])
        assert [got["0"].token_ids, got["1"].token_ids] == want
        assert got["0"].num_cached_tokens == 16, round_

    # Pages of 4, prefill 8 tokens at a time, and 19 pages where two sequences grow to 22.
    tight = Engine(
        model, max_num_seqs=4, max_num_batched_tokens=8, page_size=4, num_pages=20,
        max_model_len=64,
    )  # fmt: skip
    got = run(tight, [request(0, prompts[0]), request(1, prompts[1]), request(2, prompts[0])])
    assert [got[i].token_ids for i in "012"] == [want[0], want[1], want[0]]
    assert tight.stats().num_preemptions > 0


MULTIMODAL = ("gemma3-images",)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_greedy_equals_transformers_of_the_text_model_alone(name):
    golden = load_file(GOLDENS / name / "golden.safetensors")
    model = load_model(GOLDENS / name, text_only=True)
    engine = Engine(model, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64)
    got = run(engine, [request(i, golden["input_ids"][i]) for i in (0, 1)])
    assert [got[i].token_ids for i in "01"] == golden["greedy"].tolist()


def test_nothing_compiles_after_ready(engine):
    compiles: list[str] = []

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        compiles.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        everything = SamplingParams(
            temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, presence_penalty=0.5,
            frequency_penalty=0.1, repetition_penalty=1.1, seed=3, logprobs=5, prompt_logprobs=2,
            logit_bias={5: 3.0}, allowed_token_ids=list(range(100)), min_tokens=3, max_tokens=20,
            stop_token_ids=[7],
        )  # fmt: skip
        requests = [request(i, p, everything) for i, p in enumerate(random_prompts(20))]
        requests += [request(f"g{i}", p) for i, p in enumerate(random_prompts(20, seed=1))]
        run(engine, requests)
        assert compiles == []
        jax.jit(lambda x: x + 1.5)(np.float32(1))
        assert compiles, "the listener hears compiles"
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.fixture(scope="module")
def deterministic(model):
    return Engine(
        model, max_num_seqs=32, max_num_batched_tokens=32, max_model_len=128, page_size=8,
        deterministic=True,
    )  # fmt: skip


class TestNeighbours:
    """The same request alone and among 31 random neighbours: the same bits."""

    @pytest.mark.parametrize(
        "sampling",
        [
            SamplingParams(temperature=0, max_tokens=16, logprobs=5),
            SamplingParams(temperature=1.0, seed=11, max_tokens=16, logprobs=5),
            SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=5, max_tokens=16, logprobs=5),
        ],
        ids=["greedy", "seeded", "filtered"],
    )
    def test_bits_do_not_depend_on_load(self, deterministic, prompts, sampling):
        engine = deterministic
        mine = request("mine", prompts[0], sampling, cache_salt="a")
        alone = run(engine, [mine])["mine"]
        for seed in (1, 2):
            rng = np.random.default_rng(seed)
            neighbours = [
                request(i, p, SamplingParams(temperature=float(rng.choice([0.0, 1.0])),
                        max_tokens=int(rng.integers(1, 30)), logprobs=int(rng.integers(0, 5)),
                        presence_penalty=float(rng.choice([0.0, 0.5])), seed=int(seed)))
                for i, p in enumerate(random_prompts(31, seed))
            ]  # fmt: skip
            # Fresh or with its prefix cached, early or late in the queue.
            mine = request("mine", prompts[0], sampling, cache_salt="ab"[seed - 1])
            at = int(rng.integers(0, 31))
            together = run(engine, [*neighbours[:at], mine, *neighbours[at:]])["mine"]
            assert together.token_ids == alone.token_ids
            assert together.logprobs == alone.logprobs

    def test_bits_survive_preemption(self, model, prompts):
        sampling = SamplingParams(temperature=1.0, seed=11, max_tokens=16, logprobs=5)
        tight = Engine(
            model, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, page_size=4,
            num_pages=20, deterministic=True,
        )  # fmt: skip
        alone = run(tight, [request("mine", prompts[0], sampling)])["mine"]
        # "mine" comes last in order, so it is the one to give way.
        others = [request(i, prompts[1], priority=-1, cache_salt=str(i)) for i in range(2)]
        mine = request("mine", prompts[0], sampling)
        tight.add_request(mine)
        first = tight.step()
        together = run(tight, others)["mine"]
        together.token_ids = [t for out in first for t in out.token_ids] + together.token_ids
        together.logprobs = [e for out in first for e in out.logprobs or []] + (
            together.logprobs or []
        )
        assert tight.stats().num_preemptions > 0
        assert (together.token_ids, together.logprobs) == (alone.token_ids, alone.logprobs)


def test_same_bucket_same_bits(engine, prompts):
    """Without --deterministic: other neighbours in the same buckets change nothing."""
    sampling = SamplingParams(temperature=1.0, seed=4, max_tokens=24, logprobs=3)
    results = []
    for seed in (1, 2, 3):
        rng = np.random.default_rng(seed)
        others = [request(i, rng.integers(3, 160, 7), SamplingParams(temperature=1.0, seed=i,
                  max_tokens=24)) for i in range(11)]  # fmt: skip
        engine.reset_prefix_cache()
        results.append(run(engine, [request("mine", prompts[0], sampling), *others])["mine"])
    assert results[0] == results[1] == results[2]


def test_seeds(engine, prompts):
    """A seed fixes the answer, whatever else runs; another seed or answer index changes it."""
    seeded = lambda seed: SamplingParams(temperature=1.0, seed=seed, max_tokens=16)
    alone = run(engine, [request("a", prompts[0], seeded(1))])["a"].token_ids
    many = run(engine, [request(i, prompts[0], seeded(i)) for i in range(10)])
    assert many["1"].token_ids == alone
    assert len({tuple(out.token_ids) for out in many.values()}) > 5
    answers = [request(f"n{i}", prompts[0], seeded(1), answer_index=i) for i in range(4)]
    answers = [out.token_ids for out in run(engine, answers).values()]
    assert answers[0] == alone
    assert len(set(map(tuple, answers))) == 4


def test_prompt_logprobs_equal_the_model(engine, model, prompts):
    """Log-softmax of the plain forward, over prompts that span several steps."""
    prompt = np.concatenate([prompts[0], prompts[1], prompts[0][:20]])
    logits = np.asarray(model(jnp.asarray(prompt[None], jnp.int32)))[0].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    sampling = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=4, logprobs=2)
    out = run(engine, [request("a", prompt, sampling)])["a"]
    assert out.prompt_logprobs is not None and len(out.prompt_logprobs) == len(prompt)
    assert out.prompt_logprobs[0] is None
    for i, entry in enumerate(out.prompt_logprobs[1:]):
        assert entry is not None and entry.token_ids[0] == prompt[i + 1]
        # float32 logits over a context of 84 tokens
        np.testing.assert_allclose(entry.logprobs[0], want[i, prompt[i + 1]], atol=2e-5)
        assert entry.rank == (want[i] > want[i, prompt[i + 1]]).sum() + 1
        np.testing.assert_allclose(entry.logprobs[1:], np.sort(want[i])[::-1][:4], atol=2e-5)
    assert out.logprobs is not None
    np.testing.assert_allclose(out.logprobs[0].logprobs[0], want[-1].max(), atol=2e-5)


def test_scoring_alone_generates_nothing(engine, prompts):
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
    got = run(engine, [request(n, prompts[0][:n], sampling) for n in (1, 2, 32)])
    for n in (1, 2, 32):
        out = got[str(n)]
        assert (out.token_ids, out.finish_reason) == ([], "length")
        assert len(out.prompt_logprobs or []) == n


def test_stops(engine, prompts):
    free = run(engine, [request("a", prompts[0], SamplingParams(temperature=0, max_tokens=12))])[
        "a"
    ]
    third = free.token_ids[2]
    first_seen = free.token_ids.index(third)
    stop = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[third])
    out = run(engine, [request("a", prompts[0], stop)])["a"]
    assert (out.token_ids, out.finish_reason) == (free.token_ids[: first_seen + 1], "stop")
    assert out.stop_reason == third
    out = run(engine, [request("a", prompts[0], eos_token_ids=(third,))])["a"]
    assert (out.token_ids[-1], out.finish_reason, out.stop_reason) == (third, "stop", None)
    ignore = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    out = run(engine, [request("a", prompts[0], ignore, eos_token_ids=(third,))])["a"]
    assert (out.token_ids, out.finish_reason) == (free.token_ids, "length")
    later = SamplingParams(temperature=0, max_tokens=12, min_tokens=8)
    out = run(engine, [request("a", prompts[0], later, eos_token_ids=(third,))])["a"]
    assert len(out.token_ids) >= 8 and third not in out.token_ids[:8]


def test_context_end(engine, prompts):
    """max_tokens=None runs to the context's end and not a token further."""
    sampling = SamplingParams(temperature=0, max_tokens=None)
    out = run(engine, [request("a", prompts[0], sampling)])["a"]
    assert (len(out.token_ids), out.finish_reason) == (128 - 32, "length")


def test_abort_frees_everything(engine, prompts):
    for i in range(30):
        engine.add_request(request(i, prompts[i % 2], SamplingParams(max_tokens=90, seed=i)))
    for _ in range(12):
        engine.step()
    assert engine.stats().num_running == 16 and engine.stats().num_waiting == 14
    engine.abort([str(i) for i in range(28)] + ["never heard of"])
    engine.check()
    left = drain(engine)
    assert set(left) == {"28", "29"} and all(len(o.token_ids) == 90 for o in left.values())


def test_priority(engine, prompts):
    """Lower first, then first come."""
    first_heard: list[str] = []
    for i in range(40):
        engine.add_request(request(i, prompts[0][:5], priority=-(i // 20)))
    while engine.has_work:
        first_heard += [o.request_id for o in engine.step() if o.request_id not in first_heard]
    assert set(first_heard[:20]) == {str(i) for i in range(20, 40)}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": [160]}, "prompt", "vocabulary of 160"),
        ({"prompt": [-1]}, "prompt", "vocabulary of 160"),
        ({"prompt": [5] * 128}, "prompt", "maximum context length is 128 tokens"),
        ({"sampling": SamplingParams(logit_bias={160: 1})}, "logit_bias", "160"),
        ({"sampling": SamplingParams(stop_token_ids=[999])}, "stop_token_ids", "999"),
        ({"sampling": SamplingParams(allowed_token_ids=[160])}, "allowed_token_ids", "160"),
        ({"sampling": SamplingParams(logprobs=21)}, "logprobs", "at most 20"),
        ({"sampling": SamplingParams(prompt_logprobs=-1)}, "prompt_logprobs", "at most 20"),
    ],
)
def test_bad_requests_change_nothing(engine, fields, param, says):
    fields = {"name": "bad", "prompt": [5], **fields}
    with pytest.raises(InvalidRequest, match=says) as error:
        engine.add_request(request(**fields))
    assert error.value.param == param
    assert not engine.has_work


def test_a_request_id_is_used_once(engine):
    engine.add_request(request("same", [5]))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add_request(request("same", [6]))
    drain(engine)


def test_a_compile_cache_others_could_write_to_is_refused(tmp_path):
    own, shared = tmp_path / "own", tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    with pytest.raises(PlanError, match="chmod go-w"):
        Store(shared)
    Store(own)
    assert own.stat().st_mode & 0o777 == 0o700


def test_no_step_outlives_the_engine(model):
    """One that ends after the interpreter has ended aborts the process."""
    engine = Engine(model, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64)
    engine.add_request(request(0, [1, 2, 3], SamplingParams(temperature=0, max_tokens=40)))
    engine.step()
    in_flight = engine._in_flight
    assert in_flight
    del engine
    gc.collect()
    assert not in_flight
