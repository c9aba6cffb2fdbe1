import httpx
import pytest

from tests.serve.fake_engine import DATA, FakeEngine, RunningServer, make_plan
from xlinfer.serve.tokenizer import Tokenizer

REPLY = "def add(a, b):\n    return a + b  # naïve 🎉\n\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(DATA)


@pytest.fixture
def engine(tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer.encode(REPLY), make_plan())


@pytest.fixture
def server(engine, tokenizer):
    with RunningServer(engine, tokenizer) as running:
        yield running


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client
