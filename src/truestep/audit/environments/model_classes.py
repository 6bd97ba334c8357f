"""``truestep audit models``: what each causal language model class of transformers does with its loss."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from truestep.audit.environments.launch import SubjectFailed, child_environment, free_port
from truestep.audit.subjects import FOLDER
from truestep.rundir import redact


def sweep(python: Path, *, timeout: float) -> dict[str, Any]:
    """Version, seconds and one row a class. Raises SubjectFailed where the child left nothing."""
    with tempfile.TemporaryDirectory(prefix="truestep-models-") as name:
        folder = Path(name)
        command = [str(python), str(FOLDER / "model_sweep.py"), str(folder)]
        env, quiet = child_environment(1, folder, 0, free_port()), subprocess.DEVNULL
        how: dict[str, Any] = {"env": env, "cwd": folder, "stdin": quiet, "timeout": timeout}
        try:
            done = subprocess.run(command, capture_output=True, text=True, **how)
        except subprocess.TimeoutExpired:
            raise SubjectFailed(f"no result within {timeout:.0f} s; pass a larger --timeout") from None
        file = folder / "models.json"
        if not file.is_file():
            words = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
            raise SubjectFailed(f"exit code {done.returncode}: {redact(words[-1])[:200]}")
        return {"schema": 1, **json.loads(file.read_text(encoding="utf-8"))}


def wrong(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Classes whose loss is not the shifted cross-entropy of their logits, or ignores the token count."""
    ran = [row for row in document["models"] if "not_run" not in row]
    return [row for row in ran if row["shift"] != 1 or row["count"] == "ignored"]
