"""Notices when a process of a run has ended, within moments and in one line.

Processes that train together wait for each other in every step. If one is
killed, JAX ends the others with a stack trace, after a minute, and a collective
of a GPU waits for ever. So every process keeps a connection to the first one
open, whose end is the end of the process: the operating system closes it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from recipes.interruption import EXIT_INTERRUPTED

#: A machine that is switched off closes nothing. Its silence is noticed after
#: these seconds: until the first question, between questions, and how many.
_KEEPALIVE = (10, 5, 4)

_NUMBER = struct.Struct("!i")
_GOODBYE = -1


def end_with_line(lost: int, processes: int) -> NoReturn:
    """Ends this process, whatever its other threads wait for."""
    # Not `sys.exit`, which ends a thread, and not `print`, whose lock another may hold.
    os.write(
        sys.stderr.fileno(),
        f"\nerror: process {lost} of 0 to {processes - 1} has ended, and the others with it. The "
        "same commands with --resume go on from the last checkpoint\n".encode(),
    )
    os._exit(EXIT_INTERRUPTED)


class Liveness:
    """Connections among the processes of a run; `close` says goodbye.

    The first process is connected to all others, and tells them of each other.

    Args:
        process: the number of this one, from 0.
        processes: all of them.
        on_lost: is called in a thread, once, with the number of a process that
            has ended without goodbye, and `processes`.
    """

    def __init__(
        self,
        process: int,
        processes: int,
        on_lost: Callable[[int, int], object] = end_with_line,
    ) -> None:
        self._process = process
        self._processes = processes
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._told = False
        self._closed = False
        self._peers: dict[int, socket.socket] = {}
        self._server: socket.socket | None = None

    def listen(self) -> int:
        """Of the first process: opens a free port, any one, for the others; returns it."""
        self._server = socket.create_server(("", 0), backlog=self._processes)
        return self._server.getsockname()[1]

    def connect(self, host: str, port: int, timeout: float) -> None:
        """Of every process: connects it, and begins to watch.

        Args:
            host: of the first process.
            port: what `listen` returned there.
            timeout: seconds to wait for the others.

        Raises:
            OSError: if one cannot be reached, or does not come.
        """
        if self._process:
            try:
                peer = socket.create_connection((host, port), timeout)
            except OSError as error:
                raise OSError(
                    f"Expected process 0 to be reached at {host}:{port} as well, where it notices "
                    f"the end of others. Received: {error}"
                ) from error
            peer.sendall(_NUMBER.pack(self._process))
            self._peers[0] = peer
        else:
            assert self._server is not None, "listen comes first"
            self._server.settimeout(timeout)
            while len(self._peers) < self._processes - 1:
                try:
                    peer, _ = self._server.accept()
                except OSError as error:
                    raise OSError(
                        "Expected all other processes to connect to this one at port "
                        f"{self._server.getsockname()[1]} as well. Received: {error}"
                    ) from error
                peer.settimeout(timeout)
                number = _receive(peer)
                if number is None or not 0 < number < self._processes or number in self._peers:
                    peer.close()  # Whoever knocks on open ports.
                    continue
                self._peers[number] = peer
            self._server.close()
        for number, peer in self._peers.items():
            _keep_alive(peer)
            peer.settimeout(None)
            threading.Thread(target=self._watch, args=(number, peer), daemon=True).start()

    def stop(self) -> None:
        """Watches no longer. The others notice when this process ends."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Says goodbye: the end of this process is none to be noticed."""
        self.stop()
        for peer in self._peers.values():
            _send(peer, _GOODBYE)

    def _watch(self, number: int, peer: socket.socket) -> None:
        lost = _receive(peer)
        if lost == _GOODBYE:
            return
        with self._lock:
            if self._told or self._closed:
                return
            self._told = True
        lost = number if lost is None else lost
        if not self._process:
            for other, connection in self._peers.items():
                if other != lost:
                    _send(connection, lost)
        self._on_lost(lost, self._processes)


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Under these names on Linux; elsewhere the system's own times hold.
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    for name, value in zip(names, _KEEPALIVE, strict=True):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(peer: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # It has ended: that is noticed where it is received.
        peer.sendall(_NUMBER.pack(number))


def _receive(peer: socket.socket) -> int | None:
    """The next number; None where the connection has ended."""
    data = b""
    try:
        while len(data) < _NUMBER.size:
            part = peer.recv(_NUMBER.size - len(data))
            if not part:
                return None
            data += part
    except OSError:
        return None
    return _NUMBER.unpack(data)[0]
