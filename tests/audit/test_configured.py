"""A configuration file becomes the subject and the step that it configures; what cannot be taken over is
said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from truestep.audit.environments.configured import read
from truestep.errors import UserError


def written(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


ZERO = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def test_deepspeed_stage_offload_accumulation_and_clipping(tmp_path: Path) -> None:
    raw = {**ZERO, "gradient_accumulation_steps": 6, "gradient_clipping": 1.0, "bf16": {"enabled": True}}
    subject, notes = read(written(tmp_path, "ds.json", raw))
    configuration, wide = subject.configurations
    assert subject.name == "DeepSpeed"
    assert notes == []
    expected = {"stage": 2, "offload": True, "accumulation": 6, "max_grad_norm": 1.0, "dtype": "bfloat16"}
    assert configuration.options == expected
    assert wide.options == {k: v for k, v in expected.items() if k != "dtype"}
    assert wide.only == configuration.only


def test_an_accumulation_that_follows_from_batch_sizes_is_used_and_its_assumption_said(
    tmp_path: Path,
) -> None:
    raw = {**ZERO, "train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}
    subject, notes = read(written(tmp_path, "ds.json", raw))
    assert subject.configurations[0].options["accumulation"] == 8
    assert notes == [
        "32 micro-batches per step, assuming one process",
        "32 micro-batches per step are audited as 8",
    ]


def test_auto_says_that_four_were_assumed(tmp_path: Path) -> None:
    subject, notes = read(written(tmp_path, "ds.json", {**ZERO, "gradient_accumulation_steps": "auto"}))
    assert subject.configurations[0].options["accumulation"] == 4
    assert "does not say" in notes[0]


def test_training_arguments_name_the_deepspeed_file_beside_them(tmp_path: Path) -> None:
    written(tmp_path, "ds.json", ZERO)
    raw = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "deepspeed": "ds.json"}
    subject, _ = read(written(tmp_path, "args.json", raw))
    options = subject.configurations[0].options
    assert subject.name == "transformers Trainer + DeepSpeed"
    assert (options["zero_stage"], options["offload"], options["max_grad_norm"]) == (2, True, None)


def test_one_or_two_micro_batches_are_audited_as_they_are(tmp_path: Path) -> None:
    raw = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    subject, _ = read(written(tmp_path, "args.json", raw))
    assert subject.configurations[0].options["accumulation"] == 2
    assert subject.configurations[0].only == ("ragged", "unsplit")


def test_token_averaging_switched_off_is_a_documented_choice_on_two_processes(tmp_path: Path) -> None:
    raw = {"per_device_train_batch_size": 1, "average_tokens_across_devices": False, "max_grad_norm": 0.0}
    configuration = read(written(tmp_path, "args.json", raw))[0].configurations[0]
    assert configuration.world_size == 2
    assert configuration.documented
    assert "max_grad_norm" not in configuration.options


@pytest.mark.parametrize(
    ("name", "content", "subject"),
    [
        ("sft.yaml", "packing: true\ngradient_accumulation_steps: 4\n", "TRL SFTTrainer"),
        (
            "accelerate.yaml",
            "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config:\n  zero_stage: 3\n"
            "  offload_optimizer_device: cpu\n  gradient_accumulation_steps: 4\n",
            "DeepSpeed",
        ),
        ("accelerate.yaml", "distributed_type: MULTI_CPU\nnum_processes: 2\n", "accelerate"),
        (
            "run.sh",
            "deepspeed --module openrlhf.cli.train_sft --zero_stage 2 --adam_offload \\\n"
            "  --train_batch_size 8 --micro_train_batch_size 2\n",
            "OpenRLHF SFTTrainer",
        ),
    ],
)
def test_other_tools_are_recognised(tmp_path: Path, name: str, content: str, subject: str) -> None:
    found, _ = read(written(tmp_path, name, content))
    assert found.name == subject
    configuration = found.configurations[0]
    assert configuration.options["accumulation"] == 4
    assert configuration.world_size <= 2
    if name == "run.sh":
        assert configuration.options["offload"] is True


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ds.json", "{", "not valid JSON"),
        ("ds.json", "[1]", "expected a table"),
        ("ds.json", '{"zero_optimization": [2]}', "zero_optimization: expected a table"),
        (
            "args.json",
            '{"zero_optimization": {"offload_optimizer": "cpu"}}',
            "offload_optimizer: expected a table",
        ),
        ("bf16.json", '{"zero_optimization": {"stage": 2}, "bf16": true}', "bf16: expected a table"),
        ("under.json", '{"gradient_accumulation_steps": 4, "deepspeed": 3}', "deepspeed: expected a table"),
        (
            "ds.json",
            '{"zero_optimization": {"stage": "two"}}',
            "stage = 'two': expected a whole number from 0 to 3",
        ),
        ("ds.json", '{"zero_optimization": {"stage": 7}}', "stage = 7: expected a whole number from 0 to 3"),
        (
            "ds.json",
            '{"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": -3}',
            "steps = -3: expected",
        ),
        ("a.yaml", "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 4}", "zero_stage = 4"),
        ("ds.json", '{"learning_rate": 1}', "no setting of a known trainer"),
        ("a.yaml", "a: [", "not valid YAML"),
        (
            "args.json",
            '{"per_device_train_batch_size": 1, "deepspeed": "gone.json"}',
            r"cannot read .*gone\.json",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.json"):
        read(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        (
            "args.json",
            '{"gradient_accumulation_steps": 4, "optim": "adamw_torch", "weight_decay": 0.1}',
            "optim, weight_d",
        ),
        (
            "ds.json",
            '{"train_batch_size": 32, "optimizer": {"type": "AdamW"}}',
            "optimizer: audited with plain SGD",
        ),
        (
            "a.yaml",
            "distributed_type: FSDP\ngradient_accumulation_steps: 4",
            "distributed_type FSDP: audited as",
        ),
        (
            "run.sh",
            "openrlhf --train.micro_batch_size 1 --train.batch_size 4 --ds.param_dtype bf16",
            "bf16: audited in",
        ),
    ],
)
def test_what_is_not_taken_over_is_said(tmp_path: Path, name: str, content: str, note: str) -> None:
    _, notes = read(written(tmp_path, name, content))
    assert any(note in n for n in notes), notes


def test_a_file_that_asks_for_deepspeed_needs_it(tmp_path: Path) -> None:
    content = "finetuning_type: full\ngradient_accumulation_steps: 4\ndeepspeed: ds.json"
    written(tmp_path, "ds.json", '{"zero_optimization": {"stage": 2}}')
    subject, _ = read(written(tmp_path, "factory.yaml", content))
    assert subject.name == "LLaMA-Factory"
    assert "deepspeed" in subject.needs
