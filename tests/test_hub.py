"""--model=org/name, against a hub that is served here: no test needs a network."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from converters import CheckpointError
from tests.checkpoints import GOLDENS, config, tensors, write
from xlinfer.convert import main as convert
from xlinfer.hub import fetch, is_repository
from xlinfer.serve.__main__ import server_options_of
from xlinfer.serve.flags import parse

SHA, OLD = "a" * 40, "b" * 40
FETCH = """
import logging, sys
from huggingface_hub import constants
logging.basicConfig(level="INFO")
constants.DOWNLOAD_CHUNK_SIZE = 500  # what is written at a time
from xlinfer.hub import fetch
from converters import CheckpointError
seen = []
try:
    print(fetch(sys.argv[1], sys.argv[2] or None, lambda *at: seen.append(at)))
    print(seen[:1], seen[-1:], seen == sorted(seen))
except CheckpointError as error:
    print("refused:", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes that huggingface_hub asks: a model's commit and files, their list, their bytes."""

    def log_request(self, code="-", size="-"):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server: FakeHub = self.server  # pyright: ignore[reportAssignmentType]
        server.asked.append((self.command, self.path))
        path = self.path.partition("?")[0]
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repository == "org/gated":
            return self.refuse(403, "GatedRepo")
        if repository not in ("org/tiny", "org/pickles"):
            return self.refuse(401, "RepoNotFound")
        folder = server.folder if repository == "org/tiny" else server.pickles
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        if "/resolve/" in path:
            _, _, revision, name = path.removeprefix(f"/{repository}").split("/", 3)
            return self.send(files[name].read_bytes(), revision, etag=f"{name}-{revision}")
        revision = path.split("/")[6] if len(path.split("/")) > 6 else "main"
        commits = {"main": SHA, "v1": OLD, SHA: SHA, OLD: OLD}
        if revision not in commits:
            return self.refuse(404, "RevisionNotFound")
        sizes = {name: file.stat().st_size for name, file in files.items()}
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
            return self.send(json.dumps(tree).encode(), commits[revision])
        siblings = [{"rfilename": n, "size": s, "blobId": n} for n, s in sizes.items()]
        document = {"id": repository, "sha": commits[revision], "siblings": siblings}
        self.send(json.dumps(document).encode(), commits[revision])

    def send(self, data, commit, etag="x"):
        server: FakeHub = self.server  # pyright: ignore[reportAssignmentType]
        start = 0
        if (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            server.resumed.append(start)
        self.end_headers()
        if self.command == "GET" and server.dropping and server.dropping in self.path:
            server.dropping = ""
            self.wfile.write(data[:1000])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(data[start:])

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


class FakeHub(http.server.ThreadingHTTPServer):
    asked: list
    resumed: list
    dropping: str  # the name of a file whose connection is to break off, once
    folder: Path
    pickles: Path


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write(folder, config(), tensors(config()), shards=2, tokenizer={"model": {}})
    for name in (
        "pytorch_model.bin", "modeling_tiny.py", "README.md", "consolidated.safetensors",
        "onnx/model.json", "original/params.json", "chat_template.jinja", "merges.txt",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    pickles = tmp_path_factory.mktemp("pickles")
    (pickles / "pytorch_model.bin").write_bytes(b"\x80")
    (pickles / "config.json").write_text("{}")
    server = FakeHub(("127.0.0.1", 0), Hub)
    server.asked, server.resumed, server.dropping = [], [], ""
    server.folder, server.pickles = folder, pickles
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetched(hub, tmp_path):
    """Runs fetch in a process of its own, as the library reads its settings when it is imported."""

    def run(name, revision="", offline=False):
        where = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": str(int(offline)), "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, name, revision],
            capture_output=True, text=True, env=kept | where,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def test_only_what_is_read_is_fetched_at_a_commit_that_is_logged(hub, fetched):
    out, log = fetched("org/tiny")
    folder, progress = out.splitlines()
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    beside = ["chat_template.jinja", "config.json", "merges.txt", "model.safetensors.index.json"]
    assert sorted(os.listdir(folder)) == sorted([*beside, *names, "tokenizer.json"])
    for name in (*beside, *names):
        with open(os.path.join(folder, name), "rb") as file:
            assert file.read() == (hub.folder / name).read_bytes()
    assert f"org/tiny is at commit {SHA}" in log
    total = sum((hub.folder / name).stat().st_size for name in names)
    assert progress == f"[('download', 0, {total})] [('download', {total}, {total})] True"
    hub.asked.clear()
    assert fetched("org/tiny")[0] == out  # kept
    assert not any("resolve" in path for _, path in hub.asked)


def test_a_revision_is_pinned(fetched):
    out, log = fetched("org/tiny", "v1")
    assert OLD in out and f"commit {OLD}; --revision={OLD} pins it" in log
    assert "the hub has no revision 'v9' of org/tiny" in fetched("org/tiny", "v9")[0]


def test_a_download_that_broke_off_goes_on(hub, fetched):
    name = "model-00001-of-00002.safetensors"
    hub.dropping = name
    hub.resumed.clear()
    link = os.path.join(fetched("org/tiny")[0].splitlines()[0], name)
    assert hub.resumed == [1000] and hub.dropping == ""
    with open(link, "rb") as file:
        assert file.read() == (hub.folder / name).read_bytes()
    os.unlink(os.path.realpath(link))
    os.unlink(link)
    hub.asked.clear()
    fetched("org/tiny")
    fetched_again = {path for command, path in hub.asked if "resolve" in path and command == "GET"}
    assert fetched_again == {f"/org/tiny/resolve/{SHA}/{name}"}


def test_without_the_hub_what_is_kept_is_taken(fetched):
    assert "cannot be reached" in fetched("org/tiny", offline=True)[0]
    folder = fetched("org/tiny")[0].splitlines()[0]
    out, log = fetched("org/tiny", offline=True)
    assert out.splitlines()[0] == folder and f"commit {SHA} is kept here" in log
    os.unlink(os.path.join(folder, "model-00002-of-00002.safetensors"))
    out = fetched("org/tiny", offline=True)[0]
    assert "what is kept here lacks model-00002-of-00002.safetensors" in out


@pytest.mark.parametrize(
    "name, said",
    [
        ("org/gated", "org/gated is gated: accept its terms on its page"),
        ("org/none", "there is no folder 'org/none', and no such repository on the hub"),
        ("org/pickles", "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_what_cannot_be_fetched_is_said(name, said, fetched):
    out, _ = fetched(name)
    assert out.startswith("refused: ") and said in out and out.count("\n") == 1


def test_what_is_here_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert fetch("org/name", None, lambda *at: None) == "org/name"
    for path in (GOLDENS, str(GOLDENS), "/no/such", "a/b/c", "./a", "..", "a", "org/na me", "~/x"):
        assert not is_repository(path)
    assert is_repository("org/other.v1-2_x")
    with pytest.raises(CheckpointError, match="revision 'v1': 'org/name' is no repository"):
        fetch("org/name", "v1", lambda *at: None)


def test_the_extra_is_named_where_it_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert convert(["convert", "--model=org/name", f"--output={tmp_path / 'x'}"]) == 1
    err = capsys.readouterr().err
    assert "there is no folder 'org/name'" in err and "pip install 'xlinfer[hub]'" in err


def test_the_server_calls_it_by_its_whole_name():
    values = parse(["serve", "--model=org/name", "--revision=v1"])
    assert values is not None and values.revision == "v1"
    assert server_options_of(values).served_model_names == ("org/name",)
