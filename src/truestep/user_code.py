"""Finds and runs a recipe's own code, named as FILE.py:NAME or PACKAGE.MODULE:NAME. The code runs with the
user's rights. The hash of its file is part of a run's identity and provenance."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from truestep.errors import UserError, did_you_mean
from truestep.redaction import redact
from truestep.rundir import file_sha256


@dataclass(frozen=True, kw_only=True)
class Source:
    """A function and the file that contains it."""

    path: str
    module: str  # "" for FILE.py:FUNCTION
    function: str
    sha256: str  # of the file; "" for a function that ships with truestep


def find_source(named: str, base: Path, *, what: str, shipped: str = "") -> Source:
    """Find a function's file without running it. ``base`` is the recipe's folder. ``what`` names the function
    in errors. ``shipped`` is MODULE:FUNCTION if the function ships with truestep. Raises UserError
    if the file does not exist."""
    place, _, function = (shipped or named).rpartition(":")
    if place.endswith(".py"):
        module, path = "", (base / Path(place).expanduser()).resolve()
        if not path.is_file():
            hint = did_you_mean(path.name, [p.name for p in path.parent.glob("*.py")])
            raise UserError(f'{what} "{named}": {path} does not exist{hint}')
    else:
        module, path = place, _module_file(place, [*sys.path, str(base.resolve())], f'{what} "{named}"')
    sha256 = "" if shipped else file_sha256(path)
    return Source(path=str(path), module=module, function=function, sha256=sha256)


def _module_file(module: str, places: Sequence[str], what: str) -> Path:
    """Find a module's file without importing its packages."""
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = next((s for finder in sys.meta_path if (s := finder.find_spec(name, places))), None)
        if spec is None:
            break
        places = spec.submodule_search_locations or []
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(f"{what}: module {name} does not exist; install it or put it next to the recipe")
    return Path(spec.origin)


def load(source: Source, path: Sequence[str]) -> Callable[..., Any]:
    """Import the file and return its function. The file can import files next to it. Its folder comes last in
    the path, so that random.py there does not hide a module. Raises UserError, and what the file raises."""
    for folder in (*path, str(Path(source.path).parent)):
        if folder not in sys.path:
            sys.path.append(folder)
    if source.sha256 and file_sha256(Path(source.path)) != source.sha256:
        raise UserError(f"{source.path} has changed since the run was started; start the run again")
    module = importlib.import_module(source.module) if source.module else _import_file(Path(source.path))
    function = getattr(module, source.function, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        fault = "is not a function" if hasattr(module, source.function) else "does not exist"
        hint = did_you_mean(source.function, known)
        raise UserError(f"{source.function} {fault} in {source.path}{hint}")
    return function


def _import_file(path: Path) -> ModuleType:
    name = path.stem if path.stem not in sys.modules else f"recipe_{path.stem}"
    loader = _FromSource(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class _FromSource(importlib.machinery.SourceFileLoader):
    """A loader that ignores cached byte code. Python compares only the file's size and time in seconds, so
    after an edit the old code could run under the hash of the new code."""

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError


def with_folder(function: Callable[..., Any], options: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return the options, with ``folder`` if the function takes it. Raises UserError for unknown options."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C
        return dict(options)
    given = ({"folder": folder} if "folder" in signature.parameters else {}) | dict(options)
    try:
        signature.bind([], **given)
    except TypeError as error:
        known = [n for n, p in signature.parameters.items() if p.kind != p.POSITIONAL_ONLY][1:]
        wrong = [did_you_mean(key, known) for key in options if key not in known]
        raise UserError(f"options: {error}{''.join(wrong[:1])}") from None
    return given


MAX_DETAIL = 6000  # kept characters of a traceback


@dataclass(frozen=True, kw_only=True)
class Raised:
    """An exception of the user's code, as one line and a traceback."""

    reason: str
    detail: str


def attempt(work: Callable[..., Any], *given: Any) -> Any:
    """Call the user's code and return its result, or a ``Raised`` if it raises. No other function catches
    everything, even ``sys.exit``. If the code forks, the child process ends when it returns here."""
    own = os.getpid()
    try:
        result = work(*given)
    except BaseException as error:  # noqa: BLE001
        result = raised(error)
    if os.getpid() != own:
        os._exit(0)
    return result


def raised(error: BaseException) -> Raised:
    """Describe an exception of the user's code in words, without the frames of truestep."""
    package = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    while frames and (frames[0].filename.startswith(package) or "importlib" in frames[0].filename):
        del frames[0]
    if isinstance(error, UserError):
        return Raised(reason=str(error), detail="")
    only = traceback.format_exception_only(error)
    reason = only[-1].strip()
    if isinstance(error, SyntaxError):
        reason += f" ({error.filename}, line {error.lineno})"
    elif frames:
        reason += f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})"
    head = ["Traceback (most recent call last):\n"] if frames else []
    detail = "".join([*head, *traceback.format_list(frames), *only])
    return Raised(reason=redact(reason)[:1000], detail=redact(detail)[-MAX_DETAIL:])
