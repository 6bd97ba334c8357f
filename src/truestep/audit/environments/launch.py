"""Runs a subject in one child process per rank, with a separate folder, a scrubbed environment and limits.

A subject that hangs, crashes or uses up the memory is reported as a finding and does not end the audit.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truestep.audit.measure import cases
from truestep.audit.measure.cases import Case
from truestep.audit.measure.findings import Finding, Verdict, cause
from truestep.audit.measure.observations import Observation, ObservationError, load
from truestep.audit.measure.verdict import judge
from truestep.audit.subjects import FOLDER, Configuration, Subject
from truestep.rundir import redact

# A large SGD step gives a more exact gradient; the size of AdamW's step does not depend on its gradient.
LEARNING_RATE = {"sgd": 0.5, "adamw": 1e-2}
SCRIPT_TIMEOUT = 180.0  # seconds for a reproducer
MEMORY = 12 << 30  # bytes of address space that a rank may map; torch alone maps several GiB
KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ", "SSL_CERT_FILE", "TORCH_EXTENSIONS_DIR")


class SubjectFailed(RuntimeError):
    """The subject ended without an observation; the message quotes its last line of output."""


@dataclass(frozen=True)
class Job:
    """All cases of one configuration of a subject, with one process per rank."""

    script: str
    python: Path
    cases: Sequence[Case]
    options: Mapping[str, Any]
    learning_rate: float = 0.5
    world_size: int = 1
    timeout: float = 120.0


def child_environment(world_size: int, home: Path, rank: int, port: int) -> dict[str, str]:
    """Return the environment variables of a child process. The caller's paths to programs and libraries are
    kept, but not its tokens, caches and home folder."""
    return {
        **{k: os.environ[k] for k in KEPT if k in os.environ},
        "HOME": str(home),
        "TMPDIR": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size)),
    }


def audit_one(
    subject: Subject, configuration: Configuration, python: Path, *, seed: int = 0, timeout: float = 120.0
) -> Finding:
    """Run all cases of one subject in one configuration. A subject that cannot run also gets a finding."""
    began, options, ranks = time.monotonic(), configuration.options, configuration.world_size
    size = {"world_size": ranks, "accumulation": int(options.get("accumulation", 4)), "seed": seed}
    built = [cases.build(name, **size) for name in configuration.only]
    rate = LEARNING_RATE[str(options.get("optimizer", "sgd"))]
    job = Job(subject.script, python, built, options, learning_rate=rate, world_size=ranks, timeout=timeout)
    nothing = Finding(subject=subject.name, configuration=configuration.to_json())
    known: dict[str, Any] = {"documented": configuration.documented, "without": dict(configuration.without)}
    try:
        finding = judge(subject.name, nothing.configuration, run(job), **known)
    except SubjectFailed as error:
        finding = replace(nothing, reasons=(cause("", "said", text=str(error)),))
    except ObservationError as error:
        finding = replace(nothing, verdict=Verdict.NOT_OBSERVABLE, reasons=(error.cause,))
    return replace(finding, seconds={**finding.seconds, "total": time.monotonic() - began})


def run(job: Job) -> dict[str, Observation]:
    """Run the job and return case → observation. Raises SubjectFailed, or the error of ``load``."""
    with tempfile.TemporaryDirectory(prefix="truestep-audit-") as name:
        folder = Path(name)
        (folder / "home").mkdir()
        (folder / "modules").mkdir()  # adapters can import only this part of the audit, and each other
        shutil.copy(Path(cases.__file__).with_name("recorder.py"), folder / "modules")
        rate, asked = job.learning_rate, [case.to_json() for case in job.cases]
        spec = {"cases": asked, "options": dict(job.options), "learning_rate": rate}
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        _run_ranks(job, folder, folder / "home")
        return {case.name: load(folder / case.name, case, learning_rate=rate) for case in job.cases}


def _start(command: Sequence[object], out: Any, home: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
    words = [str(part) for part in command]
    return subprocess.Popen(words, env=env, cwd=home, start_new_session=True, preexec_fn=_limit, **streams)


def _run_ranks(job: Job, folder: Path, home: Path) -> None:
    command = [job.python, FOLDER / "child.py", folder, job.script]
    port, deadline = free_port(), time.monotonic() + job.timeout
    processes: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"rank-{rank}.log" for rank in range(job.world_size)]
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                env = child_environment(job.world_size, home, rank, port)
                processes.append(_start(command, out, home, env | {"PYTHONPATH": str(folder / "modules")}))
        while None in (codes := [p.poll() for p in processes]) and not any(codes):
            if time.monotonic() > deadline:
                raise SubjectFailed(f"no result within {job.timeout:.0f} s; {_last_words(logs[0])}")
            time.sleep(0.02)
        for code, log in zip(codes, logs, strict=True):
            if code:
                raise SubjectFailed(f"exit code {code}: {_last_words(log)}")
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own children too
            process.wait()


def run_script(path: Path, python: Path, ranks: int, home: Path) -> tuple[bool | None, str]:
    """Return whether the script shows the difference (None if it did not run), and the line it printed."""
    port, command = free_port(), [python, path.absolute()]
    environments = [child_environment(ranks, home, rank, port) for rank in range(ranks)]
    processes = [_start(command, subprocess.PIPE, home, env) for env in environments]
    try:
        said = [process.communicate(timeout=SCRIPT_TIMEOUT)[0].decode() for process in processes]
    except subprocess.TimeoutExpired:
        return None, f"did not end within {SCRIPT_TIMEOUT:.0f} s"
    finally:
        for process in processes:
            process.kill()
    shown = last_line(said[0], r"weights \[")
    return (processes[0].returncode == 1, shown) if shown.startswith("weights [") else (None, shown[:200])


def sweep(python: Path, *, timeout: float) -> dict[str, Any]:
    """Check how each causal language model class of transformers computes its loss. Return the version, the
    seconds and one row per class. Raises SubjectFailed if the child process wrote nothing."""
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
            raise SubjectFailed(f"exit code {done.returncode}: {redact(last_line(done.stderr))[:200]}")
        return {"schema": 1, **json.loads(file.read_text(encoding="utf-8"))}


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _limit() -> None:
    if _LIBC is not None:
        # PR_SET_PDEATHSIG: if this process is killed, nothing else enforces the time limit.
        _LIBC.prctl(1, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_line(text: str, error: str = "") -> str:
    """Return the last line whose beginning matches the pattern ``error``, or else the very last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ([line for line in lines if re.match(error, line)] or lines or ["no output"])[-1]


def _last_words(log: Path) -> str:
    raised = r"(?:\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt|Exit)\b"
    return redact(last_line(log.read_text(errors="replace"), raised))[:300]
