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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truestep.audit.measure import cases, delivery
from truestep.audit.measure.findings import Differences, Finding, Verdict, cause
from truestep.audit.measure.observations import ObservationError, load, read_plain
from truestep.audit.measure.rl import cases as rl_cases
from truestep.audit.measure.rl.judge import judge as judge_rl
from truestep.audit.measure.rl.observed import load as load_rl
from truestep.audit.measure.verdict import judge
from truestep.audit.subjects import FOLDER, Configuration, Subject
from truestep.rundir import redact

# A large SGD step gives a more exact gradient; the size of AdamW's step does not depend on its gradient.
LEARNING_RATE = {"sgd": 0.5, "adamw": 1e-2}
RL_LEARNING_RATE = 0.5  # after one step, about half of the ratios are outside the usual clip range
SCRIPT_TIMEOUT = 180.0  # seconds for a reproducer
MEMORY = 12 << 30  # bytes of address space that a rank may map; torch alone maps several GiB
MOST_WRITTEN = 1 << 30  # bytes, of one file and of all files of an audit together
TAIL = 1 << 16  # bytes of the output that are kept
KEPT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "TZ",
    "SSL_CERT_FILE",
    "TORCH_EXTENSIONS_DIR",
    "TRUESTEP_VLLM_PYTHON",
)


class SubjectFailed(RuntimeError):
    """The subject ended without an observation; the message quotes its last line of output."""


@dataclass(frozen=True)
class Job:
    """All cases of one configuration of a subject, with one process per rank."""

    script: str
    python: Path
    cases: Sequence[Any]  # Case or RLCase
    options: Mapping[str, Any]
    learning_rate: float = 0.5
    world_size: int = 1
    timeout: float = 120.0
    load: Callable[..., Any] = load  # reads what a case has written


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
    rate = LEARNING_RATE[str(options.get("optimizer", "sgd"))]
    how: dict[str, Any] = {"learning_rate": rate, "world_size": ranks, "timeout": timeout}
    known: dict[str, Any] = {"documented": configuration.documented, "without": dict(configuration.without)}
    verdict_of: Callable[..., Finding] = judge
    if subject.kind == "rl":
        built: Sequence[Any] = [
            rl_cases.build(name, world_size=ranks, seed=seed) for name in configuration.only
        ]
        how |= {"learning_rate": RL_LEARNING_RATE, "load": load_rl}
        verdict_of = judge_rl
    elif subject.kind == "delivery":
        built = [delivery.build(name, seed=seed) for name in configuration.only]
        how |= {"learning_rate": delivery.LEARNING_RATE, "load": delivery.load}
        verdict_of = delivery.judge
    else:
        built = [cases.build(name, **size) for name in configuration.only]
        known["objective"] = str(options.get("objective", "token_mean"))
    job = Job(subject.script, python, built, options, **how)
    nothing = Finding(subject=subject.name, configuration=configuration.to_json())
    try:
        finding = verdict_of(subject.name, nothing.configuration, run(job), **known)
    except SubjectFailed as error:
        finding = replace(nothing, reasons=(cause("", "said", text=str(error)),))
    except ObservationError as error:
        finding = replace(nothing, verdict=Verdict.NOT_OBSERVABLE, reasons=(error.cause,))
    if configuration.unused and finding.verdict is not Verdict.NOT_RUN:
        why = cause("", "settings_unused", settings=list(configuration.unused))
        reasons = (why, *finding.reasons)
        finding = replace(
            finding, verdict=Verdict.NOT_OBSERVABLE, codes=(), found=Differences(), reasons=reasons
        )
    return replace(finding, seconds={**finding.seconds, "total": time.monotonic() - began})


def run(job: Job) -> dict[str, Any]:
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
        return {case.name: job.load(folder / case.name, case, learning_rate=rate) for case in job.cases}


