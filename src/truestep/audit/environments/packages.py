"""Additional packages without which some releases cannot be installed or run on a CPU."""

from __future__ import annotations

# (package, first release that does not need them, what older releases need). The user's pins have priority.
COMPANIONS: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("verl", (0, 7), ("transformers==4.56.1",)),
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
    "verl": "accelerate codetiming datasets hydra-core numpy omegaconf orjson packaging pandas peft "
    "ray tensordict transformers",
    "openrlhf": "transformers accelerate peft torchdata pylatexenc sympy tqdm packaging pillow",
}
