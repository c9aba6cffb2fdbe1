"""The `run` script, in checkouts of nothing but what it reads, with PATHs that a test controls."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = "bash cat cut cp dirname flock grep mkdir rm sha256sum shasum sort touch".split()
READ_BY_RUN = ("run", "pyproject.toml", "requirements.lock", "requirements-dev.lock")


@pytest.fixture
def checkout(tmp_path):
    """A folder with `run` and the files it reads."""
    folder = tmp_path / "a checkout"  # a blank in the path must not matter
    folder.mkdir()
    for name in READ_BY_RUN:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def bin_folder(tmp_path):
    """A PATH of the common tools without any Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return folder


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def old_python(path: Path) -> None:
    """Answers as Python 3.11 would: too old, so the version test fails."""
    script(path, 'if [[ "$1" == --version ]]; then echo Python 3.11.7; else exit 1; fi')


def new_python(path: Path) -> None:
    """A Python that is recent enough; its `-m venv` makes a venv of itself, and pip only logs.

    Anything else that the venv's Python is asked to run is echoed.
    """
    script(
        path,
        r"""
case "$*" in
  -c*) exit 0 ;;
  --version) echo Python 3.12.9 ;;
  "-m pip --version") exit 0 ;;
  -m\ venv*) mkdir -p "$3/bin" && cp -- "$0" "$3/bin/python" ;;
  -m\ pip*)
    echo "pip $*" >>"$LOG"
    if [[ -e "$LOG.kill" ]]; then kill -KILL "$PPID"; fi
    if [[ -e "$LOG.fail" ]]; then echo "ERROR: no network" >&2; exit 1; fi
    ;;
  *) echo "ran in $PWD: $*" ;;
esac
""",
    )


