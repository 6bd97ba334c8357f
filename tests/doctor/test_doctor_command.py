"""``truestep doctor`` on a machine without a GPU: its lines, its exit codes, its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from truestep.cli.main import _app
from truestep.doctor import gpu
from truestep.doctor.checks import Bench, Check, Number
from truestep.doctor.installed import processor
from truestep.errors import UserError


def go(*words: str) -> Result:
    return CliRunner().invoke(_app(), ["doctor", *words])


def check(name: str, *values: float, error: BaseException | None = None) -> Check:
    def measure(bench: Bench) -> Iterator[Number]:
        yield from (Number(name="n", value=value, at_most=1.0) for value in values)
        if error is not None:
            raise error

    return Check(name=name, what="a check", seconds=1, measure=measure)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    made = [check("good", 0.0, 0.5), check("bad", 2.0), check("later", 1.0)]
    monkeypatch.setattr(gpu, "CHECKS", made)
    return made


def test_it_says_what_is_installed_in_one_line_each() -> None:
    done = go()
    assert done.exit_code == 0
    found = {line.split()[0]: line for line in done.stdout.splitlines()}
    import torch

    assert torch.__version__ in found["torch"]
    assert {"python", "transformers", "vllm", "processor", "memory", "disk", "device"} <= found.keys()


def test_the_units_of_the_processor_are_named(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU\nflags\t\t: fpu amx_bf16 avx512_bf16\n")
    assert processor(info).startswith("Some CPU, ")
    assert processor(info).endswith("amx_bf16, avx512_bf16")
    info.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2\n")
    assert 'compute.dtype = "float32"' in processor(info)


def test_the_checks_are_listed_and_planned() -> None:
    listed = go("gpu", "--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [one.name for one in gpu.CHECKS]
    assert len(listed) == 14
    planned = {line.split()[0]: line.split()[1] for line in go("gpu", "--dry-run").stdout.splitlines()}
    assert planned["speed"] == "SKIP"
    assert planned["exact"] == "runs"
    assert sum(one.seconds for one in gpu.CHECKS) <= 60 * gpu.MINUTES + 60


def test_a_failed_check_is_the_exit_code(checks: list[Check], tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = go("gpu", "--json", str(file))
    assert done.exit_code == 1
    assert "1 FAIL" in done.stdout
    assert "on cpu" in done.stdout
    document: dict[str, Any] = json.loads(file.read_text())
    assert [(c["check"], c["verdict"]) for c in document["checks"]] == [
        ("good", "PASS"), ("bad", "FAIL"), ("later", "PASS"),
    ]  # fmt: skip
    assert document["checks"][1]["numbers"][0]["holds"] is False
    assert document["versions"]["torch"]
    assert document["device"] == {"device": "cpu"}
    assert go("gpu", "--only", "good").exit_code == 0


def test_ctrl_c_keeps_what_was_done(
    checks: list[Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "CHECKS", [checks[0], check("slow", error=KeyboardInterrupt()), checks[1]])
    file = tmp_path / "gpu.json"
    done = go("gpu", "--json", str(file))
    assert done.exit_code == 130
    assert [c["check"] for c in json.loads(file.read_text())["checks"]] == ["good"]


def test_a_wrong_name_or_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only memry: there is no such check; did you mean"):
        gpu.chosen(["memry"])
    (tmp_path / "x.json").write_text("no")
    with pytest.raises(UserError, match="not a config"):
        gpu.bench_of(tmp_path, tmp_path / "x.json")


def test_another_model_can_be_checked(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(dict(gpu.QWEN_7B) | {"num_hidden_layers": 3}))
    assert gpu.bench_of(tmp_path, tmp_path / "x.json").config["num_hidden_layers"] == 3