def _run_all(
    command: Sequence[object],
    environments: Sequence[dict[str, str]],
    folder: Path,
    *,
    timeout: float,
    every: bool,
) -> list[tuple[int | None, str]]:
    """Run the command once for each environment in its home folder, which is inside ``folder``. Return the exit
    codes and what was printed last. Ends when one has failed, or, with ``every``, when all have ended. Then no
    process is left, even outside the group. Raises SubjectFailed if they take too long or write too much."""
    words, processes = [str(part) for part in command], list[subprocess.Popen[bytes]]()
    deadline, looked = time.monotonic() + timeout, time.monotonic()
    with contextlib.ExitStack() as stack:
        # Files without a name, which the subject cannot replace.
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in environments]
        stack.callback(_end, processes, environments[0]["HOME"])
        for env, log in zip(environments, logs, strict=True):
            streams: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": log,
                "stderr": subprocess.STDOUT,
            }
            how: dict[str, Any] = {"env": env, "cwd": env["HOME"], "start_new_session": True}
            processes.append(subprocess.Popen(words, preexec_fn=_limit, **how, **streams))
        while None in (codes := [p.poll() for p in processes]) and (every or not any(codes)):
            if time.monotonic() > deadline:
                raise SubjectFailed(f"no result within {timeout:.0f} s; {last_words(_tail(logs[0]))}")
            if time.monotonic() > looked + 0.5:
                looked = time.monotonic()
                written = _written(folder) + sum(os.fstat(log.fileno()).st_size for log in logs)
                if written > MOST_WRITTEN:
                    raise SubjectFailed(f"it wrote more than {MOST_WRITTEN >> 20} MiB")
            time.sleep(0.02)
        return [(code, _tail(log)) for code, log in zip(codes, logs, strict=True)]


def _written(folder: Path) -> int:
    """Return the bytes of all files in a folder. Links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _tail(log: Any) -> str:
    """Return the last part of what a process has printed."""
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), TAIL, max(0, size - TAIL)).decode("utf-8", "replace")


def _end(processes: Sequence[subprocess.Popen[bytes]], home: str) -> None:
    """Kill the processes, all that they have started, and those that have left their group: a process keeps
    the home folder in its environment."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for _ in range(100):  # one of them may be starting others
        strays = [pid for pid in _pids() if f"HOME={home}".encode() in _environment(pid)]
        for pid in strays:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not strays:
            return
        time.sleep(0.01)


def _pids() -> list[int]:
    return (
        [int(name) for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc/self") else []
    )


def _environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _run_ranks(job: Job, folder: Path, home: Path) -> None:
    command, port = [job.python, FOLDER / "child.py", folder, job.script], free_port()
    path = {"PYTHONPATH": str(folder / "modules")}
    environments = [child_environment(job.world_size, home, r, port) | path for r in range(job.world_size)]
    for code, said in _run_all(command, environments, folder, timeout=job.timeout, every=False):
        if code:
            raise SubjectFailed(f"exit code {code}: {last_words(said)}")


def run_script(path: Path, python: Path, ranks: int, home: Path) -> tuple[bool | None, str]:
    """Return whether the script shows the difference (None if it did not run), and the line it printed."""
    port, command = free_port(), [python, path.absolute()]
    environments = [child_environment(ranks, home, rank, port) for rank in range(ranks)]
    try:
        code, said = _run_all(command, environments, home, timeout=SCRIPT_TIMEOUT, every=True)[0]
    except SubjectFailed as error:
        return None, str(error)
    shown = last_line(said, r"weights \[")
    return (code == 1, shown) if shown.startswith("weights [") else (None, redact(shown)[:200])


def sweep(python: Path, *, timeout: float) -> dict[str, Any]:
    """Check how each causal language model class of transformers computes its loss. Return the version, the
    seconds and one row per class. Raises SubjectFailed if the child process wrote nothing usable."""
    with tempfile.TemporaryDirectory(prefix="truestep-models-") as name:
        folder = Path(name)
        command, env = (
            [python, FOLDER / "model_sweep.py", folder],
            child_environment(1, folder, 0, free_port()),
        )
        ((code, said),) = _run_all(command, [env], folder, timeout=timeout, every=True)
        try:
            return {"schema": 1, **json.loads(read_plain(folder / "models.json"))}
        except (OSError, ValueError, TypeError, RecursionError):
            raise SubjectFailed(f"exit code {code}: {redact(last_line(said))[:200]}") from None


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _limit() -> None:
    if _LIBC is not None:
        # PR_SET_PDEATHSIG: if this process is killed, nothing else enforces the time limit.
        _LIBC.prctl(1, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_WRITTEN, MOST_WRITTEN))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_line(text: str, error: str = "") -> str:
    """Return the last line whose beginning matches the pattern ``error``, or else the very last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ([line for line in lines if re.match(error, line)] or lines or ["no output"])[-1]


def last_words(said: str) -> str:
    """Return the line of an error, or else the last line."""
    raised = r"(?:\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt|Exit)\b"
    return redact(last_line(said, raised))[:300]
