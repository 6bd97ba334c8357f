"""Paths in a recipe: relative to the recipe's folder, else to the current one; names and hub ids are left
alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from truestep.settings import load_settings

RECIPE = """
name = "x"
[model]
path = "{path}"
[data.train]
source = "procedural:addition"
[[stages]]
kind = "sft"
data = "train"
steps = 1
sequences_per_step = 1
tokens_per_microbatch = 64
optimizer = {{ lr = 1e-3 }}
"""


@pytest.mark.parametrize(
    ("path", "made", "expected"),
    [
        ("models/a", "recipes/models/a", "{recipes}/models/a"),
        ("../models/a", "models/a", "{recipes}/../models/a"),
        ("models/a", "models/a", "models/a"),  # beside the current folder only
        ("a.gguf", "recipes/a.gguf", "{recipes}/a.gguf"),
        ("tiny", "recipes/tiny", "tiny"),
        ("org/name", "elsewhere", "org/name"),
    ],
)
def test_a_model_path_is_looked_up_as_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, made: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / made).mkdir(parents=True)
    recipe = tmp_path / "recipes" / "x.toml"
    recipe.write_text(RECIPE.format(path=path))
    assert load_settings(recipe).model.path == expected.format(recipes=tmp_path / "recipes")
