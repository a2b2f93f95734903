"""Fixtures that every test may use: a state server of our own, so that no test is skipped for want of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from kvstore.state import EmbeddedValkey, StateStore


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
