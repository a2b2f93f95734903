"""The socket watcher on real pairs of sockets; the test is its clock."""

from __future__ import annotations

import socket
import time

import pytest

from webapp.body import read_body
from webapp.errors import ApiError
from webapp.streaming.sockets import SocketWatcher


def test_a_closed_peer_is_told_once() -> None:
    watcher, gone = SocketWatcher(), []
    ours, theirs = socket.socketpair()
    with ours, watcher.watch(ours, lambda: gone.append(1)):
        watcher.look(0.0)
        assert gone == []
        theirs.close()
        watcher.look(0.0)
        watcher.look(0.0)
    assert gone == [1]


def test_bytes_that_wait_are_no_end() -> None:
    watcher, gone = SocketWatcher(), []
    ours, theirs = socket.socketpair()
    with ours, theirs, watcher.watch(ours, lambda: gone.append(1)):
        theirs.sendall(b"GET / HTTP/1.1")
        watcher.look(0.0)
    assert gone == []


def test_nobody_is_told_after_the_watch_is_over() -> None:
    watcher, gone = SocketWatcher(), []
    ours, theirs = socket.socketpair()
    with ours:
        with watcher.watch(ours, lambda: gone.append(1)):
            pass
        theirs.close()
        watcher.look(0.0)
    assert gone == []


def test_a_body_that_drips_is_cut_at_its_deadline_with_408() -> None:
    watcher = SocketWatcher()
    ours, theirs = socket.socketpair()
    theirs.sendall(b"{")

    class Dripping:
        """`wsgi.input` on a socket, while time passes."""

        def read(self, size: int) -> bytes:
            watcher.look(time.monotonic() + 31)
            data = b""
            while len(data) < size and (part := ours.recv(1)):
                data += part
            return data

    environ = {"wsgi.input": Dripping(), "CONTENT_LENGTH": "100", "gunicorn.socket": ours}
    with ours, theirs, pytest.raises(ApiError) as caught:
        read_body(environ, max_body_bytes=1000, guard=watcher.read_deadline)
    assert (caught.value.status, caught.value.code) == (408, "body_timeout")
