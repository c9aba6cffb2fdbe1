"""What the command line says of the other hosts."""

import pytest

from xlinfer.flags import UsageError
from xlinfer.serve.__main__ import main
from xlinfer.serve.flags import is_multihost, parse
from xlinfer.serve.multihost import cluster_from

HAND = ["--coordinator-address=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]


def values_of(*arguments: str):
    values = parse(["serve", *arguments])
    assert values is not None
    return values


def test_a_cluster_by_hand():
    values = values_of(*HAND, "--heartbeat_timeout_s=7")
    cluster = cluster_from(values)
    assert is_multihost(values) and not cluster.leads
    assert (cluster.host, cluster.port, cluster.bind) == ("10.0.0.1", 8476, "10.0.0.1")
    assert (cluster.num_processes, cluster.process_id, cluster.key) == (2, 1, b"")
    assert cluster.heartbeat_timeout_s == 7
    assert cluster_from(values_of(*HAND, "--coordinator_bind_address=::1")).bind == "::1"


def test_one_host_is_no_cluster():
    assert not is_multihost(values_of())
    assert is_multihost(values_of("--multihost"))


def test_the_key_is_of_a_file_or_of_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("f" * 64 + "\n")
    monkeypatch.setenv("XLINFER_PLAN_KEY", "e" * 32)
    assert cluster_from(values_of(*HAND)).key == b"e" * 32
    assert cluster_from(values_of(*HAND, f"--plan_key_file={file}")).key == b"f" * 64
    file.write_text("short")
    with pytest.raises(UsageError, match="key holds 5 bytes; a key must have at least 32"):
        cluster_from(values_of(*HAND, f"--plan_key_file={file}"))
    with pytest.raises(UsageError, match="No such file"):
        cluster_from(values_of(*HAND, "--plan_key_file=/does/not/exist"))


def test_a_half_described_cluster_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--coordinator_address=10.0.0.1:8476"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --num_processes and --process_id must be given: this is none of")
