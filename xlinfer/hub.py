"""Repositories of the Hugging Face hub as folders, before anything is loaded.

What is on this machine always wins. Of a repository only what is read is fetched: safetensors that
transformers names so, JSON, Jinja and the tokenizer's files; never pickles, never code.
"""

import io
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from converters import CheckpointError
from converters.errors import listing, read_object
from converters.formats.safetensors import INDEX, SINGLE, is_plain
from xlinfer.progress import Progress

logger = logging.getLogger(__name__)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL = (".json", ".jinja", "tokenizer.model", "merges.txt")  # what such files' names end with
TOKEN = "hf auth login, or HF_TOKEN in the environment"


def is_repository(model: str | Path) -> bool:
    """Whether `model` can only mean one of the hub: "org/name", and nothing of that name here."""
    return (
        isinstance(model, str)
        and REPOSITORY.fullmatch(model) is not None
        and not os.path.exists(model)
    )


def fetch(model: str | Path, revision: str | None, progress: Progress) -> str | Path:
    """`model` itself where it is here; else the folder of the repository `model`, complete.

    `revision`: a branch, tag or commit; None: the main branch. The commit that it is now is logged.
    Files that were fetched before are not fetched again, and one whose connection breaks off goes
    on where it did. `progress("download", done, total)` counts bytes of weights. Raises
    CheckpointError.
    """
    if not is_repository(model):
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r}: {str(model)!r} is no repository of the hub, which alone "
                "has revisions; leave it out"
            )
        return model
    name = str(model)
    with _hub(name, revision) as hub:
        return _snapshot(hub, name, revision, progress)


def commit_of(name: str, revision: str | None) -> str:
    """What `revision` of the repository `name` is now; where the hub cannot be reached, of what is
    kept here. Nothing of weights is fetched. Raises CheckpointError."""
    with _hub(name, revision) as hub:
        try:
            return hub.HfApi().model_info(name, revision=revision).sha
        except (hub.errors.OfflineModeIsEnabled, ConnectionError, hub.errors.HTTPError) as error:
            if isinstance(error, hub.errors.HfHubHTTPError):  # the hub has answered
                raise
            return _kept(hub, name, revision, error).name


@contextmanager
def _hub(name: str, revision: str | None) -> Iterator[Any]:
    """The hub's library, what it raises as CheckpointError."""
    try:
        hub = import_module("huggingface_hub")
        errors = import_module("huggingface_hub.errors")
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {name!r}; to fetch that repository from the hub, {error.name} is "
            "needed: pip install 'xlinfer[hub]'"
        ) from None
    asked = f"revision {revision!r} of {name}" if revision else name
    try:
        yield hub
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its terms on its page of the hub, then give a token ({TOKEN})"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {name!r}, and no such repository on the hub. If it is private, "
            f"give a token ({TOKEN})"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"the hub has no {asked}; name a branch, a tag or a commit") from None
    except (errors.HTTPError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {name!r}, and {asked} cannot be fetched from the hub: "
            + _first_line(error)
        ) from None


def _snapshot(hub: Any, name: str, revision: str | None, progress: Progress) -> Path:
    """The folder, with the weights that its index names. Raises what the hub's library raises."""
    try:
        found = hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except (hub.errors.OfflineModeIsEnabled, ConnectionError, hub.errors.HTTPError) as error:
        if isinstance(error, hub.errors.HfHubHTTPError):  # the hub has answered
            raise
        return _kept(hub, name, revision, error)
    sizes = {file.rfilename: file.size or 0 for file in found.siblings}
    if not sizes.keys() & {SINGLE, INDEX}:
        held = sorted(file for file in sizes if file.endswith((".bin", ".safetensors", ".gguf")))
        raise CheckpointError(
            f"{name} has neither {SINGLE} nor {INDEX}, of which alone weights are fetched"
            + (f"; it has {listing(held)}" if held else "")
        )
    small = [file for file in sizes if "/" not in file and file.endswith(SMALL)]
    # By the name of the revision, so that it is known where the hub cannot be reached.
    folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=small))
    sha = folder.name
    logger.info("%s is at commit %s; --revision=%s pins it", name, sha, sha)
    weights = _weights(folder)
    total = sum(sizes.get(file, 0) for file in weights)
    progress("download", 0, total)
    hub.snapshot_download(
        name, revision=sha, allow_patterns=weights, tqdm_class=_counted(progress, total)
    )
    progress("download", total, total)
    return folder


def _kept(hub: Any, name: str, revision: str | None, error: Exception) -> Path:
    """What an earlier run fetched, where the hub cannot be asked."""
    try:
        found = hub.snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except OSError:
        raise OSError(
            f"it cannot be reached ({_first_line(error)}), and none is kept here"
        ) from None
    folder = Path(found)
    if lost := [file for file in _weights(folder) if not (folder / file).is_file()]:
        raise OSError(
            f"it cannot be reached ({_first_line(error)}), and what is kept here lacks "
            f"{listing(lost)}"
        )
    logger.warning("%s: the hub cannot be reached; commit %s is kept here", name, folder.name)
    return folder


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _weights(folder: Path) -> list[str]:
    """The files of weights that a folder with all of the others should have."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    weight_map = read_object(folder / INDEX).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in names if is_plain(name)})  # read_folder says what is wrong


def _counted(progress: Progress, total: int) -> type:
    """The hub's library reports to bars: several of bytes, of which each may be the one that
    moves, and from many threads."""
    from tqdm import tqdm

    lock, counts = threading.Lock(), dict[int, float]()

    class Bar(tqdm):
        monitor_interval = 0  # no thread to redraw what is not shown

        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **{**given, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            if self.unit == "B":
                with lock:
                    counts[id(self)] = counts.get(id(self), 0) + (n or 0)
                    progress("download", min(int(max(counts.values())), total), total)
            return super().update(n)

    return Bar
