"""torch's and FlashInfer's own kernels at the cases' shapes, timed as CUDA graphs by device events.

In a process without JAX's GPU client. Each result is first compared with plain float32 products;
what is not there or fails is reported with its reason.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

from tools.gpu_check import job as jobs
from tools.gpu_check.job import Job, progress, record, why
from tools.gpu_check.measure import MIN_CALLS, copies_for
from tools.gpu_check.targets import first_of

OTHERS = 3e-2  # ‖out - ref‖ / ‖ref‖, as in entrants.py
SECONDS = 0.1  # of measuring


class Trial(NamedTuple):
    name: str
    make: Callable[[], tuple]  # fresh arguments
    run: Callable[..., Any]
    want: Callable[..., Any] | None  # the same in float32; None: a yardstick of the same size
    reads: int | None = None  # of the arguments `run` reads this many, the others are for `want`


def main(job: Job) -> None:
    if importlib.util.find_spec("torch") is None:
        for op in job.ops:
            record(op=op, missing="torch is not installed")
        progress("torch is not installed")
        return
    for op in job.ops:
        record(op=op, begun=True)
        cases = jobs.cases_of(op)
        found = cases.CASES if job.dry_run else first_of(op, cases.MODEL_CASES, cases.work)
        wanted = [c for c in found if op in TRIALS][: jobs.DRY_CASES if job.dry_run else None]
        for at, case in enumerate(wanted):
            if job.left < 1:
                record(op=op, skipped=[c.name for c in wanted[at:]], why="out of time")
                break
            reports = [report for trial in TRIALS[op](case) if (report := _time(trial)) is not None]
            if reports:
                record(op=op, case=case.name, others=reports)
        progress(f"{op}: torch timed")


def _torch() -> Any:
    """Not in every environment, and its import takes seconds."""
    return importlib.import_module("torch")


def _device() -> str:
    torch = _torch()
    return "cuda" if torch.cuda.is_available() else "cpu"


def _time(trial: Trial) -> dict[str, Any]:
    torch = _torch()
    report: dict[str, Any] = {"name": trial.name, "yardstick": trial.want is None}
    try:
        with torch.no_grad():
            args = trial.make()
            size = sum(a.numel() * a.element_size() for a in args[: trial.reads])
            copies = copies_for(size, _device() == "cpu")
            sets = [args, *(trial.make() for _ in range(copies - 1))]
            if trial.want is not None:
                got, want = trial.run(*args).float(), trial.want(*args)
                report["l2_error"] = float((got - want).norm() / want.norm())
                report["ok"] = report["l2_error"] <= OTHERS
                del got, want
            report["ms"] = _ms(trial.run, sets)
    except Exception as error:
        report["why"] = why(error)
    return report


def _ms(run: Callable, sets: list[tuple]) -> float:
    """Of a call; the median of five."""
    torch = _torch()
    calls = len(sets) * -(-MIN_CALLS // len(sets))
    chain = lambda: [run(*sets[i % len(sets)]) for i in range(calls)]
    if _device() == "cpu":
        started = time.perf_counter()
        chain()
        return 1e3 * (time.perf_counter() - started) / calls
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        chain()

    def timed(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    timed(1)
    times = max(int(1e3 * SECONDS / (5 * timed(1))), 1)
    return median(timed(times) / (times * calls) for _ in range(5))


def _product(x: Any, w: Any) -> Any:
    return x.float() @ w.float().T


def _dense(M: int, N: int, K: int, *, name: str, yardstick: bool = False) -> Trial:
    """x @ w.T in bf16, the way torch calls cuBLASLt."""
    torch = _torch()
    make = lambda: (_normal(M, K), _normal(N, K))
    run = lambda x, w: torch.nn.functional.linear(x, w)
    return Trial(name, make, run, None if yardstick else _product)


def _normal(*shape: int) -> Any:
    torch = _torch()
    return torch.randn(shape, device=_device(), dtype=torch.bfloat16)


def _int4_matmul(case: Any) -> Iterator[Trial]:
    torch = _torch()
    M, N, K, group = case.M, case.N, case.K, case.group
    yield _dense(M, N, K, name="torch bf16 product")

    def make():
        w = torch.randint(0, 16, (N, K), device=_device(), dtype=torch.int32)
        scale_GN = torch.rand(K // group, N, device=_device(), dtype=torch.bfloat16) + 0.5
        # Two in a byte, the even one high; its grid is (q - 8) * scale + zero.
        if _device() == "cuda":
            packed = torch._convert_weight_to_int4pack(
                (w[:, ::2] << 4 | w[:, 1::2]).to(torch.uint8), 8
            )
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(w, 1)
        pairs = torch.stack([scale_GN, torch.zeros_like(scale_GN)], -1).contiguous()
        return _normal(M, K), packed, pairs, w, scale_GN

    def run(x, packed, pairs, w, scale_GN):
        product = (
            torch._weight_int4pack_mm if _device() == "cuda" else torch._weight_int4pack_mm_for_cpu
        )
        return product(x, packed, group, pairs)

    def want(x, packed, pairs, w, scale_GN):
        scale = scale_GN.float().T.repeat_interleave(group, 1)
        return x.float() @ ((w.float() - 8) * scale).T

    yield Trial("torch _weight_int4pack_mm", make, run, want, reads=3)


def _fp8_matmul(case: Any) -> Iterator[Trial]:
    torch = _torch()
    M, N, K = case.M, case.N, case.K
    yield _dense(M, N, K, name="torch bf16 product")
    float8 = lambda *shape: _normal(*shape).to(torch.float8_e4m3fn)
    ones = lambda *shape: torch.rand(shape, device=_device()) + 0.5

    def scaled(x, w, x_scale, w_scale):
        return torch._scaled_mm(x, w.t(), x_scale, w_scale, out_dtype=torch.bfloat16)

    def whole(x, w, x_scale, w_scale):
        return x_scale * _product(x, w) * w_scale

    yield Trial("torch _scaled_mm, one scale", lambda: (float8(M, K), float8(N, K), ones(), ones()),
                scaled, whole)  # fmt: skip
    make = lambda: (float8(M, K), float8(N, K), ones(M, 1), ones(1, N))
    yield Trial("torch _scaled_mm, row scales", make, scaled, whole)
    if case.scales != "block" or K % 128 or N % 128:
        return

    def blocks():
        # cuBLASLt wants the activations' scales with tokens contiguous.
        x_scale = ones(K // 128, M).t()
        return float8(M, K), float8(N, K), x_scale, ones(N // 128, K // 128).t()

    def by_block(x, w, x_scale, w_scale):
        x = x.float() * x_scale.repeat_interleave(128, 1)
        w_scale = w_scale.t().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return x @ (w.float() * w_scale).T

    yield Trial("torch _scaled_mm, block scales", blocks, scaled, by_block)


def _grouped_matmul(case: Any) -> Iterator[Trial]:
    torch = _torch()
    K, N, E, M = case.K, case.N, len(case.sizes), sum(case.sizes)
    yield _dense(M, N, K, name="torch one dense bf16 product", yardstick=True)

    def make():
        ends = torch.tensor(case.sizes, device=_device(), dtype=torch.int32).cumsum(0)
        return _normal(M, K), _normal(E, N, K), ends.to(torch.int32)

    def want(x, w, ends):
        rows = [0, *ends.tolist()]
        parts = zip(rows[:-1], rows[1:], range(E), strict=True)
        return torch.cat([_product(x[a:b], w[e]) for a, b, e in parts])

    run = lambda x, w, ends: torch._grouped_mm(x, w.transpose(-2, -1), ends)
    yield Trial("torch _grouped_mm in bf16", make, run, want)


def _int8_matmul(case: Any) -> Iterator[Trial]:
    torch = _torch()
    M, N, K = case.M, case.N, case.K
    yield _dense(M, N, K, name="torch bf16 product")
    if case.activations != "int8":
        return
    ints = lambda *shape: torch.randint(-127, 128, shape, device=_device(), dtype=torch.int8)
    make = lambda: (ints(M, K), ints(N, K))
    yield Trial(
        "torch _int_mm, without scales", make, lambda x, w: torch._int_mm(x, w.t()), _product
    )


def _flash_attention(case: Any) -> Iterator[Trial]:
    torch = _torch()
    attention: Any = importlib.import_module("torch.nn.attention")

    if case.window or case.sinks or case.alibi or case.softcap is not None or case.lengths:
        return
    scale = case.scale or case.H**-0.5
    heads = lambda n, width: _normal(case.B, n, case.T, width)
    make = lambda: (heads(case.N, case.H), heads(case.K, case.H), heads(case.K, case.V))

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, scale=scale, enable_gqa=case.N != case.K
        )

    def by(backend):
        def run(q, k, v):
            with attention.sdpa_kernel([backend]):
                return attend(q, k, v)

        return run

    def want(q, k, v):
        group = case.N // case.K
        one = lambda q, k, v: _softmax(q @ k.T * scale, case.causal) @ v
        rows = [
            torch.stack([one(q[b, n].float(), k[b, n // group].float(), v[b, n // group].float())
                         for n in range(case.N)])
            for b in range(case.B)
        ]  # fmt: skip
        return torch.stack(rows)

    yield Trial("torch SDPA, flash", make, by(attention.SDPBackend.FLASH_ATTENTION), want)
    yield Trial("torch SDPA, cudnn", make, by(attention.SDPBackend.CUDNN_ATTENTION), want)


def _softmax(logits: Any, causal: bool) -> Any:
    torch = _torch()
    if causal:
        ahead = torch.ones(logits.shape, device=logits.device, dtype=torch.bool).triu(1)
        logits.masked_fill_(ahead, float("-inf"))
    return torch.softmax(logits, -1)


def _paged_attention(case: Any) -> Iterator[Trial]:
    """FlashInfer over the same pages; torch has no paged attention of its own."""
    plain = not (case.sinks or case.alibi) and case.softcap is None and case.window >= 2**30
    decode = set(case.queries) == {1} and str(case.dtype) == "bfloat16" and case.kv_dtype is None
    if not plain or not decode or importlib.util.find_spec("flashinfer") is None:
        return
    flashinfer: Any = importlib.import_module("flashinfer")
    torch = _torch()
    where = jobs.cases_of("paged_attention").layout(case)
    scale, (P, S) = case.scale or case.H**-0.5, where.readable_PS.shape
    lengths = [old + 1 for old in case.cached]
    pages = [-(-n // S) for n in lengths]
    on = lambda x: torch.tensor(x, device=_device(), dtype=torch.int32)
    rows = [[int(p) for p in where.ragged.pages_RM[r, :n]] for r, n in enumerate(pages)]
    ends = [sum(pages[:i]) for i in range(len(pages) + 1)]
    room = torch.empty(2**28, device=_device(), dtype=torch.uint8)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=True)
    wrapper.plan(
        on(ends), on([p for row in rows for p in row]), on([(n - 1) % S + 1 for n in lengths]),
        case.N, case.K, case.H, S, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        sm_scale=scale,
    )  # fmt: skip
    make = lambda: (_normal(len(rows), case.N, case.H), _normal(P, case.K, S, case.H),
                    _normal(P, case.K, S, case.H))  # fmt: skip

    def want(q, k, v):
        group, out = case.N // case.K, []
        for r, n in enumerate(lengths):
            dense = lambda x, r=r, n=n: x[rows[r]].movedim(1, 0).flatten(1, 2)[:, :n].float()
            keys, values = dense(k), dense(v)
            q_KGH = q[r].float().unflatten(0, (case.K, group))
            p_KGn = torch.softmax(q_KGH @ keys.transpose(1, 2) * scale, -1)
            out.append((p_KGn @ values).flatten(0, 1))
        return torch.stack(out)

    yield Trial("FlashInfer decode", make, lambda q, k, v: wrapper.run(q, (k, v)), want)


TRIALS: dict[str, Callable[[Any], Iterator[Trial]]] = {
    "paged_attention": _paged_attention,
    "flash_attention": _flash_attention,
    "int4_matmul": _int4_matmul,
    "int8_matmul": _int8_matmul,
    "fp8_matmul": _fp8_matmul,
    "grouped_matmul": _grouped_matmul,
}