def run(checkout: Path, *arguments: str, path: Path, cwd: Path | None = None, **env: str):
    return subprocess.run(
        [checkout / "run", *arguments],
        env={
            "PATH": str(path),
            "HOME": str(path.parent / "home"),
            "LOG": str(path.parent / "log"),
            "CI": "true",
            **env,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cwd or path.parent,
        timeout=60,
    )


def installs(bin_folder: Path) -> list[str]:
    """What pip was asked to install so far: lock files, and `-e`."""
    log = bin_folder.parent / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [re.findall(r"requirements[a-z-]*\.lock$|-e ", line)[0].strip() for line in lines]


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",)], ids=str)
def test_usage_names_every_command(checkout, bin_folder, arguments):
    done = run(checkout, *arguments, path=bin_folder)
    assert done.returncode == 0
    assert {"serve", "plan", "test", "check", "bench"} <= set(done.stdout.split())
    assert not (checkout / ".venv").exists()


def test_an_unknown_command_is_refused_with_the_known_ones(checkout, bin_folder):
    done = run(checkout, "sevre", path=bin_folder)
    assert done.returncode == 2
    assert "'sevre'" in done.stderr and "test, check, bench" in done.stderr


def test_only_an_old_python_is_one_sentence_and_failure(checkout, bin_folder):
    old_python(bin_folder / "python3")
    old_python(bin_folder / "python3.12")  # a pyenv shim: there, and failing
    done = run(checkout, "serve", path=bin_folder)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "no Python >= 3.12" in done.stderr
    assert not (checkout / ".venv").exists()


def test_path_comes_before_pyenv_and_pyenv_gives_its_newest(checkout, bin_folder):
    pyenv = bin_folder.parent / "pyenv"
    for version in ("3.12.4", "3.12.11", "3.11.9"):
        new_python(pyenv / "versions" / version / "bin" / "python")
    done = run(checkout, "serve", path=bin_folder, PYENV_ROOT=str(pyenv))
    assert "versions/3.12.11/" in done.stderr, done.stderr
    shutil.rmtree(checkout / ".venv")
    old_python(bin_folder / "python3.13")
    new_python(bin_folder / "python3")
    done = run(checkout, "serve", path=bin_folder, PYENV_ROOT=str(pyenv))
    assert f"({bin_folder / 'python3'})" in done.stderr, done.stderr


def test_uv_installs_a_python_when_there_is_none(checkout, bin_folder):
    managed = bin_folder.parent / "managed" / "python"
    new_python(bin_folder.parent / "later")
    script(
        bin_folder / "uv",
        rf"""
case "$*" in
  "python find 3.12") [[ -e "{managed}" ]] && echo "{managed}" ;;
  "python install 3.12") mkdir -p "{managed.parent}" && cp "{bin_folder.parent}/later" "{managed}" ;;
  *) exit 1 ;;
esac
""",  # noqa: E501
    )
    done = run(checkout, "serve", path=bin_folder)
    assert done.returncode == 0, done.stderr
    assert str(managed) in done.stderr
    assert "uv failed; trying pip" in done.stderr  # this uv can install no packages
    assert installs(bin_folder) == ["requirements.lock", "-e"]


def test_installs_once_with_hashes_and_passes_arguments_on(checkout, bin_folder, tmp_path):
    new_python(bin_folder / "python3")
    done = run(checkout, "serve", "--model=a b", path=bin_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ran in {tmp_path}: -P -m xlinfer.serve --model=a b\n"
    assert "--require-hashes" in (tmp_path / "log").read_text()
    again = run(checkout, "serve", path=bin_folder)
    assert (again.stdout, again.stderr) == (f"ran in {tmp_path}: -P -m xlinfer.serve\n", "")
    assert installs(bin_folder) == ["requirements.lock", "-e"]


def test_development_packages_include_the_server_and_run_in_the_checkout(checkout, bin_folder):
    new_python(bin_folder / "python3")
    done = run(checkout, "test", "tests/x", path=bin_folder)
    assert (
        done.stdout
        == f"ran in {checkout}: -m pytest --numprocesses=auto --maxprocesses=4 tests/x\n"
    )
    run(checkout, "serve", path=bin_folder)
    assert installs(bin_folder) == ["requirements-dev.lock", "-e"]


def test_a_changed_lock_installs_again(checkout, bin_folder):
    new_python(bin_folder / "python3")
    run(checkout, "serve", path=bin_folder)
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    done = run(checkout, "serve", path=bin_folder)
    assert installs(bin_folder) == ["requirements.lock", "-e"] * 2
    assert "making .venv" not in done.stderr


def test_an_installation_that_failed_says_why_and_is_retried(checkout, bin_folder, tmp_path):
    new_python(bin_folder / "python3")
    (tmp_path / "log.fail").touch()
    done = run(checkout, "serve", path=bin_folder)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-2] == "ERROR: no network"
    assert "could not install requirements.lock" in done.stderr.splitlines()[-1]
    (tmp_path / "log.fail").unlink()
    done = run(checkout, "serve", path=bin_folder)
    assert done.returncode == 0 and "making .venv" not in done.stderr


def test_an_installation_that_was_killed_is_made_anew(checkout, bin_folder, tmp_path):
    new_python(bin_folder / "python3")
    (tmp_path / "log.kill").touch()
    done = run(checkout, "serve", path=bin_folder)
    assert done.returncode != 0 and done.stdout == ""
    (tmp_path / "log.kill").unlink()
    (checkout / ".venv" / "half").touch()
    done = run(checkout, "serve", path=bin_folder)
    assert done.returncode == 0 and "incomplete" in done.stderr
    assert not (checkout / ".venv" / "half").exists()


def test_a_venv_whose_python_is_gone_is_made_anew(checkout, bin_folder):
    new_python(bin_folder / "python3")
    run(checkout, "serve", path=bin_folder)
    (checkout / ".venv" / "bin" / "python").unlink()
    done = run(checkout, "serve", path=bin_folder)
    assert done.returncode == 0 and "incomplete" in done.stderr


def test_runs_from_any_folder(checkout, bin_folder, tmp_path):
    new_python(bin_folder / "python3")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(checkout, "check", path=bin_folder, cwd=elsewhere)
    assert done.stdout == f"ran in {checkout}: -m tools.check\n"


def test_the_real_python_is_suitable(checkout, bin_folder, tmp_path):
    """The version test runs on an interpreter, not only on scripts that imitate one."""
    python = bin_folder / "python3"
    script(
        python,
        f'if [[ "$1" == -c ]]; then exec "{sys.executable}" "$@"; fi\necho "$*" >&2; exit 9',
    )
    done = run(checkout, "serve", path=bin_folder)
    assert f"-m venv {checkout / '.venv'}" in done.stderr
    assert done.returncode == 1 and "could not make" in done.stderr.splitlines()[-1]


def test_ci_calls_check():
    text = (ROOT / ".ci" / "run").read_text()
    assert text.splitlines()[-1].endswith('/../run" check')
    for name in ("run", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK)


def test_the_locks_agree_and_carry_hashes():
    pins = {}
    for name in ("requirements.lock", "requirements-dev.lock"):
        entries = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
        entries = [entry for entry in entries if entry and not entry.lstrip().startswith("#")]
        assert all("--hash=sha256:" in entry for entry in entries)
        pins[name] = {entry.split()[0] for entry in entries}
    assert pins["requirements.lock"] <= pins["requirements-dev.lock"]
