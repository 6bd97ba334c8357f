"""Was a past run hit: made-up folders, and the three answers with their reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from past_folders import (
    BOUNDARY,
    MEANS,
    OPENRLHF,
    OWN,
    STATE,
    SUMS,
    Z2,
    deepspeed,
    freeze,
    look_back,
    offload,
    write,
)

from truestep.audit.postmortem.answers import answer, judge_release, release
from truestep.audit.postmortem.measured import MEASURED, Measurement, faults
from truestep.audit.postmortem.run_files import Evidence, gather, truth, whole

# ---------------------------------------------------------------------------------------- DeepSpeed's offload


@pytest.mark.parametrize(
    ("version", "expected", "reason"),
    [
        ("0.15.2", "affected", "was measured: faulty"),
        ("0.18.9", "affected", "was measured: faulty"),
        ("0.18.9+cu124", "affected", "was measured: faulty"),
        ("0.16.4", "affected", "inferred to be faulty: it is between 0.16.0 and 0.16.5"),
        ("0.15.1", "not affected", "was measured: correct"),
        ("0.19.0", "not affected", "was measured: correct"),
        ("0.19", "not affected", "was measured: correct"),
        ("0.19.3", "not affected", "was measured: correct"),
        ("0.19.5", "not affected", "inferred to be correct: it is between 0.19.3 and 0.19.8"),
        ("0.19.8", "not affected", "was measured: correct"),
        ("0.14.5", "unknown", "older than 0.15.0"),
        ("0.20.0", "unknown", "newer than 0.19.8"),
        ("0.16.0rc1", "unknown", "is not a release"),
    ],
)
def test_releases_of_deepspeed(tmp_path: Path, version: str, expected: str, reason: str) -> None:
    found = offload(write(tmp_path, **deepspeed(version)))
    assert found.answer == expected
    assert any(reason in r and "freeze.txt" in r for r in found.reasons)


@pytest.mark.parametrize(
    ("zero", "accumulation", "expected", "reason"),
    [
        (Z2, 3, "affected", "gradient accumulation 3 (ds.json)"),
        (Z2, 2, "not affected", "gradient accumulation 2 (ds.json); the fault needs 3 or more"),
        (Z2, 1, "not affected", "gradient accumulation 1 (ds.json); the fault needs 3 or more"),
        ({**Z2, "stage": 1}, 4, "not affected", "ZeRO stage 1 (ds.json)"),
        ({**Z2, "stage": 3}, 4, "not affected", "ZeRO stage 3 (ds.json)"),
        ({**Z2, "stage": 0}, 4, "not affected", "ZeRO stage 0 (ds.json); only 2 was found faulty"),
        ({"stage": 2}, 4, "not affected", "offload_optimizer none (ds.json)"),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, 4, "not affected", "offload_optimizer none"),
        ({"stage": 2, "cpu_offload": True}, 4, "affected", "offload_optimizer cpu"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, 4, "unknown", "offload_optimizer nvme"),
        (Z2, "auto", "affected if", "if gradient accumulation is 3 or more (not given in any file)"),
        ({"stage": "auto"}, 4, "not affected", "offload_optimizer none"),
    ],
)
def test_settings_of_deepspeed(
    tmp_path: Path, zero: Any, accumulation: Any, expected: str, reason: str
) -> None:
    found = offload(write(tmp_path, **deepspeed("0.18.9", zero, accumulation)))
    assert found.answer == expected
    assert any(reason in r for r in found.reasons), found.reasons


def test_an_answer_names_version_and_settings_and_their_files(tmp_path: Path) -> None:
    found = offload(write(tmp_path, **deepspeed("0.16.4")))
    told = " ".join(found.reasons)
    for words in ("0.16.4", "freeze.txt", "ZeRO stage 2 (ds.json)", "offload_optimizer cpu (ds.json)"):
        assert words in told


@pytest.mark.parametrize(
    "files",
    [
        {"requirements__txt": "torch\ndeepspeed[hf] == 0.18.9  # pinned\n"},
        {"environment__yml": "name: x\ndependencies:\n  - pytorch=2.6\n  - pip:\n    - deepspeed==0.18.9\n"},
        {"environment__yaml": "dependencies:\n- deepspeed=0.18.9=py310_0\n"},
        {"uv__lock": 'version = 1\n[[package]]\nname = "deepspeed"\nversion = "0.18.9"\n'},
        {"deep_in_poetry__lock": '[[package]]\nname = "DeepSpeed"\nversion = "0.18.9"\n'},
    ],
)
def test_where_a_version_may_stand(tmp_path: Path, files: dict[str, str]) -> None:
    found = offload(write(tmp_path, **{k: v for k, v in deepspeed().items() if k == "ds__json"}, **files))
    assert found.answer == "affected"


def test_a_range_is_no_version(tmp_path: Path) -> None:
    found = offload(write(tmp_path, **{**deepspeed(), "freeze__txt": "deepspeed>=0.15,<0.19\n"}))
    assert found.answer == "unknown"
    assert "deepspeed>=0.15,<0.19" in " ".join(found.reasons)


def test_a_whole_environment_without_the_package_is_not_affected(tmp_path: Path) -> None:
    found = offload(write(tmp_path, freeze__txt=freeze("transformers==4.50.0")))
    assert found.answer == "not affected"
    assert "deepspeed is not among the 12 packages in freeze.txt" in found.reasons[0]
    assert offload(write(tmp_path, freeze__txt="torch==2.6.0\n")).answer == "unknown"


def test_files_that_contradict_each_other_decide_nothing(tmp_path: Path) -> None:
    found = offload(
        write(tmp_path, **deepspeed(), uv__lock='[[package]]\nname = "deepspeed"\nversion = "0.19.8"\n')
    )
    assert found.answer == "unknown"
    assert "contradict" in " ".join(found.reasons)
    both_bad = write(tmp_path, uv__lock='[[package]]\nname = "deepspeed"\nversion = "0.15.2"\n')
    assert offload(both_bad).answer == "affected"


# ---------------------------------------------------------------------------------- where a setting may stand

ARGUMENTS = {"output_dir": "out", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
AUTO = {"zero_optimization": Z2, "gradient_accumulation_steps": "auto"}


@pytest.mark.parametrize(
    "files",
    [
        {"args__json": {**ARGUMENTS, "deepspeed": AUTO}},
        {"args__json": {**ARGUMENTS, "deepspeed": json.dumps(AUTO)}},
        {"args__json": {**ARGUMENTS, "deepspeed": "conf/z2.json"}, "x_in_z2__json": AUTO},
        {"config__yaml": json.dumps({k: {"value": v} for k, v in {**ARGUMENTS, "deepspeed": AUTO}.items()})},
        {
            "accelerate__yaml": "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 8\n"
            "deepspeed_config:\n  gradient_accumulation_steps: 4\n  offload_optimizer_device: cpu\n  zero_stage: 2\n"
        },
        {
            "llama_factory_sft__yaml": "stage: sft\ndeepspeed: examples/deepspeed/ds_z2_offload_config.json\n"
            "per_device_train_batch_size: 1\ngradient_accumulation_steps: 8\nlearning_rate: 1.0e-4\n",
            "ds_z2_offload_config__json": AUTO,
        },
        {"run__sh": "torchrun --nproc_per_node 8 train.py --deepspeed z2.json \\\n --gradient_accumulation_steps=4\n",
         "z2__json": AUTO},
        {"run__sh": "deepspeed --num_gpus 4 --module openrlhf.cli.train_sft --train_batch_size 64 \\\n"
         "  --micro_train_batch_size 2 --zero_stage 2 --adam_offload\n"},
        {"run__sh": "deepspeed --num_gpus=4 --module openrlhf.cli.train_sft --train.batch_size 64 \\\n"
         "  --train.micro_batch_size 2 --ds.zero_stage 2 --ds.adam_offload\n"},
    ],
)  # fmt: skip
def test_where_settings_may_stand(tmp_path: Path, files: dict[str, Any]) -> None:
    if any(name.endswith("yaml") for name in files):
        pytest.importorskip("yaml", reason="YAML needs pyyaml")
    found = offload(write(tmp_path, freeze__txt="deepspeed==0.16.9\n", **files))
    assert found.answer == "affected", found.reasons


def test_of_several_deepspeed_files_the_named_one_counts(tmp_path: Path) -> None:
    three = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": "auto"}
    write(tmp_path, freeze__txt="deepspeed==0.18.9\n", z2__json=AUTO, z3__json=three)
    assert offload(tmp_path).answer == "unknown"
    assert offload(write(tmp_path, args__json={**ARGUMENTS, "deepspeed": "z2.json"})).answer == "affected"
    assert offload(write(tmp_path, args__json={**ARGUMENTS, "deepspeed": "z3.json"})).answer == "not affected"
    gone = offload(write(tmp_path, args__json={**ARGUMENTS, "deepspeed": "z9.json"}))
    assert gone.answer == "unknown"
    assert "args.json names z9.json, which is not in the folder" in " ".join(gone.reasons)


def test_an_accumulation_that_depends_on_the_processes_says_so(tmp_path: Path) -> None:
    command = (
        "python -m openrlhf.cli.train_sft --train_batch_size 128 --micro_train_batch_size 2 --zero_stage 2 "
    )
    found = offload(write(tmp_path, freeze__txt="deepspeed==0.18.9\n", run__sh=command + "--adam_offload\n"))
    assert found.answer == "affected if"
    (reason,) = [reason for reason in found.reasons if "128 / (2 × processes) (run.sh)" in reason]
    assert "if there are at most 21 processes" in reason
    of_two = look_back(write(tmp_path, freeze__txt="deepspeed==0.18.9\nopenrlhf==0.10.2\n"))[OPENRLHF]
    assert any("if there are at most 32 processes" in reason for reason in of_two.reasons)
    assert offload(write(tmp_path, run__sh=command + "\n")).answer == "not affected"


def test_a_variable_is_no_number(tmp_path: Path) -> None:
    command = "deepspeed --num_gpus 8 --module openrlhf.cli.train_sft --train_batch_size 128 --adam_offload"
    write(tmp_path, freeze__txt="deepspeed==0.18.9\n")
    found = offload(write(tmp_path, run__sh=f"{command} --micro_train_batch_size 2 --zero_stage $ZERO\n"))
    assert found.answer == "affected if"
    assert "if ZeRO stage is 2 (not given in any file)" in found.reasons


def test_a_comment_is_no_command(tmp_path: Path) -> None:
    text = "# deepspeed --module openrlhf.cli.train_sft --zero_stage 3\npython x.py --deepspeed z2.json\n"
    write(
        tmp_path,
        freeze__txt="deepspeed==0.18.9\n",
        run__sh=text,
        z2__json={**AUTO, "gradient_accumulation_steps": 4},
    )
    assert offload(tmp_path).answer == "affected"


# ---------------------------------------------------------------------------------------------------- Trainer


def trainer(version: str, model: str = "LlamaForCausalLM", **arguments: Any) -> dict[str, Any]:
    return {
        "out_in_checkpoint-12_in_trainer_state__json": STATE,
        "out_in_checkpoint-12_in_config__json": {"architectures": [model], "transformers_version": version},
        "args__json": {**ARGUMENTS, **arguments},
    }


def test_the_trainer_that_takes_a_mean_of_means(tmp_path: Path) -> None:
    found = look_back(write(tmp_path, **trainer("4.45.2")))
    assert found[MEANS].answer == "affected"
    assert "out/checkpoint-12/config.json" in " ".join(found[MEANS].reasons)
    assert found[OPENRLHF].answer == "not affected"


@pytest.mark.parametrize(
    ("version", "model", "means", "sums"),
    [
        ("4.45.2", "GPT2LMHeadModel", "affected", "unknown"),
        ("4.46.3", "GPT2LMHeadModel", "unknown", "affected"),
        ("4.46.3", "LlamaForCausalLM", "unknown", "unknown"),
        ("4.51.0", "GPT2LMHeadModel", "unknown", "unknown"),
        ("5.23.0", "GPT2LMHeadModel", "not affected", "not affected"),
    ],
)
def test_releases_of_transformers(tmp_path: Path, version: str, model: str, means: str, sums: str) -> None:
    found = look_back(write(tmp_path, **trainer(version, model)))
    assert (found[MEANS].answer, found[SUMS].answer) == (means, sums)


def test_without_accumulation_only_one_process_is_right(tmp_path: Path) -> None:
    single = "distributed_type: 'NO'\ncompute_environment: LOCAL_MACHINE\nnum_processes: 1\n"
    write(tmp_path, **trainer("4.45.2", gradient_accumulation_steps=1))
    assert look_back(tmp_path)[MEANS].answer == "affected if"
    pytest.importorskip("yaml", reason="YAML needs pyyaml")
    assert look_back(write(tmp_path, accelerate__yaml=single))[MEANS].answer == "not affected"
    several = look_back(
        write(tmp_path, accelerate__yaml=single.replace("NO", "MULTI_GPU").replace(": 1", ": 4"))
    )
    assert several[MEANS].answer == "affected"
    assert "rank-wise mean" in " ".join(several[MEANS].reasons)


def test_the_config_of_a_model_that_was_only_loaded_says_nothing(tmp_path: Path) -> None:
    write(
        tmp_path,
        base_in_config__json={"architectures": ["X"], "transformers_version": "4.45.2"},
        args__json=ARGUMENTS,
    )
    found = look_back(tmp_path)[MEANS]
    assert found.answer == "unknown"
    assert "no file pins the version of transformers" in " ".join(found.reasons)


def test_the_kind_of_a_trainer_is_read_from_its_arguments(tmp_path: Path) -> None:
    def trainers(**files: Any) -> set[str]:
        (tmp_path / "args.json").unlink(missing_ok=True)
        return set(gather(write(tmp_path, **files)).settings.get("trainer", {}))

    assert trainers(args__json={**ARGUMENTS, "num_generations": 8}) == {
        "transformers Trainer",
        "TRL GRPOTrainer",
    }
    assert trainers(args__json={**ARGUMENTS, "dataset_text_field": "x"}) == {
        "transformers Trainer",
        "TRL SFTTrainer",
    }
    assert trainers(args__json=ARGUMENTS) == {"transformers Trainer"}
    assert trainers(run__sh="python3 -m verl.trainer.main_ppo data.train_batch_size=8\n") == {"verl main_ppo"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["transformers Trainer", "TRL SFTTrainer"], "affected"),
        (["transformers Trainer"], "affected if"),  # TRL's trainers write the same files
        (["transformers Trainer", "TRL GRPOTrainer"], "not affected"),
        ([], "affected if"),
    ],
)
def test_a_fault_of_a_trainer_that_others_resemble(found: list[str], expected: str) -> None:
    step = Measurement(
        subject="TRL SFTTrainer",
        versions={"trl": "0.9.0"},
        configuration={"loss_type": "x"},
        verdict="FAULT",
        kinds=("micro_mean",),
    )
    (fault,) = faults([step])
    evidence = Evidence(versions={"trl": {"0.9.0": "f"}}, settings={"loss_type": {"x": "f"}})
    for name in found:
        evidence.add("trainer", name, "f")
    assert answer(fault, evidence).answer == expected


def test_arguments_are_read_as_values(tmp_path: Path) -> None:
    options = {
        "loss_type": "bnpo",
        "beta": "0.04",
        "mask_truncated_completions": "true",
        "scale_rewards": None,
    }
    found = gather(write(tmp_path, args__json={**ARGUMENTS, **options})).settings
    assert {key: list(found.get(key, {})) for key in options} == {
        "loss_type": ["bnpo"], "beta": [0.04], "mask_truncated_completions": [True], "scale_rewards": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "processes", "expected"),
    [
        (False, 2, "affected"),
        (True, 2, "not affected"),
        (False, 1, "not affected"),
        (None, 2, "not affected"),
    ],
)
def test_tokens_of_each_process(tmp_path: Path, option: bool | None, processes: int, expected: str) -> None:
    arguments = {} if option is None else {"average_tokens_across_devices": option}
    script = f"torchrun --nproc_per_node {processes} train.py\n"
    found = look_back(write(tmp_path, **trainer("5.23.0", **arguments), run__sh=script))
    assert found[OWN].answer == expected, found[OWN].reasons
    if expected == "affected":
        other = look_back(write(tmp_path, **trainer("5.20.0", **arguments)))
        assert other[OWN].answer == "unknown"


# --------------------------------------------------------------------------------------------------- OpenRLHF


@pytest.mark.parametrize(
    ("version", "kind", "expected"),
    [
        ("0.10.2", "sft", "affected"),
        ("0.9.1", "sft", "unknown"),
        ("0.10.3", "sft", "unknown"),
        ("0.10.4", "sft", "not affected"),
        ("0.11.0", "sft", "not affected"),
        ("0.11.2", "sft", "not affected"),
        ("0.10.2", "dpo", "not affected"),
    ],
)
def test_openrlhf(tmp_path: Path, version: str, kind: str, expected: str) -> None:
    command = f"deepspeed --num_gpus 4 --module openrlhf.cli.train_{kind} --train_batch_size 64 --micro_train_batch_size 2"
    found = look_back(write(tmp_path, freeze__txt=f"OpenRLHF=={version}\n", run__sh=command))
    assert found[OPENRLHF].answer == expected, found[OPENRLHF].reasons


# -------------------------------------------------------------------------------------------------- the table


def test_every_measured_release_answers_as_it_was_measured() -> None:
    for measured in MEASURED:
        for version in measured.faulty:
            assert judge_release(measured, version).met is True
        for version in measured.right:
            assert judge_release(measured, version).met is False


def test_releases_are_numbers() -> None:
    assert release("0.19.0") == release("0.19") == release("v0.19.0.post1") == release("0.19+cpu")
    assert (release("0.9.1") or ()) < (release("0.10.2") or ())
    assert release("0.19.0rc1") is release("") is release("9" * 5000) is release("main") is None


def test_numbers_and_truths_as_files_write_them() -> None:
    assert [whole(v) for v in (4, "4", 4.0, "auto", "$N", True, -1, 1.5, None)] == [4, 4, 4, *[None] * 6]
    assert [truth(v) for v in (True, "False", "no", "maybe", None)] == [True, False, False, None, None]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.15.1", "affected if"), ("0.18.9", "affected if"), ("0.19.0", "not affected")],
)
def test_a_boundary_set_by_hand_stands_in_no_file(tmp_path: Path, version: str, expected: str) -> None:
    for accumulation in (8, 1):  # the loop decides, not the setting
        found = look_back(write(tmp_path, **deepspeed(version, Z2, accumulation)))[BOUNDARY]
        assert found.answer == expected


@pytest.mark.parametrize(("version", "expected"), [("0.6.0", "affected if"), ("0.9.1", "not affected")])
def test_verl(tmp_path: Path, version: str, expected: str) -> None:
    (tmp_path / "freeze.txt").write_text(f"verl=={version}\n")
    (found,) = [a for a in look_back(tmp_path) if "agg_loss" in a.finding]
    assert found.answer == expected
    assert any(version in reason or "accumulation" in reason for reason in found.reasons)
