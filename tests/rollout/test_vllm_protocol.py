"""How truestep talks to vLLM's routes: what it refuses, in which order it asks, and what it does when a server is
lost. The server here is a stand-in that can go wrong in every way; test_vllm_rl.py has the real one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from truestep.errors import OutOfSpace, UserError
from truestep.rollout import engine_vllm, vllm_server, vllm_weights
from truestep.rollout.engine import SampleRequest, SamplingParameters, StaleWeightsError
from truestep.rollout.engine_vllm import Publisher, VllmEngine, client_of
from truestep.rollout.vllm_server import ENVIRONMENT, Servers, VllmServer
from truestep.rollout.vllm_weights import Abilities, FileDelivery, negotiate, weights_folder, write_weights
from truestep.seeding import Purpose

torch = pytest.importorskip("torch")


class StandIn(BaseHTTPRequestHandler):
    """Answers like vLLM 0.32, from a table that a test changes."""

    said: ClassVar[list[tuple[str, Any]]] = []
    answers: ClassVar[dict[str, Any]] = {}
    lost: ClassVar[int] = 0  # requests for samples that are cut off

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null"))

    def _answer(self, body: Any) -> None:
        kind, path = type(self), self.path
        kind.said.append((path, body))
        if path == "/inference/v1/generate" and kind.lost > 0:
            kind.lost -= 1
            self.close_connection = True
            self.connection.close()
            return
        found = kind.answers.get(path, {})
        data = json.dumps(found(body) if callable(found) else found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def config(**more: str) -> dict[str, Any]:
    model = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "max_model_len": 64} | more
    extension = {"worker_extension_cls": "truestep_vllm_worker.Receiver"}
    return {"vllm_config": {"model_config": model, "parallel_config": extension}}


def sampled(body: Any, version: str = "3") -> dict[str, Any]:
    tokens = [7, 8, 9, 2]
    if "request_id" not in body:  # the probe of the cache after an update
        return {"usage": {"prompt_tokens_details": None}, "choices": [{}]}
    return {
        "usage": {"prompt_tokens_details": {"cached_tokens": 1}},
        "choices": [{
            "token_ids": tokens, "finish_reason": "stop", "logprobs": {"content": [{"logprob": -0.5}] * 4},
            "weight_versions": [{"version": version, "start": 0, "end": 4}],
        }],
    }  # fmt: skip


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(engine_vllm, "POLL_SECONDS", 0.01)
    StandIn.said.clear()
    StandIn.lost = 0
    StandIn.answers = {
        "/version": {"version": "0.32.1"}, "/openapi.json": {"paths": dict.fromkeys(vllm_weights.ROUTES, 1)},
        "/server_info?config_format=json": config(), "/collective_rpc": {"results": [{"w": 11}]},
        "/reset_prefix_cache": {"success": True}, "/weight_info": {"weight_version": "3"},
        "/inference/v1/generate": sampled,
    }  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def asked() -> list[str]:
    return [path for path, _ in StandIn.said]


def test_a_right_server_tells_what_it_can(url: str) -> None:
    assert negotiate(client_of(url), "float32", 64) == Abilities(version="0.32.1", tells_bits=True, length=64)
    StandIn.answers["/server_info?config_format=json"]["vllm_config"]["parallel_config"] = {}
    assert not negotiate(client_of(url), "float32", 64).tells_bits


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/version", {"version": "0.31.9"}, r"is version 0\.31\.9; RL needs 0\.32"),
        ("/version", {"version": "0.33.0"}, r"is version 0\.33\.0; RL needs 0\.32"),
        ("/version", {"version": "main"}, "is version main; RL needs"),
        ("/version", {}, "cannot be asked what it can do"),
        ("/openapi.json", {"paths": {}}, "does not offer /collective_rpc; start it as truestep vllm MODEL"),
        ("/server_info?config_format=json", config(logprobs_mode="raw_logprobs"), "--logprobs-mode processed"),
        ("/server_info?config_format=json", config(dtype="torch.bfloat16"), "computes in bfloat16, but compute.dtype"),
        ("/server_info?config_format=json", config(max_model_len="32"), "takes 32 tokens; start it with --max-model"),
    ],
)  # fmt: skip
def test_another_server_is_refused_with_what_to_do(url: str, path: str, answer: Any, words: str) -> None:
    StandIn.answers[path] = answer
    with pytest.raises(UserError, match=words):
        negotiate(client_of(url), "float32", 64)


def test_no_server_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be asked .*; start it as"):
        negotiate(client_of("http://127.0.0.1:9"), "float32", 64)


def delivery(url: str, version: int = 3, *, tells: bool = True) -> FileDelivery:
    return FileDelivery("/weights", {url: Abilities(version="0.32.1", tells_bits=tells)}, version)


def test_weights_are_loaded_while_paused_and_the_cache_is_reset_before_it_goes_on(url: str) -> None:
    assert delivery(url).load(client_of(url), 5.0) == {"w": 11}
    assert asked() == [
        "/pause?mode=abort", "/collective_rpc", "/update_weight_version", "/reset_prefix_cache", "/weight_info",
        "/resume", "/inference/v1/generate",
    ]  # fmt: skip
    assert StandIn.said[1][1] == {"method": "truestep_load", "kwargs": {"folder": "/weights"}}
    assert StandIn.said[2][1] == {"new_version": "3"}


def test_a_sleeping_server_wakes_for_the_weights_and_then_for_its_cache(url: str) -> None:
    one = delivery(url)
    one.sleep(client_of(url))
    one.load(client_of(url), 5.0, wakes=True)
    assert asked()[:5] == [
        "/sleep?level=1", "/pause?mode=abort", "/wake_up?tags=weights", "/collective_rpc", "/update_weight_version",
    ]  # fmt: skip
    assert asked().index("/wake_up?tags=kv_cache") < asked().index("/reset_prefix_cache")


def test_without_the_extension_vllms_own_route_loads(url: str) -> None:
    assert delivery(url, tells=False).load(client_of(url), 5.0) == {}
    assert StandIn.said[1][1] == {"method": "reload_weights", "kwargs": {"weights_path": "/weights"}}


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/reset_prefix_cache", {"success": False}, "did not reset its prefix cache"),
        ("/weight_info", {"weight_version": "2"}, "says that it has version 2, not 3"),
    ],
)
def test_a_server_that_does_not_do_as_asked_is_not_resumed(
    url: str, path: str, answer: Any, words: str
) -> None:
    StandIn.answers[path] = answer
    with pytest.raises(StaleWeightsError, match=words):
        delivery(url).load(client_of(url), 5.0)
    assert "/resume" not in asked()


def test_a_cache_that_was_kept_is_seen_in_the_next_prompt(url: str) -> None:
    told = {"prompt_tokens_details": {"cached_tokens": 32}}
    StandIn.answers["/inference/v1/generate"] = {"usage": told, "choices": [{}]}
    with pytest.raises(StaleWeightsError, match="kept 32 of"):
        delivery(url).load(client_of(url), 5.0)
    StandIn.answers["/inference/v1/generate"] = {"usage": {"prompt_tokens_details": None}, "choices": [{}]}
    assert delivery(url).load(client_of(url), 5.0) == {"w": 11}


def test_workers_that_loaded_different_bits_have_no_fingerprint(url: str) -> None:
    StandIn.answers["/collective_rpc"] = {"results": [{"w": 11, "v": 5}, {"w": 12, "v": 5}]}
    assert delivery(url).load(client_of(url), 5.0) == {"w": -1, "v": 5}


def engine_of(url: str, tmp_path: Path, **more: Any) -> VllmEngine:
    engine = VllmEngine([url], 4, Publisher(delivery(url), tmp_path, **more))
    engine.policy_version = 3
    return engine


REQUEST = SampleRequest(
    problem_id="p", sample_index=0, prompt_ids=(4, 5), seed=0, purpose=Purpose.SAMPLE, step=0
)
SAMPLING = SamplingParameters(temperature=1.0, max_new_tokens=4, stop_token_ids=(2,))


def test_publishing_writes_loads_and_returns_what_the_server_got(url: str, tmp_path: Path) -> None:
    engine = engine_of(url, tmp_path)
    StandIn.answers["/weight_info"] = {"weight_version": "4"}
    receipt = engine.publish({"w": torch.ones(3)}, 4)
    assert (receipt.version, receipt.fingerprints, receipt.is_received, receipt.unread) == (
        4,
        {"w": 11},
        True,
        "",
    )
    assert engine.policy_version == 4
    assert [p.name for p in tmp_path.iterdir()] == ["model-00000.safetensors"]


def test_a_copy_with_other_bits_is_found(url: str, tmp_path: Path) -> None:
    engine = engine_of(url, tmp_path, copies={"table": "head"})
    StandIn.answers["/collective_rpc"] = {"results": [{"table": 5, "head": 5}]}
    assert engine.publish({"table": torch.ones(3)}, 3).fingerprints["table"] == 5
    StandIn.answers["/collective_rpc"] = {"results": [{"table": 5, "head": 6}]}
    assert engine.publish({"table": torch.ones(3)}, 3).fingerprints["table"] == -1


def test_samples_come_with_their_version_and_their_work(url: str, tmp_path: Path) -> None:
    engine = engine_of(url, tmp_path)
    (made,) = engine.generate([REQUEST], SAMPLING)
    assert (made.completion_ids, made.policy_version) == ((7, 8, 9, 2), (3, 3, 3, 3))
    cost = engine.take_cost()
    # One of two prompt tokens was cached; the last of four sampled tokens is not passed: positions 1 to 4.
    assert (cost.prompt_tokens, cost.generated_pass_tokens, cost.generated_pairs) == (1, 4, 2 + 3 + 4 + 5)


@pytest.mark.parametrize(
    "spans",
    [
        [{"version": "2", "start": 0, "end": 4}],
        [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 4}],
        [{"version": "3", "start": 0, "end": 3}],
        [],
    ],
)
def test_tokens_of_another_version_stop_the_rollout(url: str, tmp_path: Path, spans: Any) -> None:
    def answer(body: Any) -> Any:
        found = sampled(body)
        found["choices"][0]["weight_versions"] = spans
        return found

    StandIn.answers["/inference/v1/generate"] = answer
    with pytest.raises(StaleWeightsError, match="version 3 of the weights was to sample 4 tokens"):
        list(engine_of(url, tmp_path).generate([REQUEST], SAMPLING))


def test_a_lost_request_is_asked_again_when_the_server_has_the_version(url: str, tmp_path: Path) -> None:
    StandIn.lost = 2
    (made,) = engine_of(url, tmp_path).generate([REQUEST], SAMPLING)
    assert made.error == ""
    assert asked().count("/inference/v1/generate") == 3
    assert asked().count("/weight_info") == 2


def test_a_server_that_came_back_with_old_weights_is_not_asked(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_vllm, "START_SECONDS", 0.3)
    StandIn.lost, StandIn.answers["/weight_info"] = 1, {"weight_version": "default"}
    with pytest.raises(UserError, match="was lost, and did not answer again"):
        list(engine_of(url, tmp_path).generate([REQUEST], SAMPLING))


def test_requests_are_lost_only_so_often(url: str, tmp_path: Path) -> None:
    StandIn.lost = 99
    (made,) = engine_of(url, tmp_path).generate([REQUEST], SAMPLING)
    assert made.error.startswith("vllm: ")
    assert asked().count("/inference/v1/generate") == engine_vllm.RETRIES + 1


def test_a_stop_drops_the_requests_on_the_server(url: str, tmp_path: Path) -> None:
    calls = iter(range(9))

    def stop() -> None:
        if next(calls):
            raise KeyboardInterrupt

    StandIn.answers["/inference/v1/generate"] = lambda body: time.sleep(0.5) or sampled(body)
    with pytest.raises(KeyboardInterrupt):
        list(engine_of(url, tmp_path).generate([REQUEST], SAMPLING, stop))
    assert "/abort_requests" in asked()


def test_a_completion_ends_at_a_stop_sequence(url: str, tmp_path: Path) -> None:
    sampling = SamplingParameters(
        temperature=1.0, max_new_tokens=4, stop_token_ids=(2,), stop_sequences=((7, 8),)
    )
    (made,) = engine_of(url, tmp_path).generate([REQUEST], sampling)
    assert made.completion_ids == (7, 8)
    assert made.behavior_logprobs == (-0.5, -0.5)
    assert made.stop.name == "STOP_TOKEN"


def test_weights_are_written_whole_and_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(vllm_weights, "FILE_BYTES", 40)
    weights = {f"w{i}": torch.full((4,), float(i)) for i in range(5)}
    weights["t"] = torch.arange(6.0).view(2, 3).t()
    write_weights(tmp_path, weights, {"w3": "copy"})
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert sorted(found) == sorted([*weights, "copy"])
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert torch.equal(found["copy"], weights["w3"])
    write_weights(tmp_path / "other", weights, writes=False)
    assert not (tmp_path / "other").exists()


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(OutOfSpace, match=r"set vllm\.folder to a folder with more"),
        weights_folder(str(tmp_path), 1 << 60),
    ):
        pass
    with weights_folder(str(tmp_path), 10) as folder:
        assert folder.is_dir()
    assert not folder.exists()


SERVER = """
import http.server, json, os, sys, pathlib
port = int(sys.argv[sys.argv.index("--port") + 1])
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *a): pass
pathlib.Path(os.environ["STARTS"]).open("a").write("x")
http.server.HTTPServer(("127.0.0.1", port), H).serve_forever()
"""


@pytest.fixture
def stand_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script, python = tmp_path / "server.py", tmp_path / "python"
    script.write_text(SERVER)
    # Called as `python FILE PARENT COMMAND`, and then as `python -m vllm... --port N`.
    python.write_text(
        f'#!/bin/sh\ncase $1 in -m) shift 2; exec {sys.executable} {script} "$@";; *) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv(ENVIRONMENT, str(python))
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    monkeypatch.setattr(vllm_server, "WATCH_SECONDS", 0.02)
    return tmp_path / "starts"


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_dead_server_is_started_again_with_the_newest_weights_but_not_for_ever(
    stand_in_python: Path,
) -> None:
    restored: list[str] = []
    told: list[str] = []
    server = VllmServer(model="m", dtype="float32", context_length=8, max_running=1, trains=True)
    with Servers(server, restarts=1, say=told.append, restore=restored.append) as servers:
        (url,) = servers.urls
        servers.processes[0].process.kill()
        until(lambda: restored)
        assert restored == [url]
        assert servers.urls == [url], "at the same address"
        assert told == [f"the vLLM server {url} was killed (signal 9); it is started again (0 more times)"]
        servers.processes[0].process.kill()
        until(lambda: servers.failure)
        assert servers.failure == f"the vLLM server {url} was killed (signal 9)"
        folder = servers.folder
    assert stand_in_python.read_text() == "xx"
    assert not folder.exists()
    assert not vllm_server.answers(url)


def test_a_server_that_loads_other_weights_after_its_restart_is_given_up(stand_in_python: Path) -> None:
    def refuse(url: str) -> None:
        raise UserError("it did not load the weights that were published last")

    server = VllmServer(model="m", dtype="float32", context_length=8, max_running=1, trains=True)
    with Servers(server, restarts=3, say=lambda text: None, restore=refuse) as servers:
        servers.processes[0].process.kill()
        until(lambda: servers.failure)
        assert "could not be started again: it did not load the weights" in servers.failure


def test_a_server_ends_with_its_parent_even_if_that_is_killed(stand_in_python: Path, tmp_path: Path) -> None:
    code = """
