"""The run directory: its file names, its lock, atomic and verified files, and the provenance stamp.

RUN/resolved.toml  provenance.json  history.json  report.html  summary.json
    data/overlap.json
    stages/NN-NAME/{metrics,timings,rollouts}.jsonl  checkpoints/  export/  done.json
    evaluations/CHECKPOINT or TEMPLATE/{DATA.samples.jsonl,DATA.results.json}
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from truestep.errors import UserError
from truestep.redaction import redact as redact
from truestep.redaction import redact_command

ELSEWHERE = "pass --out with a different path"
AGAIN = "restore it, or delete it and run the same command again with --resume"
EXPORT_MARK = "truestep_export.json"  # names the files of an exported model with their hashes
LOCK = ".lock"
UNFINISHED = (".tmp-write", ".tmp-discard")  # ends of the names of what a killed writer leaves
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SETTINGS_MARK = "# sha256 "


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file atomically. Even after a power loss, it contains all of the old or all of the new data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED[0])
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


@contextlib.contextmanager
def locked(folder: Path, *, apart: str = "") -> Iterator[None]:
    """Hold a run directory, which is created, and remove what killed writers left there, except in folders
    called ``apart``. The kernel releases the lock when the process ends, and no child process inherits it.
    Raises UserError that names the holder if another process has the lock, or if the folder is not writable."""
    with _open_lock(folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read(500).strip() or "another process"
            raise UserError(
                f"{folder} is in use by {holder}; wait for it or stop it, or {ELSEWHERE}"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        words = redact(" ".join(["truestep", *sys.argv[1:]]))
        file.write(f"process {os.getpid()} on {platform.node()}, started {started}: {words[:300]}\n")
        file.flush()
        try:
            remove_leftovers(folder, apart)
            yield
        finally:
            file.truncate(0)


def _open_lock(folder: Path) -> IO[str]:
    """Open the folder's lock. It must be an ordinary file, because its content is replaced."""
    path, flags = folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if not path.is_symlink() and (path.is_file() or not path.exists()):
            raise unwritable(folder, error) from None
    else:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return os.fdopen(descriptor, "a+", encoding="utf-8")
        os.close(descriptor)
    raise UserError(f"{path} is a link or not an ordinary file, so it cannot be the folder's lock; delete it")


def remove_leftovers(folder: Path, apart: str = "") -> None:
    """Remove the unfinished files and folders of killed writers. Requires the folder's lock."""
    for root, folders, names in os.walk(folder):
        for name in [n for n in folders if n.endswith(UNFINISHED)]:
            shutil.rmtree(Path(root, name), ignore_errors=True)
        folders[:] = [n for n in folders if n != apart and not n.endswith(UNFINISHED)]
        for name in [n for n in names if n.endswith(UNFINISHED)]:
            Path(root, name).unlink(missing_ok=True)


def unwritable(folder: Path, error: OSError) -> Exception:
    """Return the error of a folder that cannot be written to. A full disk keeps its own exit code."""
    return (
        error
        if error.errno in NO_SPACE
        else UserError(f"cannot write to {folder} ({error.strerror or error}); {ELSEWHERE}")
    )


def holds_run(folder: Path, *, resume: bool) -> bool:
    """Return whether the folder has a run to continue. Raises UserError if it has one but ``resume`` is not
    set, or if it contains other files."""
    if (folder / "resolved.toml").exists():
        if not resume:
            raise UserError(f"{folder} already contains a run; pass --resume to continue it, or {ELSEWHERE}")
        return True
    if not is_unused(folder):
        raise UserError(f"{folder} is not a truestep run directory; {ELSEWHERE}")
    return False


