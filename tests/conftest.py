"""What every test has: a state server of our own, so that none is skipped for want of one; generated inputs untimed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, settings

from kvstore.state import EmbeddedValkey, StateStore
from kvstore.state.library import TEST_CLOCK_KEY, with_test_clock

# How long an example takes says something about the machine, not about what the example shows.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


class ClockedStore:
    """A StateStore on the functions' test clock: leases and deadlines pass without waiting."""

    def __init__(self, url: str) -> None:
        self.store = StateStore(url, functions=with_test_clock())
        self.raw: redis.Redis = redis.Redis.from_url(url, protocol=2)
        self.now_ms = 1_000_000
        self.advance(0.0)
        self.store.load_library()

    def advance(self, seconds: float) -> None:
        """Moves the server's clock, also backwards."""
        self.now_ms += round(seconds * 1000)
        self.raw.set(TEST_CLOCK_KEY, self.now_ms)

    def close(self) -> None:
        self.store.close()
        self.raw.close()


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One embedded server for the whole session. Use `redis_url`, which empties it first."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"), appendonly=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(valkey_server: EmbeddedValkey) -> str:
    """URL of an empty server. Functions that were loaded before are still there, as after a FLUSHALL."""
    with redis.Redis.from_url(valkey_server.url) as client:
        client.flushall()
    return valkey_server.url


@pytest.fixture
def state_store(redis_url: str) -> Iterator[StateStore]:
    """A StateStore on an empty server, one shard, the library loaded."""
    store = StateStore(redis_url)
    store.load_library()
    yield store
    store.close()


@pytest.fixture
def clocked(redis_url: str) -> Iterator[ClockedStore]:
    """A StateStore whose server's clock the test moves."""
    store = ClockedStore(redis_url)
    yield store
    store.close()
