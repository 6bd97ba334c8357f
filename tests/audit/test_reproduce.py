"""A fault's own script: short, complete, and run; on a right framework it shows no difference."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from truestep.audit import subjects as registry
from truestep.audit.environments import launch, releases
from truestep.audit.measure.findings import Differences, Finding, Verdict, cause
from truestep.audit.present import reproduce
from truestep.audit.subjects import Configuration

REPRODUCED = {"deepspeed_engine", "hf_trainer", "trl_sft", "openrlhf_sft", "torchtune_sft", "verl_agg_loss"}


def finding(subject: str, configuration: Configuration) -> Finding:
    return Finding(
        subject=subject,
        configuration=configuration.to_json(),
        verdict=Verdict.FAULT,
        found=Differences(data=(cause("x", "said", text='micro-batches are "dropped" \\ in the middle'),)),
        versions={"torch": "2.13.0", "some": "1.0"},
    )


@pytest.mark.parametrize(
    "subject", [s for s in registry.TABLE if s.script in REPRODUCED], ids=lambda s: s.name
)
def test_every_configuration_has_a_short_script_that_parses(subject: registry.Subject) -> None:
    for configuration in subject.configurations:
        text = reproduce.script(finding(subject.name, configuration), subject.script)
        ast.parse(text)
        assert len(text.splitlines()) <= 60
        assert "$" not in text
        assert "truestep" not in text.split('"""')[2], "a reproducer shares no code with the audit"


def test_a_subject_without_a_template_has_no_script() -> None:
    assert reproduce.script(finding("torch loop", Configuration()), "torch_loop") == ""


@pytest.mark.slow
def test_a_right_framework_shows_no_difference_and_a_broken_one_does(tmp_path: Path) -> None:
    configuration = Configuration(options={"arch": "llama"})
    text = reproduce.script(finding("transformers Trainer", configuration), "hf_trainer")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(text, encoding="utf-8")
    shows, line = launch.run_script(right, Path(sys.executable), 1, tmp_path)
    assert shows is False, line
    assert "weights [1.0, 1.0, 1.0, 1.0]" in line
    wrong.write_text(text.replace("learning_rate=LR", "learning_rate=2 * LR"), encoding="utf-8")
    shows, line = launch.run_script(wrong, Path(sys.executable), 1, tmp_path)
    assert shows is True, line
    assert "weights [2.0, 2.0, 2.0, 2.0]" in line


def test_a_script_that_cannot_run_is_no_evidence(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise SystemExit('no such framework')\n", encoding="utf-8")
    assert launch.run_script(path, Path(sys.executable), 1, tmp_path) == (None, "no such framework")


def test_a_remedy_is_the_first_change_that_was_audited_to_right(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def audit_one(
        subject: registry.Subject, configuration: Configuration, python: Path, **_: object
    ) -> Finding:
        tried.append(dict(configuration.options))
        verdict = Verdict.FAULT if configuration.options.get("offload") else Verdict.RIGHT
        return Finding(subject=subject.name, configuration={}, verdict=verdict)

    monkeypatch.setattr(releases, "audit_one", audit_one)
    subject = next(s for s in registry.TABLE if s.name == "DeepSpeed")
    configuration = Configuration(options={"stage": 2, "offload": True, "manual": True})
    found = releases.remedy(subject, configuration, Path(sys.executable), "", timeout=1)
    assert found == "no offload_optimizer"
    assert tried == [
        {"stage": 2, "offload": True, "manual": False},
        {"stage": 2, "offload": False, "manual": True},
    ]
    only = Configuration(options={"stage": 2})
    assert releases.remedy(subject, only, Path(sys.executable), "", timeout=1) == ""
