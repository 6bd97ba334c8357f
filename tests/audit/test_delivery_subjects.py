"""Real samplers: truestep's torch engine, TRL, and vLLM, right ones and ones to which weights are delivered wrongly."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from truestep.audit import subjects
from truestep.audit.environments import virtual
from truestep.audit.environments.in_process import subject_module
from truestep.audit.environments.launch import audit_one
from truestep.audit.measure import delivery
from truestep.audit.measure.delivery import FAULTS
from truestep.audit.measure.findings import Finding, Verdict
from truestep.rollout.vllm_server import ENVIRONMENT

# an injected fault → the kind of its candidate
MEANT = {
    "nothing": "start",
    "head": "part",
    **{k: k for k in ("behind", "first", "dropped", "twice", "cache")},
}
ADAPTED = ("", "dropped", "twice")
PLAIN = tuple(fault for fault in ("", *MEANT) if fault not in ADAPTED[1:])


def named(finding: Finding, fault: str) -> bool:
    if not fault:
        return finding.verdict is Verdict.RIGHT
    (main,) = finding.found.data
    heads = main.values.get("names", ("lm_head.weight",)) == ("lm_head.weight",)
    return finding.codes == (FAULTS[MEANT[fault]][0],) and main.kinds == (FAULTS[MEANT[fault]][1],) and heads


def one(subject: str, options: dict[str, Any], python: str = sys.executable) -> Finding:
    (known,) = (s for s in subjects.TABLE if s.name == f"{subject} weight delivery")
    first = known.configurations[0]
    return audit_one(known, replace(first, options={**first.options, **options}), Path(python), timeout=280)


@pytest.mark.parametrize(("fault", "lora"), [("", False), ("", True), ("behind", False), ("head", False)])
def test_a_small_run_of_the_torch_engine(fault: str, lora: bool, tmp_path: Path) -> None:
    """Two steps and few tokens; the tensors of both layers are still told apart."""
    case = replace(delivery.build("delivery"), rounds=3, samples=2, new_tokens=8)
    case = replace(case, rows=case.rows[:2])
    options = {"arch": "llama", "copy": True, "lora": lora, "fault": fault}
    subject = subject_module("truestep_delivery")
    raw = {"options": options, "learning_rate": delivery.LEARNING_RATE}
    subject.run(subject.harness.Spec(tmp_path, case.to_json(), raw))
    found = delivery.judge("truestep", {}, {case.name: delivery.load(tmp_path, case)})
    assert named(found, fault), found
    assert found.reasons == ()
    assert found.delivery["tokens"] > 24
    assert min(one["separation"] for one in found.delivery["candidates"][1:]) > 100 * found.delivery["limit"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLAIN)
def test_the_torch_engine(fault: str) -> None:
    assert named(one("truestep", {"fault": fault, "copy": True, "tied": fault == "head"}), fault)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("fault", ADAPTED)
def test_the_torch_engine_with_adapters(fault: str, copied: bool) -> None:
    assert named(one("truestep", {"fault": fault, "lora": True, "copy": copied}), fault)


@pytest.mark.slow
@pytest.mark.parametrize("evidence", ["reported", "tokens"])
@pytest.mark.parametrize("fault", PLAIN)
def test_trl(fault: str, evidence: str) -> None:
    python = virtual.build("trl==1.16.0")
    assert named(one("TRL", {"fault": fault, "evidence": evidence}, str(python)), fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ADAPTED)
def test_trl_with_adapters(fault: str) -> None:
    python = virtual.build("trl==1.16.0+peft==0.21.2")
    assert named(one("PEFT with TRL", {"fault": fault}, str(python)), fault)


@pytest.mark.slow
@pytest.mark.skipif(ENVIRONMENT not in os.environ, reason=f"{ENVIRONMENT} does not name a Python with vLLM")
@pytest.mark.parametrize("fault", ["", "behind", "cache"])
def test_vllm(fault: str) -> None:
    assert named(one("truestep with vLLM", {"fault": fault}), fault)
