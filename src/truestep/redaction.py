"""Finds secrets (access tokens, passwords, keys) in texts and settings, by name, by known prefix or by shape.

A text is a secret if a secret's name stands before it, if it has a provider's prefix, or if it is long and as
irregular as random letters and digits. Hexadecimal text is never a secret by its shape: hashes, commits and ids
are hexadecimal.
Held by: tests/unit/test_redaction.py"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from truestep.errors import UserError

HIDDEN = "[redacted]"
INSTEAD = 'put it into an environment variable NAME and set "${NAME}" in the options of a reward'
_KEYS = "api|access|secret|private|auth|signing|encryption|account|subscription|master|ssh|shared"
_TOKENS = (
    "access|auth|api|bearer|refresh|session|hub|hf|github|gitlab|wandb|bot|security|private|secret|login"
)
_NAME = re.compile(
    rf"(?:^|_)(?:pass(?:word|wd|phrase|code)s?|pwd|secrets?|credentials?|authorization|cookie|(?:{_KEYS})_?keys?"
    rf"|(?:{_TOKENS})_?tokens?)(?:_?\d+|_(?:value|base|prod|dev|test))?$|^_*token$|^auth$|^pat$|^bearer$"
)
_PREFIXES = (
    r"(?:hf_|api_org_|sk-|sk_live_|sk_test_|rk_live_|gh[pousr]_|github_pat_|xox[a-z]-|xapp-|glpat-|npm_|pypi-|"
    r"dop_v1_|gsk_|r8_|nvapi-|xai-|pplx-|tgp_v1_|lsv2_pt_|ya29\.|AIza|shpat_|sq0csp-|dckr_pat_|tskey-)"
    r"(?:(?=[\w\-]*[\dA-Z])|(?=[a-z]{14}))[\w\-]{8,}"  # not hf_transfer
    r"|SG\.[\w\-]{8,}\.[\w\-]{8,}|(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{12,}"
    r"|eyJ[\w\-]{8,}\.[\w\-]{4,}(?:\.[\w\-]*)?"
)
_PLAIN = re.compile(
    rf"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    rf"|(?<![A-Za-z0-9])(?:{_PREFIXES})"
    r"|(?<=://)(?:[^/\s:@\"']*:[^/\s\"']+|[^/\s:@\"']{16,})(?=@)"
    r"|(?<=[Bb]earer\s)[A-Za-z0-9+/._~-]{8,}=*|(?<=[Bb]asic\s)(?=\S*[\d=])[A-Za-z0-9+/]{8,}=*",
    re.DOTALL,
)
_SIGN = re.compile(r"(?<![\w.\-])(?P<name>(?:--?)?[A-Za-z_][\w.\-]*)(?P<sign>\\?[\"']?\s*(?:=>?|:)\s*|\s+)")
_VALUE = re.compile(
    r"(?:(?:Bearer|Basic|Token)\s+)?"
    r"(?:\\?\"(?P<two>[^\"\n\\]+)|'(?P<one>[^'\n]+)|(?!\$\{)(?P<bare>[^\s\"',;&<>(){}\[\]\\]+))",
    re.IGNORECASE,
)
_RUN = re.compile(r"(?<![\w+/-])(?<!(?i:sha)\d{3}[:=])[\w+/-]{32,}(?![\w+/-])", re.ASCII)
_WEAK = re.compile(r"(?:^|\W)_*(?:token|auth|pat|bearer)$", re.IGNORECASE)  # also common words
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
_FOLDERS = ("PWD", "OLDPWD")  # set by the shell to a folder, which may no longer exist
_WORD = re.compile(r"[A-Za-z][a-z]{0,14}")  # app passwords that consist only of letters have 16
_NOTHING = ("", "none", "null", "empty", "true", "false", HIDDEN)
_given: set[str] = set()  # values that settings take from environment variables


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether a setting, option or variable with this name holds a secret."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name.rpartition(".")[2]).lower()
    return _NAME.search(words.strip("_")) is not None


def redact(text: str) -> str:
    """Replace everything that looks like a secret with "[redacted]"."""
    for value in _known(tuple(os.environ.items()), tuple(_given)):
        text = text.replace(value, HIDDEN)
    return _named(_RUN.sub(_random, _PLAIN.sub(HIDDEN, text)))


@lru_cache(maxsize=4)
def _known(environment: tuple[tuple[str, str], ...], given: tuple[str, ...]) -> list[str]:
    """Return the values of the environment's secrets, the longest first."""
    named = {value.strip() for name, value in environment if _is_secret_variable(name, value.strip())}
    return sorted({*named, *given}, key=len, reverse=True)


