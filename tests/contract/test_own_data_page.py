"""The complete recipe of docs/how-to/own-data.md runs with the files that it describes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import truestep

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/own-data.md"


@pytest.mark.slow
def test_the_recipe_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe,) = (
        b
        for b in re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
        if b.startswith("name = ")
    )
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(recipe)
    sums = [(a, b) for a in range(5) for b in range(4)]
    chats = [
        {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]}
        for a, b in sums
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats[:16]))
    Path("held_out.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats[16:]))
    Path("problems.csv").write_text("question,label\n" + "".join(f"{a}+{b},{a + b}\n" for a, b in sums[:8]))
    Path("test.jsonl").write_text('{"problem": "4+4", "answer": "8"}\n')
    small = ["hidden_size=16", "num_layers=1", "num_heads=2", "intermediate_size=32"]
    run = truestep.train(
        "mine.toml", out="out", quiet=True, overrides=[f"model.tiny.{item}" for item in small]
    )
    assert run.status == "done"
    assert [row["checkpoint"] for row in run.scores] == ["base", "sft", "rl"]
    assert "validation/loss" in run.metrics("sft")
    for stage in ("01-sft", "02-rl"):
        assert (run.path / f"stages/{stage}/export/config.json").is_file()
