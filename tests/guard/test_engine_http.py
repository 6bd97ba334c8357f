"""The engine check over HTTP: servers that answer as vLLM's and SGLang's do, from a real model, and bad ones."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
import transformers

from truestep.guard import Guard, TruestepGuard
from truestep.guard.engine import EngineCheck, EngineSeen
from truestep.guard.engine_http import Server
from truestep.guard.engine_read import logprobs
from truestep.guard.tokens import Batch

KEY = "tk-5f3aQ9zLw7Xb2Kd8"
ROWS = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(5))
torch.set_num_threads(1)


def llama(seed: int = 0) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


class Peer:
    """What one server answers. ``fault`` names what is wrong with it."""

    def __init__(self, kind: str, fault: str = "") -> None:
        self.kind, self.fault, self.model = kind, fault, llama()
        self.asked: list[tuple[str, dict[str, Any], str]] = []

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path == "/v1/models":
            names = ["base", "adapter"]
            return 200, json.dumps({"data": [{"id": n, "owned_by": self.kind} for n in names]}).encode()
        if self.fault == "slow":
            time.sleep(1.5)
        if self.fault == "500":
            return 500, b'{"error": "internal"}'
        if self.fault == "json":
            return 200, b"{not JSON"
        if self.fault == "echo":
            return 400, f"the key {KEY} is wrong".encode()
        ids = body["prompt" if self.kind == "vllm" else "input_ids"]
        text = json.dumps(self.vllm(ids) if self.kind == "vllm" else self.sglang(ids))
        return 200, text.encode()

    def values(self, ids: list[int]) -> list[Any]:
        found: list[Any] = [None, *logprobs(self.model, [ids], torch.device("cpu"))[0].tolist()]
        if self.fault == "nan":
            found[3] = float("nan")
        if self.fault == "null":
            found[3] = None
        return found[:-1] if self.fault == "short" else found

    def vllm(self, ids: list[int]) -> dict[str, Any]:
        # With prompt_logprobs = 1, the most probable token stands beside the given one.
        entries: list[Any] = [
            None if v is None else {"63": {"logprob": -0.5, "rank": 1}, str(i): {"logprob": v, "rank": 3}}
            for i, v in zip(ids, self.values(ids), strict=False)
        ]
        name = "other" if self.fault == "field" else "prompt_logprobs"
        if self.fault == "tokens":
            entries[1:] = [{"1": {"logprob": -1.0}} for _ in entries[1:]]
        return {"choices": [{"index": 0, "text": "x", name: entries}]}

    def sglang(self, ids: list[int]) -> dict[str, Any]:
        entries = [[v, i, None] for i, v in zip(ids, self.values(ids), strict=False)]
        if self.fault == "tokens":
            entries = [[v, i + 1, None] for v, i, _ in entries]
        name = "other" if self.fault == "field" else "input_token_logprobs"
        return {"text": "x", "meta_info": {name: entries}}


@contextmanager
def served(peer: Peer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: dict[str, Any]) -> None:
            peer.asked.append((self.path, body, self.headers.get("Authorization", "")))
            status, data = peer.answer(self.path, body)
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client no longer waits

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


BOTH = pytest.mark.parametrize("kind", ["vllm", "sglang"])


@BOTH
def test_the_answers_are_the_log_probabilities_of_the_given_tokens(kind: str) -> None:
    peer, ids = Peer(kind), ROWS.tolist()
    with served(peer) as address:
        found = Server(address, 10.0)(ids)
        assert Server(address + "/v1/", 10.0)(ids) == found
    own = logprobs(peer.model, ids, torch.device("cpu"))[0].reshape(3, -1)
    assert torch.allclose(torch.tensor(found).double(), torch.tensor(own), atol=1e-12)
    assert len({path for path, _, _ in peer.asked}) == 2
    body = peer.asked[1][1]
    if kind == "vllm":
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("base", 1, 0.0)
    else:
        assert (body["return_logprob"], body["logprob_start_len"]) == (True, 0)


def test_the_name_of_an_adapter_follows_the_address() -> None:
    peer = Peer("vllm")
    with served(peer) as address:
        Server(address + "#adapter", 10.0)(ROWS.tolist())
    assert {body["model"] for path, body, _ in peer.asked if path != "/v1/models"} == {"adapter"}


@BOTH
@pytest.mark.parametrize("updated", [True, False])
def test_a_guarded_run_with_a_server(kind: str, updated: bool) -> None:
    peer, model = Peer(kind), llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with served(peer) as address:
        told = Guard(model, optimizer, engine=address, every=1)
        for _ in range(5):
            if updated:
                peer.model.load_state_dict(model.state_dict())
            optimizer.zero_grad()
            model(input_ids=ROWS, labels=ROWS).loss.backward()
            optimizer.step()
    assert told.failure == ""
    assert any("stale_engine" in r["codes"] for r in told.records) == (not updated)
    assert {r["verdict"] for r in told.records[:2]} == {"RIGHT"}


def check(address: str, seconds: float = 10.0) -> EngineSeen:
    seen = EngineCheck(address, llama(), seconds=seconds).before_step(0, lambda step: True, [Batch(ids=ROWS)])
    assert seen is not None
    return seen


@BOTH
@pytest.mark.parametrize("fault", ["500", "json", "nan", "null", "short", "field", "tokens", "slow", ""])
def test_bad_servers_become_a_note(kind: str, fault: str) -> None:
    with served(Peer(kind, fault)) as address:
        seen = check(address, 0.4 if fault == "slow" else 10.0)
    assert seen.causes == ()
    assert [n.kinds for n in seen.notes] == ([("engine_not_reachable",)] if fault else [])
    assert all(n.values["reason"] for n in seen.notes)


def test_a_refused_connection_becomes_a_note() -> None:
    with served(Peer("vllm")) as address:
        pass
    seen = check(address, 2.0)
    assert [n.kinds for n in seen.notes] == [("engine_not_reachable",)]
    assert "refused" in seen.notes[0].values["reason"].lower()


@BOTH
def test_a_key_is_sent_and_never_shown(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRUESTEP_API_KEY", KEY)
    peer, model = Peer(kind, "echo"), llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with served(peer) as address:
        told = Guard(model, optimizer, engine=address, every=1)
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
    assert {key for _, _, key in peer.asked} == {f"Bearer {KEY}"}
    shown = capsys.readouterr().err + json.dumps(told.records)
    assert "engine not reachable: HTTP 400" in shown
    assert KEY not in shown


@pytest.mark.parametrize(
    "address",
    [
        f"http://user:{KEY}@127.0.0.1:1",
        f"http://127.0.0.1:1/v1?api_key={KEY}",
        "127.0.0.1:8000",
        "http://a b",
        "ftp://x",
    ],
)
def test_wrong_addresses_are_refused_before_the_training_without_their_key(address: str) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for make in (lambda: Guard(model, optimizer, engine=address), lambda: TruestepGuard(engine=address)):
        with pytest.raises(ValueError, match="engine: the address") as caught:
            make()
        assert KEY not in str(caught.value)
