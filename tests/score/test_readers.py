import gzip
import itertools
import json
import os

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.score.fake import job_of, quiet
from xlinfer.score import inputs, readers
from xlinfer.score.inputs import InputError, find_inputs
from xlinfer.score.planning import plan
from xlinfer.score.readers import MAX_LINE_BYTES, Line, Reader, lines
from xlinfer.score.rows import Row, Scored

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
GOOD, BLANK, BROKEN = "good", "blank", "broken"


def read_all(job):
    """(id, values or error) of every row, by shards, and the manifest."""
    manifest = plan(job, quiet)
    reader, found = Reader(job), []
    for shard in manifest.shards:
        rows = [row for _, row in reader.rows(shard)]
        numbers = [(row.row if isinstance(row, Scored) else row).number for row in rows]
        assert numbers == list(range(shard.rows)) and 0 < shard.rows <= job.rows_per_shard
        found += [
            (row.id, row.values) if isinstance(row, Row) else (row.row.id, str(row.result))
            for row in rows
        ]
    assert len(found) == manifest.rows
    return found, manifest


@given(
    data=st.lists(st.sampled_from([b"", b"a", b"bc", b"\r", b"defgh" * 3])).map(b"\n".join),
    size=st.integers(1, 20),
    most=st.integers(1, 12),
)
def test_lines_are_those_of_split_whatever_the_blocks(data, size, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MAX_LINE_BYTES", most)
        found = list(lines(data[n : n + size] for n in range(0, len(data), size)))
    pieces = data.split(b"\n")
    whole = pieces if pieces[-1] else pieces[:-1]
    want = [Line(len(p) + 1, p if len(p) <= most else None) for p in whole]
    if data and not data.endswith(b"\n"):
        want[-1] = want[-1]._replace(size=len(pieces[-1]))
    assert found == want


@settings(max_examples=30)
@given(
    files=st.lists(
        st.lists(st.sampled_from([GOOD, BLANK, BROKEN]), max_size=12).filter(lambda k: GOOD in k),
        min_size=1, max_size=4,
    ),
    suffix=st.sampled_from(list(COMPRESS)),
    rows_per_shard=st.integers(1, 9),
    ended=st.booleans(),
    crlf=st.booleans(),
)  # fmt: skip
def test_every_row_is_in_one_shard(files, suffix, rows_per_shard, ended, crlf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    end = b"\r\n" if crlf else b"\n"
    want = []
    for index, kinds in enumerate(files):
        texts = []
        for line, kind in enumerate(kinds, 1):
            value, where = f"{index} {line} ü", f"{index}.jsonl{suffix}:{line}"
            texts.append(
                {GOOD: json.dumps({"prompt": value}).encode(), BLANK: b" ", BROKEN: b"{"}[kind]
            )
            if kind == GOOD:
                want.append((where, {"prompt": value}))
            elif kind == BROKEN:
                want.append((where, None))
        data = end.join(texts) + (end if ended else b"")
        (folder / f"{index}.jsonl{suffix}").write_bytes(COMPRESS[suffix](data))
    job = job_of(folder / "*", id_column=None, rows_per_shard=rows_per_shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "BLOCK_BYTES", 64)
        found, _ = read_all(job)
    assert [name for name, _ in found] == [name for name, _ in want]
    for (_, values), (_, wanted) in zip(found, want, strict=True):
        assert values == wanted if wanted else values.startswith("not JSON: ")


@pytest.mark.parametrize("group", [1, 3, 10, 100])
@pytest.mark.parametrize("rows_per_shard", [1, 4, 7, 100])
def test_parquet_is_cut_inside_row_groups(group, rows_per_shard, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_ROWS", 2)
    for name, numbers in (("a", range(20)), ("b", range(20, 23))):
        table = pa.table({"prompt": [f"p{n}" for n in numbers], "key": list(numbers)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=group)
    found, _ = read_all(job_of(tmp_path / "*", rows_per_shard=rows_per_shard))
    assert found == [(str(n), {"prompt": f"p{n}"}) for n in range(23)]


def test_each_line_of_a_text_is_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\nthree \xff\nfour")
    found, _ = read_all(job_of(tmp_path / "a.txt", columns={"prompt": "text"}, id_column=None))
    assert found == [
        ("a.txt:1", {"prompt": "one"}),
        ("a.txt:2", {"prompt": ""}),
        ("a.txt:3", "not UTF-8: invalid start byte at byte 6"),
        ("a.txt:4", {"prompt": "four"}),
    ]


def test_small_files_share_shards(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n' * 2)
    _, manifest = read_all(job_of(tmp_path / "*", id_column=None, rows_per_shard=5))
    assert [shard.rows for shard in manifest.shards] == [4, 4, 2]


BAD_LINES = {
    '{"key": "a", "prompt"': "not JSON: ",
    "[1]": "a JSON list, not an object",
    '{"key": "a"}': "no prompt: its column 'prompt' is missing; there are 'key'",
    '{"key": "a", "prompt": null}': "no prompt: its column 'prompt' is null",
    '{"prompt": "x"}': "no id: its column 'key' is missing",
    '{"key": 1.5, "prompt": "x"}': "no id: its column 'key' is a float",
    '{"key": "a", "prompt": "\\ud83d"}': "not UTF-8: surrogates not allowed",
    "[" * 100_000: "not JSON: ",
    '{"key": "a", "prompt": ' + "9" * 5000 + "}": "not JSON: Exceeds the limit",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_a_bad_line_is_an_error_row_and_the_rest_goes_on(line, tmp_path):
    good = '{"key": "%s", "prompt": "ok"}'
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good % 1, line, good % 3]))
    found, _ = read_all(job_of(path))
    assert [found[0], found[2]] == [("1", {"prompt": "ok"}), ("3", {"prompt": "ok"})]
    assert found[1][0] in ("a", "rows.jsonl:2") and found[1][1].startswith(BAD_LINES[line])


def test_a_line_without_end_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + b"x" * 2**22 + b'\n{"prompt": "b"}')
    found, _ = read_all(job_of(path, id_column=None))
    assert [values for _, values in found] == [
        {"prompt": "a"}, "the line is longer than 1 MiB", {"prompt": "b"},
    ]  # fmt: skip
    assert MAX_LINE_BYTES > 2**22


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("left", [0.3, 0.95])
def test_a_truncated_file_is_named_before_any_work(suffix, left, tmp_path):
    rows = [{"prompt": os.urandom(20).hex(), "key": n} for n in range(2000)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(COMPRESS[suffix.removeprefix(".jsonl")](text))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(InputError, match=rf"rows{suffix} is truncated"):
        plan(job_of(path), quiet)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_not_compressed_as_its_name_says_is_named(suffix, tmp_path):
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match=rf"rows.jsonl{suffix}: "):
        plan(job_of(path), quiet)


def test_frames_and_members_may_follow_each_other(tmp_path):
    for suffix in (".gz", ".zst"):
        one = COMPRESS[suffix](b'{"prompt": "x"}\n')
        (tmp_path / f"a.jsonl{suffix}").write_bytes(one * 3)
    found, _ = read_all(job_of(tmp_path / "a.*", id_column=None))
    assert len(found) == 6


def test_a_column_that_no_row_has_is_refused_before_any_work(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x", "key": 1}\n' * 3)
    with pytest.raises(
        InputError, match=r"has no column 'prompt' \(--column=prompt=prompt\); it has text, key"
    ):
        plan(job_of(path), quiet)
    table = pa.table({"prompt": ["x"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"has no column 'key' \(--id_column=key\); it has prompt"):
        plan(job_of(tmp_path / "rows.parquet"), quiet)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_ids_that_are_there_twice_are_refused_with_both_places(suffix, tmp_path):
    rows = [{"key": f"k{n}", "prompt": "x"} for n in range(3000)]
    rows[2345]["key"] = "k17"
    for name, part in (("a", rows[:2000]), ("b", rows[2000:])):
        table = pa.Table.from_pylist(part)
        if suffix == "parquet":
            parquet.write_table(table, tmp_path / f"{name}.{suffix}")
        else:
            (tmp_path / f"{name}.{suffix}").write_text("\n".join(map(json.dumps, part)))
    message = rf"same id: a\.{suffix}:18 and b\.{suffix}:346\. Make"
    with pytest.raises(InputError, match=message):
        plan(job_of(tmp_path / f"*.{suffix}"), quiet)


def test_inputs_that_are_no_inputs(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "x.jsonl").write_text("\n")
    for pattern, message in (
        ("none*.jsonl", "there is no such file"),
        (".", "is a folder; name files, as in"),
        ("x.csv", "its name does not say what it holds"),
    ):
        with pytest.raises(InputError, match=message):
            find_inputs([os.path.join(tmp_path, pattern)], None)
    with pytest.raises(InputError, match="named twice"):
        find_inputs([str(tmp_path / "x.jsonl"), str(tmp_path / "*.jsonl")], None)
    with pytest.raises(InputError, match="the inputs hold no rows"):
        plan(job_of(tmp_path / "x.jsonl"), quiet)


@pytest.mark.parametrize("suffix", COMPRESS)
@given(order=st.permutations(range(5)), stops=st.lists(st.integers(1, 4), min_size=5, max_size=5))
def test_shards_may_be_read_in_any_order_and_left_in_the_middle(
    suffix, order, stops, tmp_path_factory
):
    path = tmp_path_factory.mktemp("in") / f"rows.jsonl{suffix}"
    text = "".join(f'{{"prompt": "{n}"}}\n\n' for n in range(20))
    path.write_bytes(COMPRESS[suffix](text.encode()))
    manifest = plan(job_of(path, id_column=None, rows_per_shard=4), quiet)
    reader = Reader(manifest.job)
    for index, stop in zip(order, stops, strict=True):
        rows = itertools.islice(reader.rows(manifest.shards[index]), stop)
        found = [row.values["prompt"] for _, row in rows if isinstance(row, Row)]
        assert found == [str(4 * index + n) for n in range(stop)]


def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    with open(path, "w") as file:
        file.write("{}")
    with pytest.raises(InputError, match="a file's name must be UTF-8"):
        find_inputs([str(tmp_path / "*.jsonl")], None)


def test_an_input_that_has_changed_since_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x"}\n')
    job = job_of(path, id_column=None)
    manifest = plan(job, quiet)
    path.write_text('{"prompt": "y"}\n{"prompt": "z"}\n')
    with pytest.raises(InputError, match="has changed since the job was planned"):
        list(Reader(job).rows(manifest.shards[0]))


def test_inputs_of_a_store_are_read_through_fsspec():
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe_file("/readers/a.jsonl", b'{"prompt": "a"}\n')
    files.pipe_file("/readers/b/c.jsonl.gz", gzip.compress(b'{"prompt": "b"}\n'))
    try:
        found, _ = read_all(
            job_of("memory://readers/a.jsonl", "memory://readers/b/*", id_column=None)
        )
    finally:
        files.rm("/readers", recursive=True)
    assert found == [("a.jsonl:1", {"prompt": "a"}), ("b/c.jsonl.gz:1", {"prompt": "b"})]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_may_lack_an_optional_column(suffix, tmp_path):
    rows = [{"prompt": "a", "gold": 1}, {"prompt": "b", "gold": None}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    optional = {"label": "gold", "other": "nowhere"}
    found, _ = read_all(job_of(path, id_column=None, optional=optional))
    assert [values for _, values in found] == [{"prompt": "a", "label": 1}, {"prompt": "b"}]
