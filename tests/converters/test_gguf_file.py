"""GGUF files read back exactly; malformed ones are refused before any data is read."""

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.errors import CheckpointError
from converters.formats.gguf import BLOCKS, find_gguf, read_gguf, read_gguf_tensor
from tests.gguf_files import entry, text, value, write_gguf

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
F32 = np.arange(6, dtype=np.float32)
TENSORS = {
    "a.weight": ("F32", (2, 3), F32.tobytes()),
    "b.weight": ("Q8_0", (2, 64), bytes(range(136))),
    "c.weight": ("BF16", (3,), b"\x80\x3f\x00\x40\x40\x40"),
}
METADATA = {
    "general.architecture": "llama",
    "count": 7,
    "eps": 0.5,
    "flag": True,
    "words": ["a", "", "ü"],
    "numbers": [1, 2, 3],
    "flags": [False, True],
    "nothing": [],
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_what_is_written_reads_back(version, alignment, tmp_path):
    metadata = METADATA | ({} if alignment is None else {"general.alignment": alignment})
    held = read_gguf(write_gguf(tmp_path / "m.gguf", metadata, TENSORS, version=version))
    assert held.metadata == metadata
    assert {name: info.shape for name, info in held.tensors.items()} == {
        name: shape for name, (_, shape, _) in TENSORS.items()
    }
    a, b, c = (read_gguf_tensor(held.tensors[name]) for name in TENSORS)
    np.testing.assert_array_equal(a, F32.reshape(2, 3))
    assert b.dtype == np.uint8 and b.shape == (2, 68) and b.tobytes() == bytes(range(136))
    np.testing.assert_array_equal(c.astype(np.float32), [1, 2, 3])
    assert not a.flags.writeable and not b.flags.writeable


@pytest.mark.parametrize("kind", BLOCKS)
def test_bytes_of_a_row_of_every_type_of_blocks(kind):
    """As the format's own package has them."""
    name = gguf.GGMLQuantizationType(kind).name
    assert (name, *gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]) == (
        BLOCKS[kind].name, BLOCKS[kind].elements, BLOCKS[kind].nbytes,
    )  # fmt: skip


def header(tensors=(), keys=(), *, version=3, counts=None) -> bytes:
    """A header of encoded tensor infos and pairs; `counts` of them, if it lies."""
    stated = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", version, *stated) + b"".join([*keys, *tensors])


def one(kind=0, shape=(2, 3), offset=0, name="t") -> bytes:
    return entry(name, kind, shape, offset)


