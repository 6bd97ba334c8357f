"""Secrets are found by name, prefix and shape, wherever they could be written; hashes, commits and ids are not."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import string
import sys
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from truestep import rundir
from truestep.checkpoint.export import model_card
from truestep.cli import main
from truestep.errors import UserError
from truestep.http_client import Client, Rejected
from truestep.records import Message, Problem, RewardInput, Stop
from truestep.redaction import find_secret, from_environment, is_secret_name, redact, redact_command
from truestep.report.html import write_report
from truestep.reward_settings import RewardSettings
from truestep.rewards.judge import Judge, JudgeSettings
from truestep.rewards.pool import FunctionPool
from truestep.settings import parse_settings
from truestep.study.load import parse_study
from truestep.user_code import find_source

LETTERS, DIGITS = string.ascii_letters, string.digits
DRAW = random.Random(17)


def drawn(alphabet: str, length: int) -> str:
    """At least three digits: so irregular that a shape is visible."""
    text = "".join(DRAW.choice(alphabet) for _ in range(length - 3))
    return text[:5] + "7" + text[5:9] + "2" + text[9:] + "4"


ALL, HEX = LETTERS + DIGITS, "0123456789abcdef"
NAMES = [
    "password",
    "api_key",
    "apiKey",
    "OPENAI_API_KEY",
    "secret",
    "access_token",
    "db.passwd",
    "client-secret",
    "auth_token",
    "private_key",
]
PREFIXES = {
    "hf_": 34,
    "sk-": 40,
    "sk-proj-": 60,
    "sk-ant-api03-": 80,
    "ghp_": 36,
    "gho_": 36,
    "github_pat_": 60,
    "xoxb-": 40,
    "xoxp-": 40,
    "glpat-": 20,
    "npm_": 36,
    "pypi-": 60,
    "AKIA": 16,
    "ASIA": 16,
    "AIza": 35,
    "gsk_": 48,
    "r8_": 37,
    "nvapi-": 60,
    "ya29.": 60,
    "xai-": 60,
}
# The secret and a text that contains it.
BARE = [
    (s := p + drawn(ALL.upper() if p.endswith("IA") else ALL, n), s)
    for p, n in PREFIXES.items()
    for _ in range(2)
]
BARE += [(s := drawn(ALL, n), s) for n in (36, 40, 48, 64) for _ in range(3)]
BARE += [
    (s := drawn(ALL, 20), f"https://{user}:{s}@host/path?x=1")
    for user in ("me", "x-access-token", "", "u.v")
    for _ in range(2)
]
BARE += [
    (s := drawn(ALL, 24), f"{scheme} {s}")
    for scheme in ("Bearer", "bearer", "Authorization: Bearer", "Authorization: Basic")
]
BARE += [(s := "eyJ" + drawn(ALL, 30), f"{s}.{drawn(ALL, 30)}.{drawn(ALL, 20)}") for _ in range(4)]
NAMED = [
    (s := drawn(alphabet, 32), f"{name}{sign}{s}")
    for name in NAMES
    for alphabet in (HEX,)
    for sign in ("=", ": ")
]
NAMED += [
    (s := f"Tr0ub4dor{n}", form.format(s))
    for n, form in enumerate(
        (
            'password="{}"',
            "password='{}'",
            '{{"password": "{}"}}',
            "password=p$$w{}",
            "db_password = '$x{}'",
            "--password {}",
            "--api-key={}",
            "?api_key={}&x=1",
            'options={{api_key = "{}"}}',
            "--set a.b.token={}",
            "export SECRET={}",
            "-----BEGIN RSA PRIVATE KEY-----\n{}",
            "pwd: {}",
            "apikey => {}",
        )
    )
]
SECRETS = BARE + NAMED


def settings_of(text: str, secret: str) -> list[dict[str, Any]]:
    """Recipes that have the secret in several tables."""
    base: dict[str, Any] = {
        "name": "x",
        "model": {"path": "tiny"},
        "data": {"d": {"source": "procedural:addition"}},
    }
    judge = {"function": "judge", "options": {"url": "http://h/v1", "model": "m"}}
    rl = {
        "kind": "rl",
        "data": "d",
        "steps": 1,
        "prompts_per_step": 2,
        "tokens_per_microbatch": 9,
        "optimizer": {"lr": 0.1},
        "sampling": {"max_new_tokens": 4},
    }

    def options(**more: Any) -> dict[str, Any]:
        entry = {**judge, "options": {**judge["options"], **more}}  # type: ignore[dict-item]
        return {**base, "stages": [{**rl, "rewards": [entry]}]}

    return [
        {**base, "model": {"path": text}},
        {**base, "data": {"d": {"source": text}}},
        {**base, "chat": {"system": text}},
        {**base, "evaluate": {"benchmarks": ["math500"], "engine": f"http://host/v1?key={text}"}},
        {**base, "declared": {"x": [text]}},
        options(body={"x": text}),
        options(body={"api_key": secret}),
        options(password=secret),
        options(prompt="{completion} " + text),
    ]


def test_there_are_a_hundred_secrets() -> None:
    assert len({secret for secret, _ in SECRETS}) >= 100


@pytest.mark.parametrize(("secret", "text"), SECRETS)
def test_no_text_and_no_settings_show_a_secret(secret: str, text: str) -> None:
    for shown in (text, f"it failed ({text})", f"x\n{text}\ny", json.dumps({"said": text})):
        assert secret not in redact(shown), redact(shown)
    assert secret not in "".join(
        redact_command(["truestep", *([text] if "BEGIN" in text else text.split()), "--password", secret])
    )
    assert secret not in model_card("n", "tiny", [], [], {"command": redact_command(["x", text])})
    for raw in settings_of(text, secret):
        with pytest.raises(UserError) as caught:
            parse_settings(raw, where="r.toml")
        assert secret not in redact(str(caught.value))
    with pytest.raises(UserError, match=r"arms\.set looks like a secret|looks like a secret"):
        parse_study({"arms": [{"set": {"x": text}}]}, "s.toml")


def test_no_file_and_no_terminal_show_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TRUESTEP_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    written: dict[str, str] = {}
    monkeypatch.setattr(sys, "argv", ["truestep", "run", *[text for _, text in SECRETS]])
    rundir.write_json(tmp_path / "provenance.json", rundir.provenance(0))
    (tmp_path / "resolved.toml").write_text("".join(f"# {text}\n" for _, text in SECRETS))
    rundir.write_json(
        tmp_path / "summary.json", {"name": "x", "stages": [], "scores": [], "notes": [t for _, t in SECRETS]}
    )
    written["provenance.json"] = (tmp_path / "provenance.json").read_text()
    written["report.html"] = write_report(tmp_path).read_text()
    for _, text in SECRETS:
        with pytest.raises(SystemExit):
            main._fail(f"it failed: {text}", 2)
    written["terminal"] = "".join(capsys.readouterr())
    written["judge.jsonl"] = stored(tmp_path)
    written["server's words"] = refused()
    written["traceback"] = raised(tmp_path)
    assert {place: [s for s, _ in SECRETS if s in text] for place, text in written.items()} == {
        place: [] for place in written
    }
    assert all(text.count("[redacted]") >= 90 for text in written.values())


def stored(folder: Path) -> str:
    judge = Judge(JudgeSettings(url="http://127.0.0.1/v1", model="m").model_dump_json(), str(folder))
    for number, (_, text) in enumerate(SECRETS):
        judge._keep(str(number), text)
    return (folder / "judge.jsonl").read_text()


def refused() -> str:
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = SECRETS[int(self.path.rpartition("/")[2])][1].encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    words = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(base=f"http://127.0.0.1:{server.server_port}", seconds=30)
        for number in range(len(SECRETS)):
            with pytest.raises(Rejected) as caught:
                client.ask(f"/{number}")
            words.append(str(caught.value))
        server.shutdown()
    return "\n".join(words)


def raised(folder: Path) -> str:
    code = "def f(samples, token):\n    return [ValueError(f'{s.completion} {token}') for s in samples]\n"
    (folder / "own.py").write_text(code)
    entry = RewardSettings(
        function="own.py:f", options={"token": "${WORD_OF_MINE}"}, batch_size=1000, max_failure_share=1
    )
    turns = (Message(role="user", content="x"),)
    asked = [
        RewardInput(
            problem=Problem(id="p", messages=turns, answer="1"),
            messages=turns,
            completion=text,
            completion_ids=(1,),
            stop=Stop.STOP_TOKEN,
            seed=0,
            step=0,
            sample=0,
            limit=9,
        )
        for _, text in SECRETS
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WORD_OF_MINE", "opensesame")
        pool = FunctionPool(entry, find_source("own.py:f", folder, what="reward"), base=folder, folder=folder)
        try:
            pool.start()
            (future,) = pool.submit(asked)
            said = "\n".join(f"{a.reason}\n{a.detail}" for a in future.result())
        finally:
            pool.close()
    assert "opensesame" not in said
    return said


DIGEST = hashlib.sha256(b"x")
NO_SECRETS = [
    hashlib.sha1(b"x").hexdigest(),
    DIGEST.hexdigest(),
    DIGEST.hexdigest().upper(),
    DIGEST.hexdigest()[:12],
    hashlib.sha512(b"x").hexdigest(),
    f"sha256-{base64.b64encode(DIGEST.digest()).decode()}",
    f"sha256={base64.b64encode(DIGEST.digest()).decode()}",
    f"SHA256:{base64.b64encode(DIGEST.digest()).decode()[:43]}",
    str(uuid.UUID(int=12345)),
    "v1.2.3-14-g8f3a2b1",
    "commit=8f3a2b1c9d",
    "revision: 8f3a2b1c9d8f3a2b1c9d8f3a2b1c9d8f3a2b1c9d",
    "01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "V1StGXR8_Z5jdHi6B-myT",
    "0ujtsYcgvSTl8PAuAdqWYSMnLOv",
    "runs/DeepSeek-R1-Distill-Qwen-1.5B-MATH-a1b2c3d4",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceM4/Idefics3-8B-Llama3",
    "models--Qwen--Qwen2.5-Math-7B/snapshots/4a83ca6e4526a4f2da3aa259ec36c259f66b2ab2",
    "eval-Qwen2.5-Math-7B-0123abcd/evaluations/think/math500.samples.jsonl",
    "Wav2Vec2PhonemeCTCTokenizerOutput",
    "Qwen2ForCausalLM",
    "torch-2.13.0+cu130-cp312-cp312-manylinux_2_28_x86_64.whl",
    "max_new_tokens = 4096",
    "eos_token = '<|im_end|>'",
    "pad_token: 0",
    "stop_token_ids = [1, 2]",
    "tokens=4096 per step",
    "key_env = JUDGE_API_KEY",
    "api_key: expected a string, got null",
    "token: unexpected end",
    "password: the key is missing",
    "http://localhost:8000/v1",
    "https://github.com/org/repo@main",
    "git@github.com:org/repo.git",
    "user@host.org",
    "hf_transfer_enabled",
    "sk-learn",
    "task-specific-heads",
    "the answer is 42",
    "--out runs/x --seed 7",
    "/nix/store/0c2wq6z3v5x7k8m9n1p4r6s8t0a2b4c6-python3",
    "https://huggingface.co/datasets/openai/gsm8k/resolve/main/README.md",
    "2025-01-31T12:30:45Z",
    "each trained token: `policy_logprobs`",
    "self.token = match[0]",
    "A1b2/C3d4/E5f6/G7h8/I9j0/K1l2/M3n4/Q5r6",
    "basic algebra",
    "bearer of news",
    "api_key=${MY_KEY}",
]


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text
    assert redact_command(text.split()) == text.split()
    assert find_secret({"x": text, "commit": text, "run_id": [text]}) is None


@pytest.mark.parametrize(
    "name",
    [
        "max_new_tokens",
        "eos_token",
        "stop_token_ids",
        "key",
        "keys",
        "tokenizer",
        "key_env",
        "password_env",
        "passes",
        "pass_at",
        "author",
        "secretary",
        "token_limit",
        "answerKey",
        "monkey",
        "access_key_id",
    ],
)
def test_names_of_no_secret(name: str) -> None:
    assert not is_secret_name(name)
    assert find_secret({name: "abcdefgh"}) is None


@pytest.mark.parametrize("value", ["${MY_KEY}", "", "none", True, None, 0.5])
def test_a_secret_by_name_needs_a_value(value: object) -> None:
    assert find_secret({"api_key": value}) is None


def test_a_reference_is_replaced_and_its_value_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEBRA", "stripes of a zebra")
    given = {"a": ["${ZEBRA}", 1], "b": {"c": "${ZEBRA}"}, "d": "x ${ZEBRA}"}
    assert from_environment(given, "o") == {
        "a": ["stripes of a zebra", 1],
        "b": {"c": "stripes of a zebra"},
        "d": "x ${ZEBRA}",
    }
    assert redact("it has the stripes of a zebra!") == "it has the [redacted]!"
    monkeypatch.delenv("ZEBRA")
    with pytest.raises(UserError, match=r"^o\.b: the environment variable ZEBRA is not set"):
        from_environment({"b": "${ZEBRA}"}, "o")


@pytest.mark.parametrize("name", ["MY_API_KEY", "HF_TOKEN", "DB_PASSWORD", "AZURE_KEY"])
def test_the_environments_secrets_are_hidden_whatever_their_shape(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "horse battery")
    assert redact("the horse battery is wrong") == "the [redacted] is wrong"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PWD", "/home/me/project"),
        ("OLDPWD", "/a/folder/that/is/gone"),
        ("SECRET_STORE_PASSWORD", "disabled"),
        ("APP_TOKEN", "Kubernetes"),
        ("TLS_KEY", __file__),
        ("SERVICE_TOKEN", str(Path(__file__).parent)),
        ("TOKENIZERS_PARALLELISM", "horse battery"),
        ("SSH_ASKPASS", "/usr/bin/an-askpass"),
        ("MONKEY", "horse battery"),
        ("MAX_TOKENS_SEEN", "horse battery"),
    ],
)
def test_what_of_the_environment_is_not_a_secret(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"cannot read {value}/train.jsonl") == f"cannot read {value}/train.jsonl"
    assert find_secret({"source": f"{value}/train.jsonl"}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PWD", "horse battery"),
        ("PWD_API_KEY", "battery-horse"),
        ("APP_TOKEN", "abcdefghijklmnop"),
        ("APP_TOKEN", "Kubernetes1"),
        ("APP_TOKEN", "/9j/4AAQSkZJRgAB"),
        ("APP_TOKEN", "  horse battery\r\n"),
    ],
)
def test_what_of_the_environment_is_a_secret(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"<{value.strip()}>") == "<[redacted]>"
    assert find_secret({"source": f"{value.strip()}/train.jsonl"}) == "source"


def test_resolved_settings_stay_runnable(tmp_path: Path) -> None:
    raw = next(r for r in settings_of("x", "${MY_KEY}") if r.get("stages"))
    raw["stages"][0]["rewards"][0]["options"]["body"] = {"api_key": "${MY_KEY}"}
    settings = parse_settings(raw, where="r")
    rundir.open_run(tmp_path, settings.model_dump(mode="json"))
    import tomllib

    again = parse_settings(tomllib.loads((tmp_path / "resolved.toml").read_text()), where="again")
    assert again == settings
    assert "${MY_KEY}" in (tmp_path / "resolved.toml").read_text()


@pytest.mark.parametrize(
    "shape",
    [
        lambda n: "a" * n,
        lambda n: "a=" * n,
        lambda n: "--key " * n,
        lambda n: "://" * n,
        lambda n: "-----BEGIN PRIVATE KEY-----" * n,
        lambda n: "eyJ" * n,
        lambda n: "a." * n,
        lambda n: " " * n,
        lambda n: "=>" * n,
    ],
)
def test_long_texts_are_read_in_linear_time(shape: Callable[[int], str]) -> None:
    """A quadratic search would take minutes. A secret after the text is still found."""
    key = "sk-" + "a1B2" * 8
    assert key not in redact(f"{shape(100_000)} {key}")
