"""A model folder that brings code: the code never runs, whatever stdin says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.errors import UserError
from truestep.model.load import load_model, load_tokenizer, model_content, read_config
from truestep.settings import ModelSettings

CODE = """
from pathlib import Path
Path({marker!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Own(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM): pass
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
CLASSES = {
    "AutoConfig": "code.Own",
    "AutoModelForCausalLM": "code.OwnModel",
    "AutoTokenizer": ["code.OwnTokenizer"] * 2,
}


def load(settings: ModelSettings) -> Any:
    return load_model(settings, dtype=torch.float32, device=torch.device("cpu"), seed=0)


@pytest.mark.parametrize("kind", ["own", "llama"])
@pytest.mark.parametrize("opened", [load, load_tokenizer, model_content, lambda s: read_config(s.path)])
def test_a_folders_code_never_runs(
    opened: Callable[[ModelSettings], Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    (folder / "config.json").write_text(
        json.dumps({"model_type": kind, "auto_map": CLASSES, "architectures": ["OwnModel"]})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": CLASSES["AutoTokenizer"]}}
        )
    )
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr("sys.stdin", answers)
    said = ""
    try:
        opened(ModelSettings(path=str(folder)))
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert "trust_remote_code" not in said, "there is no such setting"
    assert not marker.exists()
    assert answers.tell() == 0, "nothing is asked"
