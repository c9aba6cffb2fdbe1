from pathlib import Path

import pytest

from tests.multihost.processes import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Of compiled programs: what one server compiled, the next one loads."""
    return tmp_path_factory.mktemp("cache")
