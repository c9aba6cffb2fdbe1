"""Well-formed files read back exactly; malformed ones are refused before any data is read."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.formats.safetensors import DTYPES, read_folder, read_header, read_tensor

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def file(path: Path, header, data: int | bytes = 32, length=None) -> Path:
    """A file of `header` (an object or raw bytes) and `data` bytes, or these bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    body = data if isinstance(data, bytes) else bytes(range(data))
    path.write_bytes(size.to_bytes(8, "little") + text + body)
    return path


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_back(name, tmp_path):
    dtype = DTYPES[name]
    bits = np.random.default_rng(0).integers(0, 2 if name == "BOOL" else 256, 3 * dtype.itemsize)
    data = bits.astype(np.uint8).tobytes()
    entry = {"dtype": name, "shape": [3, 1], "data_offsets": [0, len(data)]}
    info = read_header(file(tmp_path / "t", {"t": entry}, data))["t"]
    array = read_tensor(info)
    assert array.dtype == dtype and array.shape == (3, 1) and not array.flags.writeable
    assert array.tobytes() == data


def test_what_the_safetensors_package_writes(tmp_path):
    held = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "scalar": np.array(1.5, np.float64),
        "empty": np.zeros((0, 4), np.float32),
        "a": np.arange(3).astype(ml_dtypes.bfloat16),
    }
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    infos = read_folder(tmp_path)
    assert infos.keys() == held.keys()
    for name, want in held.items():
        np.testing.assert_array_equal(read_tensor(infos[name]), want)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    infos = read_header(file(tmp_path / "t", {"b": B, "a": A}))
    assert list(infos) == ["a", "b"]
    assert infos["b"].offset == infos["a"].offset + 24


BAD = {
    "no header": (b"", 0, None, "JSON cannot be read"),
    "header longer than the file": ({"a": A}, 24, 10_000, "10000 bytes"),
    "enormous header": ({"a": A}, 24, 2**63, "not a whole safetensors file"),
    "not JSON": (b"{'a': 1}", 0, None, "JSON cannot be read"),
    "not UTF-8": (b'{"\xff": 1}', 0, None, "JSON cannot be read"),
    "too deep": (b'{"a":' + b"[" * 100_000, 0, None, "JSON cannot be read"),
    "a list": (b"[]", 0, None, "must be an object"),
    "a name twice": (b'{"a": 1, "a": 2}', 0, None, "names a twice"),
    "metadata": ({"__metadata__": 3}, 0, None, "__metadata__"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, None, "'a' must have"),
    "unknown dtype": ({"a": {**A, "dtype": "F4"}}, 24, None, "'a' has dtype 'F4'"),
    "dtype of a wrong type": ({"a": {**A, "dtype": ["F32"]}}, 24, None, "'a' has dtype"),
    "negative size": ({"a": {**A, "shape": [-2, -3]}}, 24, None, "'a' has shape"),
    "true as a size": ({"a": {**A, "shape": [True, 6]}}, 24, None, "'a' has shape"),
    "a real size": ({"a": {**A, "shape": [2.0, 3]}}, 24, None, "'a' has shape"),
    "one offset": ({"a": {**A, "data_offsets": [24]}}, 24, None, "'a' has data_offsets"),
    "backward": ({"a": {**A, "data_offsets": [24, 0]}}, 24, None, "'a' has data_offsets"),
    "too few bytes": ({"a": {**A, "data_offsets": [0, 20]}}, 20, None, "takes 24 bytes"),
    "a shape that wraps": ({"a": {**A, "shape": [2**62, 16]}}, 24, None, "'a'"),
    "truncated": ({"a": A, "b": B}, 31, None, "'b' ends at byte .*the file at"),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [20, 28]}}, 28, None, "'b' starts at byte 20"),
    "same place": ({"a": A, "b": A}, 24, None, "starts at byte 0"),
    "gap": ({"a": A, "b": {**B, "data_offsets": [28, 36]}}, 36, None, "'b' starts at byte 28"),
    "late start": ({"a": {**A, "data_offsets": [8, 32]}}, 32, None, "'a' starts at byte 8"),
    "trailing bytes": ({"a": A}, 25, None, "the file at"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused(case, tmp_path):
    header, data, length, message = BAD[case]
    path = file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_folder(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_shorter_than_its_length_is_refused(size, tmp_path):
    (tmp_path / "t").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"not a whole safetensors file.*has {size}"):
        read_header(tmp_path / "t")


def test_a_header_above_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 50)
    with pytest.raises(CheckpointError, match="a header at most 50"):
        read_header(file(tmp_path / "t", {"a": A, "b": B}))


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = file(tmp_path / "t", {"a": A})
    info = read_header(file(path, {"a": A}, 24))["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="'a'"):
        read_tensor(info)
    path.unlink()
    with pytest.raises(CheckpointError, match="'a'"):
        read_tensor(info)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


WHOLE = json.dumps({"__metadata__": {"format": "pt"}, "a": A, "b": B}).encode()
edits = st.lists(
    st.tuples(st.integers(0, 7 + len(WHOLE) + 32), st.binary(max_size=4), st.integers(0, 6)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=edits)
def test_any_mutation_is_refused_or_harmless(scratch, edits):
    """Bytes replaced, inserted and deleted anywhere: an error that names the file, or tensors that
    tile it and can be read."""
    raw = file(scratch, WHOLE).read_bytes()
    for at, new, removed in edits:
        raw = raw[:at] + new + raw[at + removed :]
    scratch.write_bytes(raw)
    check_tiled_or_refused(scratch)


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", 3]),
        "shape": st.lists(st.one_of(st.integers(-1, 8), st.integers(), st.none()), max_size=3),
        "data_offsets": st.lists(st.integers(-4, 48), min_size=1, max_size=3),
    }
)


