"""The commands of the workflow in docs/how-to/ci.md, executed in an empty environment for a right and a wrong trainer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINER = """
import torch

def step(model, optimizer, microbatches):
    total = sum(int((m["labels"][:, 1:] != -100).sum()) for m in microbatches)
    for m in microbatches:
        logits, labels = model(input_ids=m["input_ids"])[:, :-1], m["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        (loss / total).backward()
    optimizer.step()
    optimizer.zero_grad()
"""
LOSES = TRAINER.replace("        (loss", "        optimizer.zero_grad()\n        (loss")


def block(language: str) -> str:
    """The code block of the page in this language."""
    text = (ROOT / "docs/how-to/ci.md").read_text(encoding="utf-8")
    [found] = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return found


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run as GitHub does: bash -e, with the environment's programs first. Only the index is the machine's own."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment["PATH"] = f"{folder / 'venv/bin'}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_pass_for_a_right_step_and_fail_for_a_wrong_one(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    steps = yaml.safe_load(block("yaml"))["jobs"]["audit"]["steps"]
    install, *checks = [step["run"] for step in steps if "run" in step]
    assert len(checks) == 2
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run(
        [
            tmp_path / "venv/bin/python",
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            tmp_path / "ci",
            ROOT,
        ],
        check=True,
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_step.py").write_text(block("python"))
    done = run(install, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for trainer, code in ((TRAINER, 0), (LOSES, 1)):
        (tmp_path / "trainer.py").write_text(trainer)
        for command in checks:
            done = run(command, tmp_path)
            written = tmp_path / "audit.json"
            shown = done.stdout + done.stderr + (written.read_text() if written.exists() else "")
            assert done.returncode == code, f"{command}\n{shown}"
            assert code == 0 or "overwrites" in shown, shown
