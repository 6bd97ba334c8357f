"""Requests with JSON in both directions, to servers that are not trusted.

Limits on time and size apply to a whole answer with its headers, however it is sent. Redirects are not followed
and nothing is decompressed, so a key is sent only to the given address and a small answer stays small.
Held by: tests/evaluate/test_hostile_endpoint.py"""

from __future__ import annotations

import http.client
import io
import json
import math
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from truestep.rundir import redact

MAX_BYTES = 8 << 20  # 131,072 tokens of ten characters, each written as an escape of six
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
POLL_SECONDS = 0.5  # between two looks at whether the client was closed
LONGEST_PAUSE = 8.0  # seconds, if the server does not say how long to wait
# A pair of surrogates, a single one, or any other escape in JSON.
_ESCAPE = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)


class BadAnswer(ValueError):
    """The server answered, but not with usable JSON; the message says why."""


class Rejected(BadAnswer):
    """The server answered with an error status. ``wait`` is the number of seconds in Retry-After, if any."""

    def __init__(self, status: int, text: str, wait: float | None) -> None:
        super().__init__(f"HTTP {status}: {text}" if text else f"HTTP {status}")
        self.status, self.wait = status, wait


@dataclass(frozen=True, kw_only=True)
class Client:
    """Asks one server, from any number of threads. ``seconds`` is the time for an answer with all its retries."""

    base: str
    key: str = ""
    seconds: float
    max_bytes: int = MAX_BYTES
    retries: int = 0
    _closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """End all requests that are in progress in other threads."""
        self._closed.set()

    def ask(self, path: str, body: Any = None) -> Any:
        """Return the answer to a POST request, or to a GET request without a body. An overloaded server is
        asked again. Raises BadAnswer, or OSError if there is no answer."""
        until = time.monotonic() + self.seconds
        for attempt in range(self.retries + 1):
            wait = min(LONGEST_PAUSE, 0.5 * 2**attempt) * random.uniform(0.75, 1)
            try:
                return self._once(path, body, until)
            except Rejected as error:
                wait = wait if error.wait is None else error.wait
                if error.status not in RETRIED or attempt == self.retries:
                    raise
                if time.monotonic() + wait > until:
                    raise BadAnswer(f"{error}; the server asks to wait {wait:g} s") from None
            except TimeoutError:
                raise
            except OSError:
                if attempt == self.retries or time.monotonic() + wait > until:
                    raise
            if self._closed.wait(wait):
                raise ConnectionError("the request was cancelled")
        raise AssertionError

    def _once(self, path: str, body: Any, until: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.ProxyHandler())
        opener.add_handler(_Handler(partial(_Limited, until=until, left=self.max_bytes, closed=self._closed)))
        try:
            request = urllib.request.Request(self.base + path, data, headers)
            with opener.open(request, timeout=max(0.01, until - time.monotonic())) as reply:
                found = reply.read(self.max_bytes + 1)
                if reply.length:
                    raise ConnectionError("the answer was cut off")
        except urllib.error.URLError as error:  # only a wrapper
            reason = error.reason if isinstance(error.reason, OSError) else OSError(error.reason)
            raise reason from None
        except (http.client.HTTPException, UnicodeError) as error:
            if isinstance(error, OSError):
                raise
            raise BadAnswer(f"not an HTTP answer: {_short(str(error) or type(error).__name__)}") from None
        if not 200 <= reply.status < 300:
            asked = re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", reply.headers.get("Retry-After", ""))
            text = _short(found[:2000].decode("utf-8", "replace"))
            raise Rejected(reply.status, text, float(asked[0]) if asked else None)
        if (coding := reply.headers.get("Content-Encoding", "identity")) != "identity":
            raise BadAnswer(f"the answer is compressed ({_short(coding)}), which was not asked for")
        return parse(found)


def parse(data: bytes) -> Any:
    """Return the value of a JSON text, with only finite numbers and only valid Unicode. Raises BadAnswer."""
    text = data.decode("utf-8", "replace")
    if "\\ud" in text.lower():
        text = _ESCAPE.sub(lambda m: "\\ufffd" if m[1] else m[0], text)
    try:
        return json.loads(text, parse_constant=_not_finite, parse_float=_finite)
    except BadAnswer:
        raise
    except RecursionError:
        raise BadAnswer("the answer is nested too deeply") from None
    except ValueError:
        raise BadAnswer(f"the answer is not JSON: {_short(text[:2000])}") from None


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise BadAnswer(f"the answer contains the number {_short(text)}")


def _short(text: str) -> str:
    return redact(" ".join(text.split())[:300])


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens connections whose answers are read through ``limited``."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, limited: Any) -> None:
        super().__init__()
        self._limited = limited

    def _connection(self, kind: Any, host: str, **options: Any) -> Any:
        made = kind(host, **options)
        made.response_class = lambda sock, **how: http.client.HTTPResponse(self._limited(sock), **how)
        return made

    def http_open(self, request: urllib.request.Request) -> Any:
        connection: Any = partial(self._connection, http.client.HTTPConnection)
        return self.do_open(connection, request)

    def https_open(self, request: urllib.request.Request) -> Any:
        connection: Any = partial(self._connection, http.client.HTTPSConnection)
        return self.do_open(connection, request)


class _Limited(io.RawIOBase):
    """The bytes that a socket receives, at most ``left``, until the time ``until`` or until ``closed`` is set."""

    def __init__(self, sock: socket.socket, *, until: float, left: int, closed: threading.Event) -> None:
        self._sock, self._until, self._left, self._closed = sock, until, left, closed
        self._open = sock.makefile("rb", buffering=0)  # keeps the socket open

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer was not complete in time")
            if self._closed.is_set():
                raise ConnectionError("the request was cancelled")
            self._sock.settimeout(min(left, POLL_SECONDS))
            try:
                count = self._sock.recv_into(buffer)
            except TimeoutError:
                continue
            self._left -= count
            if self._left < 0:
                raise BadAnswer("the answer is too large")
            return count

    def close(self) -> None:
        self._open.close()
        super().close()