@settings(max_examples=200, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), entries, max_size=4), size=st.integers(0, 64))
def test_any_header_is_refused_or_tiles_its_file(scratch, header, size):
    file(scratch, header, size)
    check_tiled_or_refused(scratch)


def check_tiled_or_refused(path):
    try:
        infos = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    size = path.stat().st_size
    at = size - sum(info.nbytes for info in infos.values())
    for info in infos.values():
        assert info.offset == at and at <= size
        assert read_tensor(info).shape == info.shape
        at += info.nbytes


def shards(folder, weight_map, **files):
    for name, header in files.items():
        file(folder / f"{name}.safetensors", header, 24)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards(tmp_path):
    shards(tmp_path, {"x": "s1.safetensors", "y": "s2.safetensors"}, s1={"x": A}, s2={"y": A})
    infos = read_folder(tmp_path)
    assert {name: info.file.name for name, info in infos.items()} == {
        "x": "s1.safetensors",
        "y": "s2.safetensors",
    }


@pytest.mark.parametrize(
    "name",
    ["../s1.safetensors", "/etc/passwd", "sub/s1.safetensors", "..", "", "a\\s1.safetensors",
     "s1.bin", "c:s1.safetensors", ".s1.safetensors", "s\0.safetensors", 3, None],
)  # fmt: skip
def test_an_index_cannot_point_elsewhere(name, tmp_path):
    index = shards(tmp_path, {"x": "s1.safetensors", "y": name}, s1={"x": A})
    with pytest.raises(CheckpointError, match=re.escape(f"{index}: tensor 'y'")):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"x": "s1.safetensors", "y": "s9.safetensors"}, "s9.safetensors is missing"),
        ({"x": "s1.safetensors", "z": "s1.safetensors"}, r"shards lack: z \(in s1.safetensors\)"),
        ({"x": "s2.safetensors"}, "s2.safetensors holds tensors .* place there: y"),
        ({}, "'weight_map' must be an object"),
        ([], "'weight_map' must be an object"),
    ],
)
def test_index_and_shards_must_agree(weight_map, message, tmp_path):
    shards(tmp_path, weight_map, s1={"x": A}, s2={"y": A})
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "names, message",
    [
        (["pytorch_model.bin", "training_args.bin"], "only as pickles .*save_pretrained"),
        (["consolidated.00.pth"], "only as pickles"),
        (["adapter_model.safetensors"], "but adapter_model.safetensors"),
        (["config.json"], "holds no weights"),
        (["model.safetensors", "model.safetensors.index.json"], "Remove the one that is stale"),
    ],
)
def test_folders_without_readable_weights(names, message, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
