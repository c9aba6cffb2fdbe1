import json
import subprocess
import sys

import pytest

from pallas_kernels.cases import OPS
from pallas_kernels.devices import DEVICES
from tools.aot import __main__ as aot

JOB = aot.Job("int4_matmul", "some_case", "mosaic_gpu", "h200")
GOOD = {
    "seconds": 1.0,
    "temp_bytes": 10,
    "alias_bytes": 0,
    "flops": 100.0,
    "bytes": 50.0,
    "registers": 168,
    "spilled": 0,
    "work": {"flops": 100, "bytes": 50, "forbidden_bytes": 1000, "most_flops": None},
}


def test_a_good_report_has_no_fault():
    assert aot.faults(JOB, GOOD) == []
    assert aot.faults(JOB._replace(impl="mosaic_tpu", device="v6e"), GOOD) == []


@pytest.mark.parametrize(
    ("job", "change", "said"),
    [
        (JOB, {"spilled": 8}, "8 bytes of registers spilled"),
        (JOB, {"registers": None}, "no kernel was compiled"),
        (JOB, {"temp_bytes": 1000}, "enough for a copy of the weights"),
        (JOB._replace(impl="mosaic_tpu"), {"flops": 10.0}, "0.10 of the flops"),
        (JOB._replace(impl="mosaic_tpu"), {"bytes": 500.0}, "10.00 of the bytes"),
        (JOB._replace(impl="mosaic_tpu"), {"flops": None}, "0.00 of the flops"),
    ],
    ids=["spill", "nothing", "copy", "flops", "bytes", "no_estimate"],
)
def test_what_must_not_be_is_named(job, change, said):
    (fault,) = aot.faults(job, GOOD | change)
    assert said in fault


def test_programs_must_hold_kernels_alias_their_cache_and_copy_no_weights():
    job = aot.Job(aot.ENGINE, "decode_8", "none", "h200")
    good = {
        "spilled": 0, "registers": 168, "alias_bytes": 100, "cache_bytes": 100,
        "temp_bytes": 5, "most_temp_bytes": 5, "kernels": 1, "unwanted": [],
    }  # fmt: skip
    assert aot.faults(job, good) == []
    assert "the cache is copied" in aot.faults(job, good | {"alias_bytes": 99})[0]
    assert "such: __triton_gemm" in aot.faults(job, good | {"unwanted": ["__triton_gemm"]})[0]
    assert "no Pallas kernel" in aot.faults(job, good | {"kernels": 0})[0]
    assert "6 bytes of temporaries, at most 5" in aot.faults(job, good | {"temp_bytes": 6})[0]


def test_devices_must_exchange_what_is_planned():
    job = aot.Job(aot.COLLECTIVES, "dense", "-", "v6e")
    good = {"spilled": 0, "registers": None, "planned": [["all-reduce", 8, 8, 1, 2]]}
    assert aot.faults(job, good | {"found": good["planned"]}) == []
    (fault,) = aot.faults(job, good | {"found": [["all-reduce", 8, 8, 1, 3]]})
    assert "XLA made [['all-reduce', 8, 8, 1, 3]]" in fault
    assert aot.jobs([aot.COLLECTIVES], ["v5p"], "dense", fast=False) == []


def answering(monkeypatch, returncode: int, stdout: str, stderr: str = ""):
    done = subprocess.CompletedProcess([], returncode, stdout, stderr)
    monkeypatch.setattr(aot.subprocess, "run", lambda *a, **k: done)


def test_spills_and_registers_are_read_from_ptxas(monkeypatch):
    ptxas = (
        "ptxas info : Used 154 registers, used 2 barriers\n"
        "    56 bytes stack frame, 100 bytes spill stores, 88 bytes spill loads\n"
        "ptxas info : Used 232 registers\n"
    )
    answering(monkeypatch, 0, ptxas + json.dumps(GOOD))
    outcome = aot.run(JOB)
    assert (outcome.report["registers"], outcome.report["spilled"]) == (232, 188)
    assert "188 bytes of registers spilled" in outcome.faults[0]


def test_a_compiler_that_dies_costs_its_own_row_alone(monkeypatch):
    answering(monkeypatch, -6, "", "F0000 check failed: tiling.cc:557\n")
    outcome = aot.run(JOB)
    assert outcome.faults == ["exit -6: F0000 check failed: tiling.cc:557"]
    assert "exit -6" in aot.row(outcome)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_for_every_kind_of_device(op):
    for name in ("h200", "v6e"):
        found = aot.jobs([op], [name], None, fast=True)
        assert found, f"{op} compiles nothing for {name}"
        assert {job.device for job in found} <= set(DEVICES)


def test_nothing_to_compile_is_a_failure(capsys):
    assert aot.main(["--op=int4_matmul", "--case=no_such_case"]) == 1
    assert "no case fits" in capsys.readouterr().out


def test_an_unknown_device_is_refused():
    command = [sys.executable, "-m", "tools.aot", "--device=a100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "h200" in done.stderr
