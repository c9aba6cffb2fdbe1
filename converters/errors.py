"""What is wrong with a checkpoint, in a sentence its owner can act on; and strict JSON."""

import json
from collections import Counter
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """The text names the file, the tensor or key, what is wrong and what would be right."""


def listing(names: list[str], most: int = 10) -> str:
    """The first `most` names, then how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_object(path: Path, text: bytes | None = None) -> dict[str, Any]:
    """The JSON object in `text`, or in the file at `path`.

    Raises CheckpointError when it cannot be read, is no object, or names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(document := dict(pairs)) < len(pairs):
            repeated = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
            raise CheckpointError(f"{path}: its JSON names {listing(repeated)} twice")
        return document

    try:
        content = path.read_bytes() if text is None else text
        document = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: its JSON must be an object")
    return document
