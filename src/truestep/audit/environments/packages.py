"""Additional packages without which some releases cannot be installed or run on a CPU."""

from __future__ import annotations

# (package, first release that does not need them, what older releases need). The user's pins have priority.
COMPANIONS: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("verl", (0, 7), ("transformers==4.56.1",)),
    ("verl", (0, 9), ("transformers==4.57.6",)),
    ("verl", (999,), ("transformers==5.9.0",)),  # as in verl's own extra for CPUs
    ("openrlhf", (0, 11), ("deepspeed==0.18.9", "transformers==5.5.4")),
    ("openrlhf", (999,), ("deepspeed==0.19.6", "transformers==5.15.0")),
    # An undeclared dependency; later torchao releases lack what torchtune imports.
    ("torchtune", (999,), ("torchao==0.9.0",)),
    ("trl", (0, 12), ("transformers==4.45.2", "peft==0.13.2")),
    ("trl", (0, 20), ("datasets<4", "transformers==4.51.3")),
    ("trl", (1,), ("transformers==4.57.6",)),
    ("transformers", (4, 48), ("accelerate==1.0.1", "huggingface-hub<1")),
    ("transformers", (999,), ("accelerate",)),
)
# Installed without their dependencies (which need a GPU compiler), after the packages that they need here.
ALONE = {
    "deepspeed": "hjson ninja py-cpuinfo msgpack psutil einops pydantic tqdm packaging numpy",
    "llamafactory": "accelerate<=1.11.0,>=1.3.0 datasets<=4.0.0,>=2.16.0 peft<=0.18.1,>=0.18.0 "
    "transformers<=5.6.0,>=4.55.0,!=4.57.0 trl<=0.24.0,>=0.18.0 einops hf-transfer matplotlib "
    "omegaconf pillow pyyaml scipy sentencepiece tiktoken",
    "verl": "accelerate cachetools codetiming datasets dill fastapi hydra-core numpy omegaconf orjson packaging pandas "
    "peft pillow ray tensordict<=0.10.0 torchdata transformers uvicorn",
    "axolotl": "accelerate==1.13.0 addict colorama datasets==4.8.4 einops fire numba peft==0.20.0 pillow pydantic python-dotenv "
    "pyyaml requests transformers==5.16.1 trl==1.9.0",
    "unsloth": "unsloth-zoo accelerate cut_cross_entropy datasets<5,>=4.7 einops hf-transfer msgspec peft pillow protobuf "
    "psutil regex sentencepiece transformers==5.17.0 trl==1.15.0 tyro",
    "unsloth-zoo": "",
    "openrlhf": "transformers accelerate peft torchdata pylatexenc sympy tqdm packaging pillow",
}