import sys, time
from truestep.rollout.vllm_server import Servers, VllmServer
server = VllmServer(model="m", dtype="float32", context_length=8, max_running=1, trains=True)
with Servers(server) as servers:
    print(servers.urls[0], flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert vllm_server.answers(url)
        parent.kill()
    until(lambda: not vllm_server.answers(url))


def test_weights_of_killed_runs_are_removed_and_no_others(tmp_path: Path) -> None:
    code = f"""
import sys, time
from truestep.rollout.vllm_weights import weights_folder
with weights_folder({str(tmp_path)!r}, 10) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        theirs = Path(run.stdout.readline().strip())
        (tmp_path / f"{vllm_weights.PREFIX}without-a-lock").mkdir()
        with weights_folder(str(tmp_path), 10) as folder:
            assert theirs.is_dir(), "of a run that goes on"
            run.kill()
            run.wait()
            with weights_folder(str(tmp_path), 10):
                assert not theirs.exists()
                assert folder.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == [f"{vllm_weights.PREFIX}without-a-lock"]


def test_an_aborted_request_is_not_a_completion_but_asked_again(url: str, tmp_path: Path) -> None:
    answers = iter(["abort", "stop"])

    def answer(body: Any) -> Any:
        found = sampled(body)
        found["choices"][0] |= {"finish_reason": next(answers)}
        return found

    StandIn.answers["/inference/v1/generate"] = answer
    (made,) = engine_of(url, tmp_path).generate([REQUEST], SAMPLING)
    assert made.completion_ids == (7, 8, 9, 2)
    assert asked().count("/inference/v1/generate") == 2


def test_each_server_gets_its_gpus() -> None:
    assert vllm_server.only_gpus("") == {}
    assert set(vllm_server.only_gpus("2,3").values()) == {"2,3"}


def test_vllms_processes_get_their_files_and_none_of_a_ranks_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE", "VLLM_API_KEY")
    for name in gone:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    vllm_server.write_extension(tmp_path)
    found = vllm_server.environment(tmp_path)
    assert found["PYTHONPATH"] == f"{tmp_path}:/mine"
    assert not set(gone) & set(found)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "truestep_fingerprints.py",
        "truestep_tensor_group.py",
        "truestep_vllm_start.py",
        "truestep_vllm_transfer.py",
        "truestep_vllm_worker.py",
    ]
    for path in tmp_path.iterdir():
        assert "from truestep." not in path.read_text(), "vLLM's environment has no truestep"


RECIPE = """
name = "x"
[model]
path = "tiny"
[data.train]
source = "procedural:addition"
limit = 8
[[stages]]
kind = "rl"
data = "train"
steps = 1
prompts_per_step = 4
tokens_per_microbatch = 4096
optimizer = { lr = 1e-4 }
engine = "vllm"
sampling = { max_new_tokens = 8 }
"""


def test_a_missing_vllm_is_said_before_the_data_are_loaded(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truestep.pipeline.prepare import prepare
    from truestep.settings import load_settings

    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)

    def refused(words: str, *overrides: str) -> None:
        with pytest.raises(UserError, match=words):
            prepare(load_settings(path, overrides), base_dir=tmp_path)

    monkeypatch.setenv(ENVIRONMENT, "/nowhere/python")
    refused("/nowhere/python is not a Python interpreter")
    monkeypatch.setenv(ENVIRONMENT, sys.executable)
    refused("has no vLLM; set TRUESTEP_VLLM_PYTHON")
    monkeypatch.setattr("truestep.pipeline.prepare.installed_version", lambda python: "0.31.0")
    refused(r"has vLLM 0\.31\.0; RL needs 0\.32")
    refused("cannot be asked what it can do", 'vllm.attach=["http://127.0.0.1:9"]')
    StandIn.answers["/openapi.json"] = {"paths": {}}
    refused("does not offer /collective_rpc", f'vllm.attach=["{url}"]')
    StandIn.answers["/openapi.json"] = {"paths": dict.fromkeys(vllm_weights.ROUTES, 1)}
    assert prepare(
        load_settings(path, [f'vllm.attach=["{url}"]']), base_dir=tmp_path
    ).settings.vllm.attach == (url,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('vllm.attach=["10.0.0.5:8000"]', "is not an address; write http://HOST:PORT"),
        ('vllm.attach=["http://h:1/v1"]', "is not an address"),
        ('vllm.attach=["http://u:p@h:1"]', "looks like a secret"),
        ('vllm.attach=["http://u@localhost:1"]', "must not contain a user name"),
        ('vllm={ attach = ["http://h:1"], servers = 2 }', "remove servers and options"),
        ('vllm.attach=["http://h:1"]', "is on another machine; set folder"),
        ('vllm.devices=["0", "1"]', "2 entries for servers = 1"),
        ('stages.rl.engine="sglang"', "engine"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, change: str, words: str) -> None:
    from truestep.settings import load_settings

    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    with pytest.raises(UserError, match=words):
        load_settings(path, [change])