def _is_secret_variable(name: str, value: str) -> bool:
    """Return whether an environment variable holds a secret. The names of other settings end with such words
    too, so a plain word (SECRET_STORE=kubernetes), or the path of an existing file, is none."""
    named = is_secret_name(name) or name.upper().endswith(("_KEY", "_TOKEN", "_PASS"))
    if not named or name in _FOLDERS or len(value) < 8 or _WORD.fullmatch(value):
        return False
    return not ("/" in value and os.path.exists(os.path.expanduser(value)))


def _named(text: str) -> str:
    """Hide the values after the names of secrets, as in "password=…" or "--password …"."""
    parts, end = [], 0
    for match in _SIGN.finditer(text):
        name, sign = match["name"], match["sign"]
        if match.start() < end or not is_secret_name(name) or (sign.isspace() and name[:1] != "-"):
            continue
        value = _VALUE.match(text, match.end())
        if value is None or not (kind := value.lastgroup) or value[kind].lower() in _NOTHING:
            continue
        if kind == "bare" and _WEAK.search(name) and not re.search(r"^(?=.{8}).*\d", value[kind]):
            continue  # a token of a text
        # A sentence, as in "password: expected a string", or the next option.
        is_sentence = kind == "bare" and sign[-1:].isspace() and value[kind].replace("-", "").isalpha()
        if is_sentence or value[kind].startswith(("-", "${") if sign.isspace() else "${"):
            continue
        parts += [text[end : value.start(kind)], HIDDEN]
        end = value.end(kind)
    return "".join([*parts, text[end:]])


def _random(match: re.Match[str]) -> str:
    """Hide letters of both cases and digits that change their kind as often as random ones do."""
    text = match[0]
    longest = max(re.split(r"[^A-Za-z0-9]+", text), key=len)
    if re.match(r"sha\d+-", text) or len(longest) < 10 or _changes(longest) < 0.42:
        return text
    mixed = re.search(r"\d.*\d", text) and longest not in (longest.lower(), longest.upper())
    return HIDDEN if mixed and _changes(text) >= (0.42 if longest == text else 0.5) else text


def _changes(text: str) -> float:
    """Return how often the kind of a character (digit, upper case, lower case, other) changes: .62 if random."""
    kinds = [(c.isdigit(), c.isupper(), c.islower()) for c in text]
    return sum(a != b for a, b in pairwise(kinds)) / len(text)


def redact_command(words: Sequence[str]) -> list[str]:
    """Return the words of a command. A secret may be named by the word before it, as in --password VALUE."""
    return redact("\x1f".join(words)).split("\x1f")  # a white space that no command has


def find_secret(value: Any, name: str = "") -> str | None:
    """Return the dotted key of the first secret in settings, or None. References such as "${NAME}" are none."""
    entries: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        entries = [(f"{name}.{key}".lstrip("."), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        entries = [
            (f"{name}.{number}" if isinstance(inner, Mapping) else name, inner)
            for number, inner in enumerate(value)
        ]
    for key, inner in entries:
        if found := find_secret(inner, key):
            return found
    if isinstance(value, bool) or not isinstance(value, str | int) or _REFERENCE.fullmatch(str(value)):
        return None
    by_name = is_secret_name(name) and str(value).lower() not in _NOTHING
    by_name = by_name and (isinstance(value, str) or not name.endswith("token"))
    return name if by_name or redact(str(value)) != str(value) else None


def from_environment(value: Any, name: str) -> Any:
    """Return settings in which each value "${NAME}" is that of the environment variable, which ``redact`` hides
    from now on. Raises UserError if it is not set. ``name`` is the settings' key, for the error."""
    if isinstance(value, Mapping):
        return {key: from_environment(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [from_environment(inner, name) for inner in value]
    if not isinstance(value, str) or not (match := _REFERENCE.fullmatch(value)):
        return value
    if not (found := os.environ.get(match[1])):
        raise UserError(f"{name}: the environment variable {match[1]} is not set; set it")
    if len(found.strip()) >= 4:
        _given.add(found.strip())
    return found
