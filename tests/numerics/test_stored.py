"""Rows that are read from a model's files are those of the whole model, bit for bit, and files that are written tensor by
tensor are those of save_pretrained."""

from __future__ import annotations

import filecmp
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from truestep.checkpoint.tensors import Streamed, write_weights
from truestep.errors import UserError
from truestep.model.load import read_config
from truestep.model.stored import StoredWeights, hollow, stored_files
from truestep.train.parallel import fill

SIZES: dict[str, Any] = {
    "vocab_size": 51, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
SAVED_BUFFER = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
    "head_dim": 8,
}  # fmt: skip
KEPT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
}  # fmt: skip
LONG = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
# Kind, sizes, and the size at which files are split.
MODELS = {
    "tied": ("qwen2", {"tie_word_embeddings": True, **LONG}, "50GB"),
    "untied, several files": ("qwen2", {}, "10KB"),
    "experts, several files": ("mixtral", EXPERTS, "10KB"),
    "saved buffer": ("glm4_moe", SAVED_BUFFER, "50GB"),
    "kept in float32": ("deepseek_v3", KEPT, "50GB"),
    "transposed": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}, "50GB"),
}


def saved(folder: Path, which: str) -> None:
    kind, sizes, size = MODELS[which]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}))
        for tensor in model.state_dict().values():
            tensor.normal_()
    model.save_pretrained(folder, max_shard_size=size)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, StoredWeights]:
    config = read_config(str(folder))
    model = hollow(config, dtype)
    return model, StoredWeights(model, stored_files(str(folder), config))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", MODELS)
def test_rows_and_files_are_those_of_the_whole_model(which: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path / "model", which)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    model, weights = opened(tmp_path / "model", dtype)
    for name, parameter in whole.named_parameters():
        cuts = (0, parameter.shape[0] // 3, parameter.shape[0] // 3, parameter.shape[0])
        pieces = [weights.read(name, first, stop) for first, stop in pairwise(cuts)]
        assert len(pieces[1]) == 0, "a rank may have no rows"
        assert torch.equal(torch.cat(pieces), parameter), name
    assert all(p.is_meta for p in model.parameters()), "nothing was loaded"
    fill(model, weights, torch.device("cpu"))
    same(dict(model.named_parameters()), dict(whole.named_parameters()))
    same(dict(model.named_buffers()), dict(whole.named_buffers()))
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is table) == (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight)
    with torch.no_grad():
        ids = torch.arange(9)[None]
        assert torch.equal(model.eval()(ids).logits, whole(ids).logits)
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "streamed").mkdir()
    write_weights(tmp_path / "streamed", model, Streamed.of(dict(model.named_parameters())))
    files = [tmp_path / folder / "model.safetensors" for folder in ("whole", "streamed")]
    assert filecmp.cmp(*files, shallow=False)


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    saved(tmp_path / "model", "experts, several files")
    _, weights = opened(tmp_path / "model")
    read = []

    class Counted:
        def __init__(self, key: str, view: Any) -> None:
            self.key, self.view, self.get_shape = key, view, view.get_shape

        def __getitem__(self, rows: Any) -> Tensor:
            read.append(self.key)
            return self.view[rows]

    weights.slices = {key: Counted(key, view) for key, view in weights.slices.items()}
    weights.read("model.layers.1.mlp.experts.gate_up_proj", 1, 3)
    assert len(read) == 4
    assert all(".layers.1." in key and (".experts.1." in key or ".experts.2." in key) for key in read)


def test_a_table_that_is_tied_only_by_the_configuration_is_untied(tmp_path: Path) -> None:
    saved(tmp_path / "model", "untied, several files")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model, weights = opened(tmp_path / "model")
    fill(model, weights, torch.device("cpu"))
    same(dict(model.named_parameters()), dict(whole.named_parameters()))
    assert len(dict(model.named_parameters())) == len(dict(model.named_parameters(remove_duplicate=False)))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", r"model\.safetensors: no file has model\.norm\.weight"),
        ("shape", r"model\.safetensors: model\.norm\.weight: .*shape \[17\], but config\.json says \[16\]"),
        ("dtype", r"model\.safetensors: model\.norm\.weight: its dtype is I64"),
        ("unexpected", r"model\.safetensors: model\.other: Qwen2ForCausalLM has no place"),
        ("no file", r"index\.json lists model-00002-of-\d+\.safetensors, which is not there"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(fault: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if fault == "no file":
        saved(folder, "untied, several files")
        next(folder.glob("model-00002*")).unlink()
    else:
        saved(folder, "tied")
        tensors = load_file(folder / "model.safetensors")
        norm = tensors.pop("model.norm.weight")
        found = {
            "missing": {}, "shape": {"model.norm.weight": torch.cat([norm, norm[:1]])},
            "dtype": {"model.norm.weight": norm.long()}, "unexpected": {"model.norm.weight": norm, "model.other": norm.clone()},
        }[fault]  # fmt: skip
        save_file({**tensors, **found}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=said):
        opened(folder)
