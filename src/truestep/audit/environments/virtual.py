"""Builds isolated, cached environments for the audited releases, and lists what an environment contains.

Each torch release has one base environment with the large packages. Each subject has a separate environment
with only its packages; a ``.pth`` file adds the base after them. A user's environment is never changed.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from truestep import rundir
from truestep.audit.environments.launch import last_line
from truestep.audit.environments.packages import ALONE, COMPANIONS
from truestep.audit.subjects import TABLE
from truestep.errors import UserError

TORCH = "2.13.0"
BUILD_TIMEOUT = 1800.0  # seconds: for one install command, and for waiting for another audit's build
PYTHON_TAG = f"py{sys.version_info.major}.{sys.version_info.minor}"
FRAMEWORKS = tuple(dict.fromkeys(name for s in TABLE for name in (*s.needs, *s.brings)))
# setuptools 81 dropped pkg_resources, which older releases import; their archives need wheel to build.
BASE = ("numpy", "setuptools<81", "wheel")
# Audited processes do not write bytecode; without this option, each of them would compile torch again.
UV_INSTALL = ("pip", "install", "--compile-bytecode")
EXAMPLE = "deepspeed==0.18.9 or trl==1.16.0+deepspeed==0.18.9"
_PIN = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([0-9][0-9A-Za-z.]*)")
_PROBE = """
import importlib.metadata, importlib.util, json, sys
found = {}
for d in importlib.metadata.distributions():
    name = (d.metadata and d.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-")
    if name: found.setdefault(name, d.version or "unknown")
for name in sys.argv[1:]:
    spec = None if name in found else importlib.util.find_spec(name)
    if spec is not None and spec.origin: found[name] = "unknown"
print("\\n" + json.dumps(found))
"""


class BuildFailed(RuntimeError):
    """An environment could not be built; the message is one line that says what to do."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The contents of an environment."""

    pins: Mapping[str, str]  # as requested: package → version
    torch: str
    resolved: tuple[str, ...]  # requirements that are installed with their dependencies
    alone: tuple[str, ...]  # installed after them, without dependencies

    @property
    def base_name(self) -> str:
        return f"base-torch-{self.torch}-{PYTHON_TAG}"

    @property
    def name(self) -> str:
        """The folder's name, which is readable and is different if the installed packages are different."""
        contents = json.dumps([asdict(self), BASE, PYTHON_TAG], sort_keys=True).encode()
        shown = "+".join(f"{k}-{v}" for k, v in sorted(self.pins.items()))
        return f"{shown}-{PYTHON_TAG}-{hashlib.sha256(contents).hexdigest()[:8]}"


def parse(text: str) -> dict[str, str]:
    """Return package → version from a text such as ``trl==1.16.0+deepspeed==0.18.9``.

    Raises: UserError if a part is not an exact version.
    """
    pins: dict[str, str] = {}
    for part in text.split("+"):
        match = _PIN.fullmatch(part.strip())
        if match is None:
            wrong = f"{part.strip()!r} is not NAME==VERSION; pass, for example, {EXAMPLE}"
            raise UserError(f"requirement {text!r}: {wrong}")
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        if pins.setdefault(name, match[2]) != match[2]:
            wrong = f"{name} has two versions; pass one, such as {name}=={match[2]}"
            raise UserError(f"requirement {text!r}: {wrong}")
    return pins


def plan(text: str) -> Plan:
    """Return everything that an environment for ``text`` contains. Raises: UserError as ``parse`` does."""
    pins = parse(text)
    wanted = {name: f"{name}=={version}" for name, version in pins.items() if name != "torch"}
    for name, before, companions in COMPANIONS:
        exact = wanted.get(name, "").partition("==")[2]
        if exact and tuple(int(n) for n in re.findall(r"\d+", exact)) < before:
            for companion in companions:
                own = re.split(r"[=<>]", companion)[0]
                # A bare name does not set a version, so the companion that fits this release replaces it.
                if wanted.get(own, own) == own:
                    wanted[own] = companion
    wanted = {need: need for name in wanted for need in ALONE.get(name, "").split()} | wanted
    resolved = tuple(sorted(r for n, r in wanted.items() if n not in ALONE))
    alone = tuple(sorted(r for n, r in wanted.items() if n in ALONE))
    return Plan(pins=pins, torch=pins.get("torch", TORCH), resolved=resolved, alone=alone)


def cache_folder() -> Path:
    """Return the folder in truestep's cache where environments are kept."""
    return rundir.cache_folder("audit")


def build(text: str, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Return the Python of an environment with ``text``, built if it is not cached. ``say`` gets progress.

    Raises: UserError if ``text`` is not valid; BuildFailed if it cannot be built.
    """
    wanted = plan(text)
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot create {cache} ({error.strerror})"
        raise BuildFailed(f"{why}; set TRUESTEP_CACHE to a writable directory") from None
    base = _cached(cache, wanted.base_name, say, lambda home, do: _fill_base(wanted, home, do))
    if not wanted.resolved and not wanted.alone:
        return base
    return _cached(cache, wanted.name, say, lambda home, do: _fill_overlay(wanted, base, home, do))


# Variables that installers and compilers read. The caller's tokens must not reach a package's setup code.
BUILDS_NEED = (
    r"PATH|HOME|LANG|LC_ALL|TZ|TMPDIR|USER|(http|https|no|all|ftp)_proxy|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|"
    r"CURL_CA_BUNDLE|(PIP|UV|XDG)_\w+|CC|CXX|CFLAGS|CXXFLAGS|LDFLAGS|LD_LIBRARY_PATH"
)
Do = Callable[..., None]  # run a command of a build: (command, **extra environment variables)


def _cached(cache: Path, name: str, say: Callable[[str], None], fill: Callable[[Path, Do], None]) -> Path:
    """Return the Python of the environment ``cache/name``. One process builds it under a temporary name and
    then renames it; others wait."""
    home, temporary, log = cache / name, cache / f"{name}.building", cache / f"{name}.log"
    python = home / "bin" / "python"
    if python.exists():
        return python
    with _lock(cache / f"{name}.lock", name, say) as lock:
        if python.exists():  # another audit has built it in the meantime
            return python
        say(f"building {name} (once) in {cache}")
        for leftover in (temporary, home):  # from a killed build, or from an interpreter that is gone
            if leftover.exists():
                shutil.rmtree(leftover)
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as out:
            fill(temporary, partial(_execute, name, out, lock))
        temporary.rename(home)
        say(f"built {name} in {time.monotonic() - began:.0f} s")
    return python


@contextlib.contextmanager
def _lock(path: Path, name: str, say: Callable[[str], None]) -> Iterator[int]:
    """Lock a build. Its installers inherit the lock, because they may outlive a killed audit."""
    deadline, waiting = time.monotonic() + BUILD_TIMEOUT, False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    why = f"another audit has been building {name} for {BUILD_TIMEOUT:.0f} s"
                    way = "end that audit, or set TRUESTEP_CACHE to a different directory"
                    raise BuildFailed(f"{why}; {way}") from None
                if not waiting:
                    say(f"waiting for another audit that is building {name}")
                waiting = True
                time.sleep(0.1)
        yield file.fileno()


def _execute(name: str, out: IO[str], lock: int, command: Sequence[str | Path], **variables: str) -> None:
    """Run one command of a build; its output goes to the log."""
    kept = {k: v for k, v in os.environ.items() if re.fullmatch(BUILDS_NEED, k, re.IGNORECASE)}
    words, env = [str(part) for part in command], {**kept, **variables}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(words, env=env, start_new_session=True, pass_fds=(lock,), **streams)
    except OSError as error:
        why = f"{name}: cannot run {command[0]} ({error.strerror})"
        raise BuildFailed(f"{why}; install uv or pip") from None
    try:
        code = process.wait(BUILD_TIMEOUT)
    except subprocess.TimeoutExpired:
        why = f"{name}: the installer did not end within {BUILD_TIMEOUT:.0f} s"
        raise BuildFailed(f"{why}; check the connection to the package index; log: {out.name}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code:
        why = f"{name} could not be built ({_last_words(Path(out.name))})"
        raise BuildFailed(f"{why}; check names, versions and network; log: {out.name}")


def _last_words(log: Path) -> str:
    """Return the installer's own error line, or else its last line."""
    last = last_line(log.read_text(encoding="utf-8", errors="replace"), r"ERROR:|error:|cause:|[×╰]")
    return rundir.redact(re.sub(r"^(ERROR:|error:|cause:|[×╰─▶ ]+)\s*", "", last))[:240]


def _fill_base(wanted: Plan, home: Path, do: Do) -> None:
    uv = shutil.which("uv")
    # Scripts in bin contain the name of the folder at build time, so only ``python -m`` is used.
    do([sys.executable, "-m", "venv", *(["--without-pip"] if uv else []), home])
    packages = [f"torch=={wanted.torch}", *BASE]
    if uv:
        do([uv, *UV_INSTALL, "--python", home / "bin/python", *packages], **_uv_variables())
    else:
        do([home / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", *packages])


def _fill_overlay(wanted: Plan, base: Path, home: Path, do: Do) -> None:
    uv = shutil.which("uv")
    do([sys.executable, "-m", "venv", "--without-pip", home])
    site = home / "lib" / f"python{PYTHON_TAG[2:]}" / "site-packages"
    # Relative, so that it stays valid if the folder is renamed; Python searches a .pth folder after this one.
    behind = base.parent.parent / site.relative_to(home)
    (site / "truestep-base.pth").write_text(os.path.relpath(behind, site) + "\n", encoding="utf-8")
    (home / "constraints.txt").write_text(f"torch=={wanted.torch}\n", encoding="utf-8")
    # uv does not follow a .pth file; without this, it would install torch again.
    (home / "overrides.txt").write_text("torch; python_version < '3'\n", encoding="utf-8")
    python = home / "bin/python"
    if uv:
        install: list[str | Path] = [uv, *UV_INSTALL, "--python", python]
        extra: list[str | Path] = ["--overrides", home / "overrides.txt"]
        variables = _uv_variables()
    else:
        install = [base, "-m", "pip", "--python", python, "install", "--disable-pip-version-check"]
        extra, variables = ["--constraint", home / "constraints.txt"], {}
    if wanted.resolved:
        do([*install, *extra, *wanted.resolved], **variables)
    if wanted.alone:
        # No installer cache: a wheel that was built against this torch must not reach other environments.
        how = ["--no-deps", "--no-build-isolation", "--no-cache" if uv else "--no-cache-dir"]
        do([*install, *how, *wanted.alone], DS_BUILD_OPS="0", **variables)


def _uv_variables() -> dict[str, str]:
    """Return variables that pass pip's package sources to uv, which does not read pip's configuration. A
    source that is already set for uv is left out."""
    found: dict[str, str] = {}
    for pip in ([sys.executable, "-m", "pip"], ["pip"]):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [*pip, "config", "list"]
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            for line in told.stdout.splitlines():  # global.find-links='/a' ; the environment (:env:) wins
                key, _, value = line.partition("=")
                scope, _, key = key.strip().rpartition(".")
                if key not in found or scope == ":env:":
                    found[key] = str(ast.literal_eval(value.strip()))
            break
    names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "cert": "SSL_CERT_FILE"}
    names |= {"find-links": "UV_FIND_LINKS"}
    given = {name: found[k].split() for k, name in names.items() if k in found and name not in os.environ}
    told_uv = {name: ("," if name == "UV_FIND_LINKS" else " ").join(parts) for name, parts in given.items()}
    # pip takes the best version of all indexes; by default, uv stops at the first that has the package.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", **told_uv} if "UV_INDEX" in told_uv else told_uv


def installed(python: Path) -> dict[str, str]:
    """Return framework → version ("unknown" for a folder without metadata). Nothing is imported or written.

    Raises: UserError if this Python cannot be run.
    """
    found = versions(python, FRAMEWORKS)
    return {name: found[name] for name in FRAMEWORKS if name in found}


def versions(python: Path, modules: Sequence[str] = ()) -> dict[str, str]:
    """Return package → version for all packages that this Python finds. ``modules`` are found even if they
    have no metadata. Raises: UserError if this Python cannot be run."""
    if not python.is_file():
        inner = python / "bin" / "python"
        hint = str(inner) if inner.is_file() else "the path of an interpreter, such as .venv/bin/python"
        raise UserError(f"--python {python}: no such program; pass {hint}")
    # -I: no PYTHONPATH and no user site folder, as in the audited process; -B: no bytecode.
    command = [str(python), "-I", "-B", "-c", _PROBE, *modules]
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH")}
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "timeout": 60, "check": True}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, **how)
        found = json.loads(done.stdout.splitlines()[-1])  # the last line, since a .pth file may print
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        words = rundir.redact(last_line(getattr(error, "stderr", "") or str(error)))[:200]
        message = f"--python {python} does not run as Python 3.8 or later ({words})"
        raise UserError(f"{message}; pass the path of an interpreter, such as .venv/bin/python") from None
    return {str(k): str(v) for k, v in found.items()}
