"""Loops of peft, TRL, DeepSpeed, OpenRLHF and older transformers, for ``tests/guard/framework_run.py``."""

from __future__ import annotations

import contextlib
import importlib.machinery
import inspect
import itertools
import os
import sys
import types
from types import SimpleNamespace
from typing import Any

import torch
from framework_run import Run, collate, digest, llama, loop, rows, steps_of, token_sum, trained

STEPS, ACCUMULATION = 4, 4
ONE_PROCESS = {
    "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29573",
}  # fmt: skip


def logits_of(model: Any, m: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=m["input_ids"], attention_mask=m["attention_mask"], use_cache=False).logits


def settings(run: Run, kind: Any, **more: Any) -> Any:
    given = {"output_dir": str(run.folder), "per_device_train_batch_size": 1, "max_steps": STEPS, "seed": 3,
             "gradient_accumulation_steps": ACCUMULATION, "learning_rate": 1e-3, "weight_decay": 0.0, "report_to": [],
             "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False,
             "gradient_checkpointing": False}  # fmt: skip
    if run.world > 1:
        given["ddp_backend"] = "gloo"
    known = inspect.signature(kind.__init__).parameters
    return kind(**{k: v for k, v in {**given, **more}.items() if k in known})


# transformers and peft


def hf(run: Run, model: Any, optimizer: Any = None, **more: Any) -> Any:
    import transformers

    args = settings(run, transformers.TrainingArguments, remove_unused_columns=False, **more)
    how = {"train_dataset": rows(72), "data_collator": collate, "optimizers": (optimizer, None)}
    transformers.Trainer(model=model, args=args, callbacks=run.callbacks(), **how).train()
    return list(model.parameters())


@loop(verdict="FAULT", code="micro_mean")
def transformers_4_45(run: Run) -> Any:
    return hf(run, llama())


def lora(**more: Any) -> Any:
    import peft

    names = ["q_proj", "v_proj", "down_proj"]
    return peft.get_peft_model(
        llama(**more), peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
    )


@loop()
def peft_lora(run: Run) -> Any:
    return hf(run, lora())


@loop(dtype="bfloat16")
def peft_lora_bf16(run: Run) -> Any:
    return hf(run, lora(), bf16=True)


@loop(dtype="bfloat16")
def peft_lora_base_bf16(run: Run) -> Any:
    import peft

    base = llama().to(torch.bfloat16)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return hf(run, peft.get_peft_model(base, config), bf16=True)


@loop()
def peft_lora_checkpointing(run: Run) -> Any:
    return hf(run, lora(), gradient_checkpointing=True)