NO_TYPE = text("k") + struct.pack("<I", 13)
NESTED = text("k") + struct.pack("<IIQ", 9, 9, 1)
OF_TEXT = struct.pack("<I", 8)
LONG = struct.pack("<Q", 1 << 60)
BAD = {
    "empty": (b"", "is empty"),
    "GGJT": (b"tjgg" + bytes(60), "It is GGJT"),
    "GGML": (b"lmgg" + bytes(60), "It is GGML"),
    "another file": (b"PK\x03\x04" + bytes(60), "not a GGUF file: it begins with b'PK"),
    "version 1": (header(version=1), "GGUF version 1"),
    "version 4": (header(version=4), "GGUF version 4"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "cut in the counts": (b"GGUF" + struct.pack("<I", 3) + bytes(9), "its count of keys"),
    "more tensors than the file holds": (header([one()], counts=(1 << 60, 0)), "is truncated"),
    "more keys than the file holds": (header(counts=(0, 1 << 60)), "is truncated"),
    "key of 2^60 bytes": (header(keys=[LONG]), "truncated: a key of its metadata"),
    "value of 2^60 bytes": (header(keys=[text("k") + OF_TEXT + LONG]), "truncated: 'k'"),
    "array of 2^60 numbers": (
        header(keys=[text("k") + struct.pack("<II", 9, 10) + LONG]), "truncated: 'k'",
    ),
    "array of 2^60 strings": (
        header(keys=[text("k") + struct.pack("<II", 9, 8) + LONG]), "truncated: 'k'",
    ),
    "a string of an array past the end": (
        header(keys=[text("k") + struct.pack("<IIQ", 9, 8, 1) + LONG]), "truncated: 'k'",
    ),
    "type of value": (header(keys=[NO_TYPE]), "'k' has type 13"),
    "array of arrays": (header(keys=[NESTED]), "'k' is an array of type 9"),
    "key twice": (header(keys=[text("k") + value(1)] * 2), "names 'k' twice"),
    "key not UTF-8": (header(keys=[text(b"\xff") + value(1)]), "not UTF-8"),
    "word not UTF-8": (
        header(keys=[text("k") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff")]), "not UTF-8",
    ),
    "five axes": (header([one(shape=(1,) * 5)]), "5 axes"),
    "2^31 axes": (header([text("t") + struct.pack("<I", 1 << 31)]), "more than 4"),
    "type of tensor": (header([one(kind=99)]), "'t' is of an unknown type, 99"),
    "IQ2_XS": (header([one(kind=17)]), "'t' is of type IQ2_XS; xlinfer reads F32"),
    "TQ1_0": (header([one(kind=34)]), "'t' is of type TQ1_0"),
    "integers": (header([one(kind=26)]), "'t' is of type I32"),
    "row not made of blocks": (header([one(kind=12, shape=(2, 128))]), "Q4_K [2, 128]"),
    "scalar of blocks": (header([one(kind=12, shape=())]), "Q4_K []"),
    "tensor twice": (header([one(), one(offset=32)]) + bytes(256), "names tensor 't' twice"),
    "tensors that overlap": (
        header([one(shape=(9,)), one(name="u", offset=32)]) + bytes(256), "'t' and 'u' overlap",
    ),
    "tensor past the end": (header([one(offset=64)]) + bytes(64), "truncated: tensor 't'"),
    "offset of 2^63": (header([one(offset=1 << 63)]) + bytes(64), "truncated: tensor 't'"),
    "shape of 2^120": (header([one(shape=(1 << 60, 1 << 60))]) + bytes(64), "tensor 't'"),
    "offset not aligned": (header([one(offset=4)]) + bytes(64), "no multiple of the alignment 32"),
    "alignment of 12": (
        header(keys=[text("general.alignment") + value(12)]), "general.alignment is 12",
    ),
    "alignment of no number": (
        header(keys=[text("general.alignment") + value("x")]), "general.alignment is 'x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_malformed_files_are_refused(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_damage_ends_in_another_error(data, tmp_path):
    """Whatever is damaged or cut, tensors lie in the file or the file is refused."""
    path = write_gguf(tmp_path / "m.gguf", METADATA, TENSORS)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(4, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        held = read_gguf(path)
    except CheckpointError:
        return
    for info in held.tensors.values():
        assert read_gguf_tensor(info).nbytes == info.nbytes


def split(folder: Path, **changes) -> Path:
    for part, (name, tensor) in enumerate(TENSORS.items()):
        metadata = {"split.no": part, "split.count": 3, "split.tensors.count": 3}
        if part == changes.get("part"):
            metadata |= changes["metadata"]
        write_gguf(folder / f"m-{part + 1:05}-of-00003.gguf", metadata, {name: tensor})
    return folder / "m-00001-of-00003.gguf"


def test_a_split_model_is_read_whole(tmp_path):
    held = read_gguf(split(tmp_path))
    assert list(held.tensors) == list(TENSORS)
    for name, (_, _, content) in TENSORS.items():
        assert read_gguf_tensor(held.tensors[name]).tobytes() == content
    assert find_gguf(tmp_path) == held.path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"part": 1, "metadata": {"split.no": 2}}, "does not say that it is part 2 of 3"),
        ({"part": 2, "metadata": {"split.count": 4}}, "does not say that it is part 3 of 3"),
        ({"part": 0, "metadata": {"split.tensors.count": 4}}, "hold 3 tensors and should 4"),
        ({"part": 0, "metadata": {"split.no": 1}}, "give the first"),
    ],
)
def test_parts_that_do_not_belong_together(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_gguf(split(tmp_path, **changes))


def test_parts_that_are_missing_renamed_or_not_the_first(tmp_path):
    first = split(tmp_path)
    with pytest.raises(CheckpointError, match="give the first"):
        read_gguf(first.with_name("m-00002-of-00003.gguf"))
    first.with_name("m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf is missing"):
        read_gguf(first)
    with pytest.raises(CheckpointError, match="give the first"):
        read_gguf(first.rename(tmp_path / "renamed.gguf"))
    (tmp_path / "renamed.gguf").unlink()
    with pytest.raises(CheckpointError, match="lacks the first part"):
        find_gguf(tmp_path)


def test_the_model_of_a_folder(tmp_path):
    assert find_gguf(tmp_path) is None
    one = write_gguf(tmp_path / "one.gguf", {}, {})
    assert find_gguf(tmp_path) == find_gguf(one) == one
    write_gguf(tmp_path / "two.gguf", {}, {})
    with pytest.raises(CheckpointError, match=r"several models: one\.gguf, two\.gguf"):
        find_gguf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None


@pytest.mark.parametrize("name", ["q4_0", "q4_k_m", "q8_0"])
def test_llama_cpps_files(name):
    """Written by llama.cpp's own quantizer; read alike by the format's own package."""
    path = GOLDENS / f"gguf-{name}" / "model.gguf"
    held, theirs = read_gguf(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert held.metadata[key] == field.contents(), key
    assert held.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        info = held.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(read_gguf_tensor(info), tensor.data)
