"""Export of the model as a Hugging Face folder (for transformers, vLLM and lm-eval) with a model card."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from truestep.checkpoint.folders import replace_folder, require_space
from truestep.checkpoint.tensors import Streamed, write_weights
from truestep.errors import OutOfSpace, UserError
from truestep.rundir import EXPORT_MARK, NO_SPACE, fsync_folder, mark_export, read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

NOT_EVALUATED = "Not evaluated."
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def export_hf(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    card: str,
    special_tokens: Sequence[str] = (),
    system: str = "",
    weights: Streamed | None = None,
) -> None:
    """Write model, tokenizer, generation config and README.md. The folder appears whole or not at all.

    ``system`` is the system prompt that the model was trained with. ``weights`` are written instead of the model's own
    parameters, one at a time; a tied parameter that is among them under both names is not tied in the export. An older
    export, which contains EXPORT_MARK, is replaced. Raises UserError if the existing folder is not an export, and
    OutOfSpace if the disk is full."""
    folder = Path(os.path.abspath(folder))
    temporary = folder.with_name(f"{folder.name}.tmp-write")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (
        folder.exists()
        and not (folder / EXPORT_MARK).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise UserError(
            f"{folder} exists and is not a truestep export; pass a folder that does not exist yet"
        )
    if temporary.exists():
        shutil.rmtree(temporary)
    weights = weights or Streamed.of(dict(model.named_parameters()))
    require_space(folder.parent, weights.num_bytes)
    temporary.mkdir()
    try:
        _write(temporary, model, tokenizer, card, weights)
        mark_export(temporary, special_tokens, system)
        for path in (*temporary.rglob("*"), temporary):
            fsync_folder(path)  # this call also syncs a file
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        # Safetensors has the error number only in its message.
        if code in NO_SPACE or "(os error 28)" in str(error) or "(os error 27)" in str(error):
            fault = f"{folder}: no space for the exported model"
            raise OutOfSpace(f"{fault}; free disk space and export again") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str, weights: Streamed
) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = next(iter(weights.empty.values())).dtype
    tied = getattr(model, "all_tied_weights_keys", {})
    if any(name in weights.empty and source in weights.empty for name, source in tied.items()):
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    stopping_config(model, tokenizer).save_pretrained(folder)
    write_weights(folder, model, weights)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def special_tokens_of(folder: Path) -> tuple[str, ...]:
    """Return the special tokens that texts of an exported model may contain. Raises UserError if the mark is damaged."""
    mark = folder / EXPORT_MARK
    found = read_json(mark).get("special_tokens", []) if mark.is_file() else []
    if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
        raise UserError(f"{mark}: special_tokens is not a list of texts; restore the file or export again")
    return tuple(found)


def exported_system(folder: Path) -> str:
    """Return the system prompt that an exported model was trained with, or "". Raises UserError if the mark is damaged."""
    mark = folder / EXPORT_MARK
    found = read_json(mark).get("system", "") if mark.is_file() else ""
    if not isinstance(found, str):
        raise UserError(f"{mark}: system is not a text; restore the file or export again")
    return found


def stopping_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the model's generation config, to which the tokenizer's stop token is added.

    A model trained to stop at ``<|im_end|>`` would not stop if its config named only ``<|endoftext|>``."""
    from transformers import GenerationConfig

    config = copy.deepcopy(getattr(model, "generation_config", None)) or GenerationConfig()
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({i for i in [*stops, tokenizer.eos_token_id] if i is not None}) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if any(getattr(config, name, None) is not None for name in _SAMPLING):
        config.do_sample = True  # some published models lack it; transformers then refuses to save the values
    return config


def model_card(
    name: str,
    base_model: str,
    stages: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    weights: str = "",
) -> str:
    """Return the README.md of an export: Markdown with YAML front matter. ``weights`` says which step they are of.

    It shows the name, kind, method, data, seed, steps and flops of each stage, and the data, metric, score,
    low, high, num_problems and n of each score. A missing value is shown as "–". ``provenance`` is what
    ``rundir.provenance`` returns."""
    columns = ("name", "kind", "method", "data", "seed", "steps")
    rows = [{"seed": provenance.get("seed"), **stage} for stage in stages]
    training = [(*_row(s, *columns), _number(s.get("flops"), ".3g")) for s in rows]
    tested = [
        (*_row(s, "data", "metric"), _number(s.get("score")), _interval(s), *_row(s, "num_problems", "n"))
        for s in scores
    ]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base_model):  # the hub accepts only this form
        front.append(f"base_model: {json.dumps(base_model)}")
    tags = ["truestep", "reasoning", *dict.fromkeys(str(s["kind"]) for s in stages if s.get("kind"))]
    front += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]
    body = [f"# {_cell(name)}", "", f"Trained with truestep from {_cell(base_model)}.", "", "## Training", ""]
    body += _table(("stage", "kind", "method", "data", "seed", "steps", "FLOPs (paper)"), training)
    body += ["", f"Weights: {_cell(weights)}."] if weights else []
    head = ("data", "metric", "value", "95 % interval", "problems", "samples")
    body += ["", "## Evaluation", "", *(_table(head, tested) if tested else [NOT_EVALUATED])]
    return "\n".join([*front, *body, "", "## Provenance", "", *_provenance_lines(provenance), ""])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _row(record: Mapping[str, Any], *keys: str) -> list[str]:
    return [_cell(record.get(key)) for key in keys]


def _cell(value: Any) -> str:
    """Return the value as one line of text, in which HTML and Markdown markup is escaped."""
    if value is None or value == "":
        return "–"
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", text)


def _number(value: Any, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _interval(score: Mapping[str, Any]) -> str:
    low, high = score.get("low"), score.get("high")
    return "–" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def changes_in_words(changes: Sequence[Mapping[str, Any]]) -> str:
    """Say which settings were changed after which step of which stage."""
    return "; ".join(
        f"{key} from {before} to {after}" + (f" after step {change['step']}" if change["stage"] else "")
        for change in changes
        for key, (before, after) in change["values"].items()
    )


def _provenance_lines(provenance: Mapping[str, Any]) -> list[str]:
    def pairs(key: str) -> str:
        return ", ".join(f"{name} {value}" for name, value in (provenance.get(key) or {}).items())

    changed = ", changed" if provenance.get("uncommitted_changes") else ""
    shown = {
        "Commit": str(provenance.get("commit") or "") + changed,
        "Seed": provenance.get("seed"),
        "Changed while training": changes_in_words(provenance.get("changes") or []),
        "Command": " ".join(provenance.get("command") or []),
        "Python": provenance.get("python"),
        "Versions": pairs("versions"),
        "Hardware": pairs("hardware"),
    }
    return [f"- {key}: {_cell(value)}" for key, value in shown.items()]
