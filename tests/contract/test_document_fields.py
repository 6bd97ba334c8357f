"""The fields of every document that the commands write or print, as recorded in documents.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documents import RECORDED, described


def test_no_field_changes_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, recorded = described(tmp_path), json.loads(RECORDED.read_text())
    assert found.keys() == recorded.keys()
    assert {name: shape for name, shape in found.items() if shape != recorded[name]} == {}
