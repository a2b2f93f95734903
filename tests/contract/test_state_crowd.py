"""Far more threads than connections call the state server at once: they wait for each other, none is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from kvstore.state import EmbeddedValkey, StateStore
from kvstore.state.connection import MAX_CONNECTIONS

NUM_THREADS = 5 * MAX_CONNECTIONS


def test_no_call_is_refused_for_the_number_of_threads(valkey_server: EmbeddedValkey) -> None:
    store = StateStore(valkey_server.url, num_shards=1)
    start = threading.Barrier(NUM_THREADS)

    def call() -> bool:
        start.wait(30)
        return all(store.record(store.new_request_id()) is None for _ in range(5))

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        answers = [each.result() for each in [threads.submit(call) for _ in range(NUM_THREADS)]]
    store.close()

    assert all(answers)