@loop()
def peft_lora_checkpointing_reentrant(run: Run) -> Any:
    return hf(run, lora(), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@loop(verdict="FAULT", code="stale_parameters")
def peft_two_of_the_adapters(run: Run) -> Any:
    model = lora()
    some = [p for p in model.parameters() if p.requires_grad][:2]
    return hf(run, model, torch.optim.AdamW(some, lr=1e-3))


# TRL

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {("<pad>", "<s>", "</s>")[i] if i < 3 else f"w{i}": i for i in range(64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def sft(run: Run, model: Any = None, **more: Any) -> Any:
    import datasets
    import trl

    data = datasets.Dataset.from_list(
        [
            {"input_ids": r["input_ids"], "completion_mask": [0] * 4 + [1] * (len(r["input_ids"]) - 4)}
            for r in rows(72)
        ]
    )
    args = settings(run, trl.SFTConfig, **{"max_length": 64, "completion_only_loss": True, **more})
    model = model or llama()
    how = {"processing_class": tokenizer(), "callbacks": run.callbacks()}
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, **how)
    trainer.train()
    return list(trainer.model.parameters())


@loop()
def trl_sft(run: Run) -> Any:
    return sft(run, per_device_train_batch_size=2)


@loop(dtype="bfloat16")
def trl_sft_bf16(run: Run) -> Any:
    return sft(run, bf16=True, gradient_checkpointing=True)


@loop()
def trl_sft_packing(run: Run) -> Any:
    return sft(run, packing=True)


@loop()
def trl_sft_padding_free(run: Run) -> Any:
    return sft(run, padding_free=True, max_length=None, per_device_train_batch_size=2)


@loop()
def trl_sft_dft(run: Run) -> Any:
    return sft(run, loss_type="dft", per_device_train_batch_size=2)


@loop(ranks=2)
def trl_sft_2(run: Run) -> Any:
    return sft(run)


def saved(run: Run) -> str:
    """Return the folder of a model, from which a trainer also makes its reference model."""
    llama().save_pretrained(run.folder / "model")
    return str(run.folder / "model")


def grpo(run: Run, **more: Any) -> Any:
    import datasets
    import trl

    data = datasets.Dataset.from_list([{"prompt": words(r["input_ids"][:4])} for r in rows(72)])
    args = settings(
        run, trl.GRPOConfig, per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        gradient_accumulation_steps=2, max_steps=6, **{"num_iterations": 2, **more},
    )  # fmt: skip

    def reward(completions: list[str], **ignored: Any) -> list[float]:
        return [float(len(set(c.split()))) for c in completions]

    how = {"processing_class": tokenizer(), "callbacks": run.callbacks(loss="any")}
    trainer = trl.GRPOTrainer(model=saved(run), args=args, train_dataset=data, reward_funcs=reward, **how)
    trainer.train()
    return list(trainer.model.parameters())


@loop()
def trl_grpo(run: Run) -> Any:
    return grpo(run)


@loop()
def trl_grpo_kl(run: Run) -> Any:
    return grpo(run, beta=0.1, num_iterations=1, loss_type="grpo")


@loop(dtype="bfloat16")
def trl_grpo_bf16(run: Run) -> Any:
    return grpo(run, bf16=True, gradient_checkpointing=True)


@loop()
def trl_dpo(run: Run) -> Any:
    import datasets
    import trl

    several = rows(72)
    data = datasets.Dataset.from_list([
        {"prompt": words(a["input_ids"][:4]) + " ", "chosen": words(a["input_ids"][4:-1]),
         "rejected": words(b["input_ids"][4:-1])}
        for a, b in itertools.pairwise(several)
    ])  # fmt: skip
    args = settings(run, trl.DPOConfig, max_length=64, max_prompt_length=8)
    how = {"processing_class": tokenizer(), "callbacks": run.callbacks(loss="any")}
    trainer = trl.DPOTrainer(model=saved(run), args=args, train_dataset=data, **how)
    trainer.train()
    return list(trainer.model.parameters())


# DeepSpeed


def deepspeed_ready() -> Any:
    # These are needed before the import, which picks the accelerator.
    for key, value in ONE_PROCESS.items():
        os.environ.setdefault(key, value)
    import deepspeed
    import deepspeed.ops

    # A collective in shared memory would be compiled for minutes; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed


def configuration(stage: int, offload: bool, dtype: str, **more: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": ACCUMULATION, "zero_optimization": zero,
        "steps_per_print": 10**9, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"}, **more,
    }  # fmt: skip


def engine_values(engine: Any, stage: int) -> str:
    import deepspeed

    parameters = list(engine.module.parameters())
    around = deepspeed.zero.GatheredParameters(parameters) if stage == 3 else contextlib.nullcontext()
    with around:
        return digest(parameters)


def engine_loop(
    run: Run,
    stage: int,
    offload: bool,
    dtype: str = "float32",
    optimizer: str = "adamw",
    overflows: bool = False,
) -> Any:
    deepspeed = deepspeed_ready()
    model = llama()
    if dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    made = {"adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
            "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
            "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)}[optimizer]  # fmt: skip
    config = configuration(stage, offload, dtype, gradient_clipping=1.0)
    config["bf16"] |= {"check_grad_overflow": True} if overflows else {}
    engine, *_ = deepspeed.initialize(model=model, optimizer=made(model.parameters()), config=config)
    # Up to DeepSpeed 0.18, an all-gather writes into a view, which torch forbids while gradients are tracked.
    engine.step = torch.no_grad()(engine.step)
    with run.watch(engine) as guard:
        for number, micro in enumerate(steps_of(run, STEPS, ACCUMULATION)):
            count = trained(run, micro) * (0.0 if overflows and number == 1 else 1.0)
            for m in micro:
                loss = token_sum(logits_of(engine, m), m["labels"])
                engine.backward(
                    loss / count * ACCUMULATION
                )  # the engine divides by the number of micro-batches
                engine.step()
                guard.step()
    values = engine_values(engine, stage)
    engine.destroy()
    return values


def _engine_loops() -> None:
    for ranks in (1, 2):
        for stage in (1, 2, 3):
            for offload in (False, True):
                for dtype in ("float32", "bfloat16"):
                    name = f"deepspeed_{stage}{'_offload' if offload else ''}_{dtype}_{ranks}"
                    about = {"stage": stage, "offload": offload, "dtype": dtype, "ranks": ranks}
                    loop(name=name, **about)(engine_loop)
    about = {"stage": 2, "offload": False, "dtype": "bfloat16", "overflows": True}
    loop(name="deepspeed_2_skips", **about)(engine_loop)
    for optimizer in ("sgd", "momentum"):
        for stage in (1, 2, 3):
            loop(name=f"deepspeed_{stage}_{optimizer}", stage=stage, offload=False, optimizer=optimizer)(
                engine_loop
            )


_engine_loops()


# OpenRLHF


def without_flash_attention() -> None:
    padding = ("index_first_axis", "pad_input", "rearrange", "unpad_input")
    names = {"flash_attn": (), "flash_attn.bert_padding": padding, "flash_attn.utils": ()}
    names["flash_attn.utils.distributed"] = ("all_gather",)
    for name, parts in names.items():
        module = types.ModuleType(name)
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        vars(module).update(dict.fromkeys(parts))
        sys.modules[name] = module


def openrlhf_args(batch_size: int) -> SimpleNamespace:
    never = 10**9
    return SimpleNamespace(
        model=SimpleNamespace(aux_loss_coef=0.0), ds=SimpleNamespace(packing_samples=False, param_dtype="fp32"),
        logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=never),
        eval=SimpleNamespace(steps=never), ckpt=SimpleNamespace(save_steps=never),
        train=SimpleNamespace(batch_size=batch_size, dynamic_batch_enable=False), local_rank=-1, aux_loss_coef=0.0,
        packing_samples=False, train_batch_size=batch_size, **dict.fromkeys(("use_wandb", "use_tensorboard")),
        **dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), never),
    )  # fmt: skip


