"""Requests with JSON in both directions, to servers that are not trusted.

Limits on time and size apply to a whole answer with its headers, however it is sent. Redirects are not followed
and nothing is decompressed, so a key is sent only to the given address and a small answer stays small.
A server may send the key back. It is hidden in every answer and in every error, before any text is cut.
Held by: tests/evaluate/test_hostile_endpoint.py"""

from __future__ import annotations

import http.client
import io
import json
import math
import os
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from truestep.errors import UserError
from truestep.redaction import HIDDEN, redact

MAX_BYTES = 8 << 20  # 131,072 tokens of ten characters, each written as an escape of six
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLL_SECONDS = 0.5  # between two looks at whether the client was closed
SHOWN, SEARCHED = 300, 20_000  # characters of a server's words in an error, and those searched for secrets
LEAST_KEY = 8  # characters of a key that is hidden in answers
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


def key_from(*names: str) -> str:
    """Return the first key that one of these environment variables has, without white space around it, or "".
    Raises UserError if it has a character that cannot be sent."""
    given = ((name, os.environ.get(name, "").strip()) for name in names)
    name, key = next((pair for pair in given if pair[1]), ("", ""))
    if not (key.isascii() and key.isprintable()):
        fault = "has a line end, a control character or a letter that is not ASCII, so it cannot be a key"
        raise UserError(f"the environment variable {redact(name)} {fault}; set it again")
    return key


def check_address(url: str) -> None:
    """Raise ValueError, with the fault, if no request can ever be sent to this address."""
    parts = urllib.parse.urlsplit(url)
    path = url.partition("://")[2].removeprefix(parts.netloc)
    if bad := re.search(r"[\x00-\x20\x7f]", url) or re.search(r"[^!-~]", path):
        raise ValueError(f"it has the character {bad[0]!r}; write it as {urllib.parse.quote(bad[0])}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it has no host; write http://HOST:PORT/v1")
    if parts.username is not None:
        raise ValueError("it has a user name; put a key into the environment")
    try:
        parts.hostname.encode("idna")
    except UnicodeError:
        raise ValueError("its host is not a valid name") from None
    _ = parts.port  # raises ValueError if it is not a port


@dataclass(frozen=True, kw_only=True)
class Client:
    """Asks one server, from any number of threads. ``seconds`` is the time for an answer with all its retries."""

    base: str
    key: str = field(default="", repr=False)
    seconds: float
    max_bytes: int = MAX_BYTES
    retries: int = 0
    _closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """End all requests that are in progress in other threads."""
        self._closed.set()

    def waits(self, seconds: float) -> bool:
        """Wait, at most until the client is closed. Return whether it is closed."""
        return self._closed.wait(seconds)

    def hide(self, text: str) -> str:
        """Return a text without the key and anything that looks like a secret."""
        return redact(text.replace(self.key, HIDDEN) if self.key else text)

    def words(self, said: object) -> str:
        """Return the beginning of an error, or of a server's words, as one line without secrets."""
        text = str(said) or type(said).__name__
        line = " ".join((text.replace(self.key, HIDDEN) if self.key else text).split())
        return redact(line[:SEARCHED])[:SHOWN]  # half a secret is not found, so it is hidden before the cut

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
        is_here = urllib.parse.urlsplit(self.base).hostname in LOOPBACK
        opener.add_handler(urllib.request.ProxyHandler({} if is_here else None))
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
            raise BadAnswer(f"not an HTTP answer: {self.words(error)}") from None
        if not 200 <= reply.status < 300:
            asked = re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", reply.headers.get("Retry-After", ""))
            text = found.decode("utf-8", "replace").strip()
            raise Rejected(reply.status, text and self.words(text), float(asked[0]) if asked else None)
        if (coding := reply.headers.get("Content-Encoding", "identity")) != "identity":
            raise BadAnswer(f"the answer is compressed ({self.words(coding)}), which was not asked for")
        try:
            return self._without_key(parse(found))
        except RecursionError:
            raise BadAnswer("the answer is nested too deeply") from None
        except BadAnswer as error:
            raise BadAnswer(self.words(error)) from None

    def _without_key(self, value: Any) -> Any:
        """Hide the key in all texts of an answer. A shorter key could be a word of an answer."""
        if len(self.key) < LEAST_KEY:
            return value
        if isinstance(value, dict):
            return {self._without_key(name): self._without_key(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._without_key(inner) for inner in value]
        return value.replace(self.key, HIDDEN) if isinstance(value, str) else value


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
        raise BadAnswer(f"the answer is not JSON: {text}") from None


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise BadAnswer(f"the answer contains the number {text}")


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
