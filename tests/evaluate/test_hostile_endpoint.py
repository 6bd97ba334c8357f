"""A real server that answers in every wrong way: one bad answer is one unscored sample, and never a crash."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from truestep.errors import UserError
from truestep.http_client import MAX_BYTES, BadAnswer, Client, check_address, key_from, parse
from truestep.records import Message, Problem, RewardInput, Stop
from truestep.rewards.judge import Judge, JudgeSettings, judge
from truestep.rollout.engine import SamplingParameters
from truestep.rollout.engine_endpoint import EndpointEngine, TextRequest, TextSample, connect
from truestep.rundir import append_jsonl, read_jsonl

SAMPLING = SamplingParameters(temperature=0.0, max_new_tokens=8, stop_token_ids=())
SECONDS, SIZE, KEY = 1.0, 1 << 16, "horse battery"
ENDLESS = 1 << 24  # bytes: far more than the client may read


def completion(
    message: str = '{"content": "fine"}', finish: str = '"stop"', usage: str = '{"completion_tokens": 3}'
) -> str:
    return f'{{"choices": [{{"message": {message}, "finish_reason": {finish}}}], "usage": {usage}}}'


def http(body: str | bytes, status: str = "200 OK", *headers: str, length: str | None = None) -> bytes:
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    lines = [
        f"HTTP/1.1 {status}",
        *headers,
        f"Content-Length: {len(data) if length is None else length}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + data


def chunked(*chunks: tuple[str, bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(size.encode() + b"\r\n" + data + b"\r\n" for size, data in chunks)


def says(text: str) -> str:
    return completion(f'{{"content": {text}}}')


ZEROS = "0" * ENDLESS
GOOD = completion().encode()
# What a sample's text becomes: a wrong number of tokens or a broken character does not lose an answer.
FINE = {
    "plain": (http(GOOD), "fine"),
    "chunks": (chunked((f"{len(GOOD):x}", GOOD), ("0", b"")), "fine"),
    "the key": (http(says(f'"it is {KEY}!"')), "it is [redacted]!"),
    "half a pair": (http(says(r'"a\ud800b\udc00"')), "a\ufffdb\ufffd"),
    "a pair": (http(says(r'"\ud83d\ude00\\ud800"')), "\U0001f600\\ud800"),
    "bytes of no encoding": (http(GOOD.replace(b"fine", b"a\xffb")), "a\ufffdb"),
    "surrogate bytes": (http(says('"\ud800"')), "\ufffd" * 3),
    "terminal": (http(says(r'"\u001b[31m\u0000"')), "\x1b[31m\x00"),
    "minus tokens": (http(completion(usage='{"completion_tokens": -1}')), "fine"),
    "words for tokens": (http(completion(usage='{"completion_tokens": "many"}')), "fine"),
    "list of usage": (http(completion(usage="[1]")), "fine"),
    "too many tokens": (http(completion(usage=f'{{"completion_tokens": 1{"0" * 400}}}')), "fine"),
    "number of a thought": (http(completion('{"content": "fine", "reasoning_content": 7}')), "fine"),
    "welcome": (b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + http(GOOD), "fine"),
}  # fmt: skip
BAD: dict[str, bytes] = {
    "1e999 tokens": http(completion(usage='{"completion_tokens": 1e999}')),
    "NaN": http(completion(usage='{"completion_tokens": NaN}')),
    "-Infinity": http(completion(usage='{"completion_tokens": -Infinity}')),
    "digits": http(completion(usage=f'{{"completion_tokens": {"9" * 5000}}}')),
    "nested": http("[" * 30000 + "]" * 30000),
    "nested objects": http('{"a":' * 10000 + "1" + "}" * 10000),
    "html": http("<html><body>Welcome</body></html>", "200 OK", "Content-Type: text/html"),
    "empty": http(""),
    "nothing": b"",
    "null": http("null"),
    "list": http("[]"),
    "text": http('"fine"'),
    "no choices": http('{"choices": []}'),
    "choices by name": http('{"choices": {"0": 1}}'),
    "no message": http('{"choices": [null]}'),
    "message of text": http(completion('"fine"')),
    "content of number": http(says("7")),
    "content of list": http(says('[{"text": "fine"}]')),
    "content of object": http(says('{"a": "fine"}')),
    "no content": http(completion("{}")),
    "finish": http(completion(finish=r'"\u001b]0;title\u0007"')),
    "finish of object": http(completion(finish='{"a": 1}')),
    "error": http('{"error": {"message": "no"}}'),
    "cut off": http(GOOD, length=str(len(GOOD) + 9)),
    "cut off inside": http(GOOD[:20]),
    "minus length": http(GOOD[:20], length="-5"),
    "great length": http(GOOD[:20], length="9" * 30),
    "no status": b"fine\r\n\r\n" + GOOD,
    "great status": http(GOOD, "99999 OK"),
    "minus chunk": chunked(("-1", ZEROS.encode())),
    "great chunk": chunked(("f" * 16, GOOD)),
    "no chunk": chunked(("zz", GOOD)),
    "gzip": http(gzip.compress(GOOD), "200 OK", "Content-Encoding: gzip"),
    "gzip bomb": http(gzip.compress(ZEROS.encode()), "200 OK", "Content-Encoding: gzip"),
    "deflate": http(GOOD, "200 OK", "Content-Encoding: deflate, gzip"),
    "endless body": http(ZEROS),
    "endless text": b"HTTP/1.1 200 OK\r\n\r\n" + ZEROS.encode(),
    "endless header": b"HTTP/1.1 200 OK\r\nA: " + ZEROS.encode(),
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * (ENDLESS // 6),
    "endless welcome": b"HTTP/1.1 100 Continue\r\n\r\n" * (ENDLESS // 25),
    "moved": http("", "302 Found", "Location: /v1/chat/completions?plain"),
    "moved in a circle": http("", "308 Permanent Redirect", "Location: /v1/chat/completions"),
    "wait an hour": http("", "429 Too Many Requests", "Retry-After: 3600"),
    "wait for ever": http("", "503 Busy", f"Retry-After: {'9' * 400}"),
    "wait until": http("", "503 Busy", "Retry-After: Fri, 31 Dec 2100 23:59:59 GMT"),
    "wait backwards": http("", "503 Busy", "Retry-After: -5"),
    "wait nan": http("", "503 Busy", "Retry-After: nan"),
    "broken": http("<html>\x1b[31m" + "x" * 9000, "500 Error"),
    "endless error": http(ZEROS, "400 Bad Request"),
    "no longer there": http("", "404 Not Found"),
    "no longer allowed": http('{"error": "who are you"}', "401 Unauthorized"),
}  # fmt: skip
SLOW: dict[str, Callable[[socket.socket], None]] = {
    "silent": lambda sock: time.sleep(4 * SECONDS),
    "reset": lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
    "one byte at a time": lambda sock: drip(sock, http(GOOD * 20)),
    "one space at a time": lambda sock: drip(sock, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 999),
    "one header at a time": lambda sock: drip(sock, b"HTTP/1.1 200 OK\r\nA: " + b" " * 999),
    "one chunk at a time": lambda sock: drip(sock, chunked(*[("1", b" ")] * 99)),
}  # fmt: skip
MODES = [*FINE, *BAD, *SLOW]


def drip(sock: socket.socket, data: bytes) -> None:
    until = time.monotonic() + 4 * SECONDS
    for place in range(len(data)):
        if time.monotonic() > until:
            return
        sock.sendall(data[place : place + 1])
        time.sleep(SECONDS / 20)


class Hostile(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with self.request.makefile("rb") as asked:
            length = 0
            while header := asked.readline().strip():
                if header.lower().startswith(b"content-length:"):
                    length = int(header.partition(b":")[2])
            body = asked.read(length)
        text = str(json.loads(body)["messages"]) if body else ""
        mode = next((name for name in sorted(MODES, key=len, reverse=True) if f"mode: {name}." in text), "")
        if mode in SLOW:
            with contextlib.suppress(OSError):
                SLOW[mode](self.request)
        else:
            self.send(FINE[mode][0] if mode in FINE else BAD.get(mode, http('{"data": []}')))

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the client has had enough
            self.request.sendall(data)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads, request_queue_size = True, 100


@pytest.fixture
def url() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def turns(mode: str) -> tuple[Message, ...]:
    return (Message(role="user", content=f"mode: {mode}."),)


def answers(url: str, modes: list[str]) -> dict[str, TextSample]:
    client = Client(base=url, key=KEY, seconds=SECONDS, max_bytes=SIZE, retries=1)
    engine = EndpointEngine(client, "m", concurrent=64)
    (first,) = engine.answer(
        [TextRequest(problem_id="plain", sample_index=0, seed=1, messages=turns("plain"))], SAMPLING
    )
    assert first.text == "fine"
    asked = [TextRequest(problem_id=m, sample_index=0, seed=1, messages=turns(m)) for m in modes]
    found = list(engine.answer(asked, SAMPLING))
    assert sorted(s.problem_id for s in found) == sorted(modes), "one sample for one request"
    return {s.problem_id: s for s in found}


def test_a_bad_answer_is_one_unscored_sample(url: str, tmp_path: Path) -> None:
    assert len(BAD) + len(SLOW) >= 40
    found = answers(url, MODES)
    assert {m: found[m].text for m in FINE} == {m: text for m, (_, text) in FINE.items()}
    assert all(found[m].stop is Stop.ERROR for m in (*BAD, *SLOW))
    uncounted = {m for m in FINE if m.endswith("tokens") or m == "list of usage"}
    assert {m: found[m].num_tokens for m in FINE} == {m: 0 if m in uncounted else 3 for m in FINE}
    assert all(0 < len(s.error) <= 400 and "\n" not in s.error for s in found.values() if s.error)
    assert "3600 s" in found["wait an hour"].error
    assert "too large" in found["endless body"].error
    assert "compressed" in found["gzip bomb"].error
    rows = [
        {"id": s.problem_id, "text": s.text, "error": s.error, "tokens": s.num_tokens} for s in found.values()
    ]
    append_jsonl(tmp_path / "samples.jsonl", rows)
    assert read_jsonl(tmp_path / "samples.jsonl") == rows


def test_a_bad_judge_fails_one_sample(url: str) -> None:
    assert not [mode for mode in (*FINE, *BAD) if isinstance(value(url, mode, 1), float | int)], (
        "no score is made up"
    )
    assert "HTTP 429" in str(value(url, "wait an hour", 3))


def value(url: str, mode: str, attempts: int, key_env: str = "", folder: str = "") -> object:
    settings = JudgeSettings(
        url=url, model="m", attempts=attempts, request_seconds=SECONDS, prompt="{completion}", key_env=key_env
    )
    judge = Judge(settings.model_dump_json(), folder)
    problem = Problem(id=mode, messages=turns(mode), answer="1")
    asked = RewardInput(
        problem=problem, messages=turns(mode), completion=f"mode: {mode}.", completion_ids=(1,),
        stop=Stop.STOP_TOKEN, seed=0, step=0, sample=0, limit=9,
    )  # fmt: skip
    return judge.value(asked)


def cut_at(place: int) -> str:
    """A text whose character ``place`` is in the middle of the key."""
    return "x" * (place - len(SENT_KEY) // 2) + SENT_KEY


SENT_KEY = "Zq7wlp-plainkey-4471-hhtr"
SENT_BACK: dict[str, bytes] = {
    **{f"error cut at {n}": http(cut_at(n), "400 No") for n in (120, 300, 2000, 20_000)},
    "error of white space": http(" \n" * 1500 + cut_at(300), "400 No"),
    "error of 500": http(cut_at(300), "500 No"),
    "no json": http(cut_at(300)),
    "coding": http("{}", "200 OK", f"Content-Encoding: {cut_at(300)}"),
    "status": f"HTTQ/1.1 {cut_at(300)} OK\r\n\r\n".encode(),
    "finish": http(completion(finish=f'"{SENT_KEY}"')),
    "finish cut": http(completion(finish=f'"{cut_at(40)}"')),
    "finish of object": http(completion(finish=json.dumps({"a": [SENT_KEY], SENT_KEY: 1}))),
    "text": http(says(f'"my key is {SENT_KEY}"')),
    "escaped text": http(says(f'"\\u005a{SENT_KEY[1:]}"')),
    "thought": http(completion(json.dumps({"content": "a", "reasoning_content": SENT_KEY}))),
    "score": http(says(f'"{"x" * 50}{SENT_KEY}{"y" * 110}"')),
}


@pytest.mark.parametrize("name", SENT_BACK)
def test_a_key_that_a_server_sends_back_is_hidden(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SendsBack(Hostile):
        def send(self, data: bytes) -> None:
            super().send(SENT_BACK[name])

    monkeypatch.setenv("SOME_NAME", SENT_KEY)  # by its name alone, it is no secret
    with Server(("127.0.0.1", 0), SendsBack) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}/v1"
        client = Client(base=base, key=SENT_KEY, seconds=SECONDS)
        asked = TextRequest(problem_id="p", sample_index=0, seed=1, messages=turns("plain"))
        (sample,) = EndpointEngine(client, "m").answer([asked], SAMPLING)
        judged = value(base, "plain", 1, key_env="SOME_NAME", folder=str(tmp_path))
        server.shutdown()
    kept = tmp_path / "judge.jsonl"
    for said in (repr(sample), str(judged), kept.read_text() if kept.exists() else "", repr(client)):
        assert not any(SENT_KEY[at : at + 6] in said for at in range(len(SENT_KEY) - 5)), said
    if name.startswith(("finish", "text", "escaped", "thought", "score")):
        assert "[redacted]" in repr(sample)


@pytest.mark.parametrize("given", ["{}\n", "{}\r\n", " {} ", "\t{}"])
def test_white_space_around_a_key_is_not_sent(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", given.format(SENT_KEY))
    assert key_from("NO_SUCH_NAME", "A_KEY") == SENT_KEY


@pytest.mark.parametrize("given", ["", " \r\n"])
def test_an_empty_key_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", given)
    assert key_from("A_KEY") == ""


@pytest.mark.parametrize("given", ["Zq7wlp\nplain", "Zq7wlp\rplain", "Zq7wlp\x1b", "Zq7wlpł", "Zq7\ufeff"])
def test_a_key_that_cannot_be_sent_is_refused_in_one_line(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUESTEP_API_KEY", given)
    with (
        pytest.raises(
            UserError, match=r"^the environment variable TRUESTEP_API_KEY has a line end"
        ) as caught,
        connect("http://127.0.0.1:9"),
    ):
        pass
    assert "Zq7" not in str(caught.value)
    with pytest.raises(UserError, match="TRUESTEP_API_KEY has a line end"):
        judge([], url="http://127.0.0.1:9/v1", model="m", key_env="TRUESTEP_API_KEY")


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:abc/v1", "http://127.0.0.1:99999/v1", "http://127.0.0.1/a b/v1", "http://a b/v1",
        "http://a..b/v1", f"http://{'a' * 300}/v1", "http://127.0.0.1/ü/v1", "http:///v1", "http://u@h/v1",
        "http://[::1/v1", "http://127.0.0.1/\nv1",
    ],
)  # fmt: skip
def test_an_address_that_can_never_work_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not the address of a server"), connect(address, seconds=SECONDS):
        pass
    with pytest.raises(UserError, match="is not the address of a server"):
        judge([], url=address, model="m")


@pytest.mark.parametrize(
    "address",
    ["http://h", "https://h:8000/v1/", "http://[::1]:80/v1", "http://bücher.example/v1", "http://h./a%20b/v1",
     "http://h/v1?a=b&c", "http://a_b/~x/v1"],
)  # fmt: skip
def test_an_address_that_can_work_is_accepted(address: str) -> None:
    check_address(address)
    assert judge([], url=address, model="m") == []


def test_a_rejected_key_or_model_stops_at_once_only_before_the_first_answer(url: str) -> None:
    engine = EndpointEngine(Client(base=url, seconds=SECONDS), "m")
    asked = [TextRequest(problem_id="p", sample_index=0, seed=1, messages=turns("no longer there"))]
    with pytest.raises(UserError, match="model 'm' was rejected by the endpoint: HTTP 404"):
        list(engine.answer(asked, SAMPLING))


def test_a_server_that_drips_its_list_of_models_is_one_line() -> None:
    class Drips(Hostile):
        def send(self, data: bytes) -> None:
            SLOW["one header at a time"](self.request)

    with Server(("127.0.0.1", 0), Drips) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(UserError, match="no server answers"), connect(address, seconds=SECONDS / 4):
            pass
        server.shutdown()


def test_closing_ends_requests_in_progress(url: str) -> None:
    client = Client(base=url, seconds=60)
    found: list[Exception] = []

    def ask() -> None:
        try:
            client.ask("/chat/completions", {"messages": "mode: silent."})
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    client.close()
    thread.join(30)
    assert ["cancelled" in str(error) for error in found] == [True]


@pytest.mark.parametrize(
    "text", ["1e999", "-1e999", "[1e400]", "NaN", "Infinity", "[" * 30000, "", "{", "9" * 5000]
)
def test_no_json_but_finite_json(text: str) -> None:
    with pytest.raises(BadAnswer):
        parse(text.encode())


@pytest.mark.parametrize("text", ["1e308", "-0.0", "[]", "9" * 4000, r'"\\ud800"', r'"\u00e9\ud83d\ude00"'])
def test_finite_json_is_read_as_it_is(text: str) -> None:
    assert parse(text.encode()) == json.loads(text)


def test_the_longest_answer_fits() -> None:
    assert 131072 * 10 * len("\\u00e9") <= MAX_BYTES