def is_unused(folder: Path) -> bool:
    """Return whether the folder does not exist or contains only what a killed process left of its start."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name == LOCK or path.name.endswith(UNFINISHED) for path in folder.iterdir())


def open_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the run directory and write resolved.toml. Raises UserError if the folder cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        body = to_toml(settings)
        write_atomic(folder / "resolved.toml", f"{_SETTINGS_MARK}{_sha256(body)}\n{body}")
    except OSError as error:
        raise unwritable(folder, error) from None


def read_settings_text(folder: Path) -> str:
    """Return resolved.toml without its hash, "" if there is none. Raises UserError if it is damaged."""
    path = folder / "resolved.toml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    head, _, body = text.partition("\n")
    if not head.startswith(_SETTINGS_MARK):
        return text
    if _sha256(body) != head.removeprefix(_SETTINGS_MARK):
        raise UserError(f"{path} is not what was written (SHA-256 differs); restore it, or {ELSEWHERE}")
    return body


def write_json(path: Path, value: Any) -> Any:
    """Write a value atomically, and return what was written. The first entry of an object is its hash, which
    ``read_json`` checks."""
    written = stamped(value)
    write_atomic(path, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    return written


def stamped(value: Any) -> Any:
    """Return the value as it will be read from JSON, and an object with its hash as the first entry."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    return {"sha256": _digest(plain), **plain} if isinstance(plain, dict) else plain


def read_json(path: Path) -> Any:
    """Return a JSON value. Raises UserError if it cannot be read or is not what ``write_json`` wrote."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {AGAIN}") from None
    if not isinstance(value, dict) or not value:
        return value
    key, found = next(iter(value.items()))
    # Other files have no hash. If the key itself is damaged, its value still looks like one.
    if key != "sha256" and not (isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found)):
        return value
    del value[key]
    if key != "sha256" or found != _digest(value):
        raise UserError(f"{path} is not what was written (SHA-256 differs); {AGAIN}")
    return value


def _digest(value: Any) -> str:
    return _sha256(json.dumps(value, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows and flush. If a kill cuts off the last line, ``read_jsonl`` drops it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(jsonl(rows))
        file.flush()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a file that ``append_jsonl`` wrote, or [] if there is no such file. Raises UserError
    for a damaged line; only the last line may be cut off, by a kill during a write."""
    rows = []
    for number, row in jsonl_lines(path):
        if row is None:
            raise UserError(f"{path}:{number}: the line is damaged; restore the file from a backup")
        rows.append(row)
    return rows


def jsonl_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield every line's number and its row, or None if it is not a JSON object. A last line without a line
    end was cut off by a kill and is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else None


def record_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return the size and hash of files, by their paths in ``folder``."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }


def verify_files(folder: Path, files: Mapping[str, Mapping[str, Any]], remedy: str = AGAIN) -> None:
    """Raise UserError if one of these files is missing or not what was written."""
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise UserError(f"{path} is missing; {remedy}")
        if size != entry["bytes"]:
            raise UserError(f"{path} has {size} bytes, but {entry['bytes']} were written; {remedy}")
        if file_sha256(path) != entry["sha256"]:
            raise UserError(f"{path} is not what was written (SHA-256 differs); {remedy}")


def mark_export(folder: Path, special_tokens: Sequence[str] = (), system: str = "") -> None:
    """Write an export's mark: the hashes of its files, the special tokens that its texts may contain, and the system
    prompt that it was trained with."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    used: dict[str, Any] = {"special_tokens": list(special_tokens)} if special_tokens else {}
    used |= {"system": system} if system else {}
    write_json(folder / EXPORT_MARK, {"format": 2, **used, "files": record_files(folder, files)})


def train_again(stage: Path) -> str:
    return f"delete {stage} and run the same command again with --resume, which trains the stage again"


def verify_export(folder: Path) -> None:
    """Raise UserError if a model that truestep exported has changed. Other folders are not checked."""
    if (mark := folder / EXPORT_MARK).is_file():
        remedy = f"restore it or export again; if you changed it on purpose, delete {mark}"
        if (folder.parent / "done.json").is_file():
            remedy = f"restore it, or {train_again(folder.parent)}"
        verify_files(folder, read_json(mark).get("files", {}), remedy)


def model_of(folder: Path) -> Path:
    """Return the model of the last finished stage of a run. Raises UserError if there is none."""
    if done := sorted(folder.glob("stages/*/done.json")):
        return done[-1].parent / "export"
    raise UserError(f"{folder} is a run without a finished stage, so it has no trained model")


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