def openrlhf_collate(batch: list[Any]) -> Any:
    longest = max(len(r["input_ids"]) for r in batch)
    parts = ([r["input_ids"] for r in batch], [r["attention_mask"] for r in batch],
             [[int(t != -100) for t in (*r["labels"][1:], -100)] for r in batch])  # fmt: skip
    tokens, real, kept = (
        torch.tensor([[*v, *[0] * (longest - len(v))] for v in part])[:, None] for part in parts
    )
    return tokens, real, kept.float()  # B 1 T


@loop(verdict="FAULT", code="micro_mean", stage=2)
def openrlhf_sft(run: Run, stage: int = 2) -> Any:
    """A user adds the guard around ``fit``, and its step after the strategy's step."""
    model = llama()
    without_flash_attention()
    deepspeed = deepspeed_ready()
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    from openrlhf.models import Actor
    from openrlhf.trainer.sft_trainer import SFTTrainer
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    args = openrlhf_args(ACCUMULATION)
    strategy = DeepspeedStrategy(
        zero_stage=stage, args=args, micro_train_batch_size=1, train_batch_size=ACCUMULATION
    )
    strategy.world_size, strategy.accumulated_gradient = run.world, ACCUMULATION
    mesh = torch.distributed.device_mesh.init_device_mesh
    strategy.ds_device_mesh = mesh("cpu", (run.world, 1, 1), mesh_dim_names=("dp", "sp", "tp"))
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config=configuration(stage, False, "float32"),
    )
    engine.step = torch.no_grad()(engine.step)
    actor = Actor(engine)
    actor.packing_samples = False
    how = {"pin_memory": False, "shuffle": False, "collate_fn": openrlhf_collate}
    loader = strategy.setup_dataloader(rows(STEPS * ACCUMULATION), 1, **how)
    schedule = SimpleNamespace(get_last_lr=lambda: [0.1])
    trainer = SFTTrainer(actor, strategy, optimizer, loader, None, schedule, max_epochs=1)
    with run.watch(engine) as guard:
        before = strategy.optimizer_step

        def optimizer_step(*given: Any, **more: Any) -> None:
            before(*given, **more)
            guard.step()

        strategy.optimizer_step = optimizer_step
        trainer.fit(args)
    values = engine_values(engine, stage)
    engine.destroy()
    return values
