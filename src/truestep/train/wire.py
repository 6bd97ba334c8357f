"""Connections between ranks that carry JSON values, one a line, and how they are made."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

CONNECT_SECONDS = 120.0
HELLO_SECONDS = 5.0
CHUNK = 1 << 20


class Wire:
    """A connection that never blocks. What is put is sent when the far end can take it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.waiting, self._read = connection, bytearray(), bytearray()

    def fileno(self) -> int:
        return self.connection.fileno()

    def put(self, value: Any) -> None:
        self.waiting += json.dumps(value).encode() + b"\n"

    def write(self) -> None:
        """Send what can be sent now. A broken connection is reported by ``read``."""
        try:
            while self.waiting:
                del self.waiting[: self.connection.send(memoryview(self.waiting)[:CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            self.waiting.clear()

    def read(self) -> tuple[list[Any], bool]:
        """Return the values that have arrived, and whether the far end has closed the connection."""
        is_closed, values = False, []
        try:
            chunk = self.connection.recv(CHUNK)
            is_closed = not chunk
        except BlockingIOError:
            return [], False
        except OSError:
            return [], True
        self._read += chunk
        if b"\n" in chunk:
            *lines, rest = self._read.split(b"\n")
            self._read = bytearray(rest)
            values = [json.loads(line) for line in lines]
        return values, is_closed

    def close(self) -> None:
        self.connection.close()


def listen(address: str) -> socket.socket:
    """Open a free port, on the loopback device alone if the ranks meet there."""
    if address == "::1":
        return socket.create_server((address, 0), family=socket.AF_INET6)
    if address == "localhost" or address.startswith("127."):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def accept(server: socket.socket, token: str, count: int) -> dict[int, Wire]:
    """Return the connections of ``count`` other ranks, which know the token. Raises TimeoutError."""
    found: dict[int, Wire] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(found) < count:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        connection, _ = server.accept()
        connection.settimeout(HELLO_SECONDS)
        said = b""
        with contextlib.suppress(OSError):
            # One byte at a time: what the rank says after its first line belongs to its Wire.
            while not said.endswith(b"\n") and len(said) < 200 and (chunk := connection.recv(1)):
                said += chunk
        words = said.decode("utf-8", "replace").split()
        if len(words) == 2 and words[0] == token and words[1].isdigit():
            found[int(words[1])] = Wire(connection)
        else:  # not one of the ranks
            connection.close()
    return found


def connect(host: str, port: int, token: str, rank: int) -> Wire:
    """Return a connection with rank 0. Raises OSError."""
    address, failure = os.environ.get("MASTER_ADDR", host), OSError()
    for name in dict.fromkeys((address, host)):
        try:
            connection = socket.create_connection((name, port), timeout=CONNECT_SECONDS / 4)
            connection.sendall(f"{token} {rank}\n".encode())
            return Wire(connection)
        except OSError as error:
            failure = error
    fault = f"rank {rank} cannot reach rank 0 at {address}:{port} ({failure.strerror or failure})"
    raise OSError(failure.errno, f"{fault}; ranks need to reach free ports of each other")
