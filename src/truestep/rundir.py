"""The run directory: its file names, atomic writes and the provenance stamp.

RUN/resolved.toml  provenance.json  report.html  summary.json
    data/overlap.json
    stages/NN-NAME/{metrics,timings,rollouts}.jsonl  checkpoints/  export/  done.json
    evaluations/CHECKPOINT or TEMPLATE/{DATA.samples.jsonl,DATA.results.json}
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from truestep.errors import UserError
from truestep.redaction import redact as redact
from truestep.redaction import redact_command

ELSEWHERE = "pass --out with a different path"


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file atomically. Even after a power loss, it contains all of the old or all of the new data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            # In JSON, an escaped lone surrogate is read back as it was.
            file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds_run(folder: Path, *, resume: bool) -> bool:
    """Return whether the folder has a run to continue. Raises UserError if it has one but ``resume`` is not
    set, or if it contains other files."""
    if (folder / "resolved.toml").exists():
        if not resume:
            raise UserError(f"{folder} already contains a run; pass --resume to continue it, or {ELSEWHERE}")
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not a truestep run directory; {ELSEWHERE}")
    return False


def open_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the run directory and write resolved.toml. Raises UserError if the folder cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "resolved.toml", to_toml(settings))
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); {ELSEWHERE}") from None


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows and flush. If a kill cuts off the last line, ``read_jsonl`` drops it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
        file.flush()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a file that ``append_jsonl`` wrote, or [] if there is no such file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, UnicodeDecodeError):
                break  # a kill during a write cut this line off; no complete line can follow it
    return rows


def truncate_jsonl(path: Path, keep_up_to_step: int) -> None:
    """Drop all rows after a step, atomically. A resumed stage writes these rows again."""
    if path.exists():
        rows = [row for row in read_jsonl(path) if row["step"] <= keep_up_to_step]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def cache_folder(part: str = "") -> Path:
    """Return a part of the cache folder, which is $TRUESTEP_CACHE, $XDG_CACHE_HOME/truestep or
    ~/.cache/truestep. Raises UserError if another user could change what it contains."""
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "truestep"
    cache = Path(os.environ.get("TRUESTEP_CACHE") or shared).expanduser().absolute()
    for folder in (cache, cache / part):
        with contextlib.suppress(OSError):  # it does not exist yet, or cannot be used at all
            status = folder.stat()
            remedy = "set TRUESTEP_CACHE to a folder of your own"
            if status.st_uid not in (os.geteuid(), 0):
                raise UserError(f"the cache {folder} belongs to another user (uid {status.st_uid}); {remedy}")
            if status.st_mode & stat.S_IWOTH:
                raise UserError(f"every user can write to the cache {folder}; run chmod o-w, or {remedy}")
    return cache / part


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_toml(table: Mapping[str, Any]) -> str:
    """Return nested plain values (a dumped settings model) as TOML, which parses back to the same table."""
    lines: list[str] = []
    _emit(table, (), lines)
    return "\n".join(lines).strip() + "\n"


def _emit(table: Mapping[str, Any], prefix: tuple[str, ...], lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not _is_table(v)}
    lines += [f"{_key(k)} = {_value(v)}" for k, v in plain.items()]
    for key, value in table.items():
        path = (*prefix, _key(key))
        if isinstance(value, dict):
            lines += ["", f"[{'.'.join(path)}]"]
            _emit(value, path, lines)
        elif _is_table(value):
            for entry in value:
                lines += ["", f"[[{'.'.join(path)}]]"]
                _emit(entry, path, lines)


def _is_table(value: Any) -> bool:
    entries = value if isinstance(value, list) else [value]
    return bool(entries) and all(isinstance(v, dict) for v in entries)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return repr(value)


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _versions() -> dict[str, str]:
    found, libraries = {}, "torch transformers tokenizers safetensors numpy math-verify pyarrow"
    for name in ("truestep", *libraries.split()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware() -> dict[str, Any]:
    model = None
    with contextlib.suppress(OSError):
        model = re.search(r"^model name[^:\n]*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    cpu = (model[1].strip() if model else "") or platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}


def provenance(seed: int) -> dict[str, Any]:
    """Return what is needed to repeat the run: commit, versions, hardware, command and seed."""
    name, *words = sys.argv
    command = ["truestep" if Path(name).name == "__main__.py" else name, *words]
    return {
        "commit": _git("rev-parse", "HEAD"), "uncommitted_changes": bool(_git("status", "--porcelain")),
        "command": redact_command(command), "seed": seed, "python": platform.python_version(),
        "platform": platform.platform(), "versions": _versions(), "hardware": _hardware(),
    }  # fmt: skip
