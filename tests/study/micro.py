"""A study of a few seconds a cell: a model of some thousand parameters, one-digit addition, and the
controls."""

from __future__ import annotations

from pathlib import Path

STUDY = """
name = "micro"
question = "Does every part of a study work?"
seeds = [1, 2]
workers = 2
reference = "sft-rl"
primary = [["sft-rl", "sft"]]
secondary = [["sft-rl", "rejection"]]
may_differ = ["rl.reward", "sft.steps", "sft.epochs"]
base = "base.toml"

[controls_off]
rl-from-base = "the micro study has no room for it"

[tuning]
data = "dev"
factors = [1.0, 2.0]
seeds = [11]

[run.model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 1, num_heads = 2, intermediate_size = 64 }

[run.data.train]
source = "procedural:addition"
seed = 0
limit = 30
options = { digits = 1 }
[run.data.dev]
source = "procedural:addition"
seed = 0
split = "dev"
limit = 4
options = { digits = 1 }
[run.data.test]
source = "procedural:addition"
seed = 0
split = "test"
limit = 10
options = { digits = 1 }

[run.evaluate]
data = ["test"]
samples_per_problem = 2
sampling = { temperature = 1.0, max_new_tokens = 20 }

[stages.sft]
kind = "sft"
data = "train"
steps = 10
sequences_per_step = 8
tokens_per_microbatch = 400
save_every = 2
optimizer = { lr = 1e-2 }

[stages.more]
kind = "sft"
data = "train"
steps = 1
sequences_per_step = 8
tokens_per_microbatch = 400
save_every = 2
optimizer = { lr = 1e-2 }

[stages.rl]
kind = "rl"
data = "train"
steps = 3
prompts_per_step = 4
samples_per_prompt = 4
tokens_per_microbatch = 400
save_every = 1
optimizer = { lr = 1e-3 }
sampling = { max_new_tokens = 20 }

[stages.rejection]
kind = "rejection"
data = "train"
samples_per_prompt = 8
keep_per_prompt = 4
steps = 4
sequences_per_step = 2
tokens_per_microbatch = 400
sampling = { temperature = 1.0, max_new_tokens = 20 }
optimizer = { lr = 1e-2 }

[[arms]]
name = "base"
control = "base"
[[arms]]
name = "sft"
control = "sft"
stages = ["sft"]
[[arms]]
name = "sft-rl"
stages = ["sft", "rl"]
[[arms]]
name = "continued"
control = "sft-continued"
stages = ["sft", "more"]
equal_flops = { to = "sft-rl", step_like = "sft" }
[[arms]]
name = "coin"
control = "random-reward"
stages = ["sft", "rl"]
set = { "rl.reward" = "random" }
[[arms]]
name = "rejection"
control = "rejection"
stages = ["sft", "rejection"]
untuned = "one rate is enough here"
"""

BASE = """
name = "micro-base"
model = { path = "tiny", tiny = { hidden_size = 32, num_layers = 1, num_heads = 2, intermediate_size = 64 } }
compute = { threads = 1 }
data.easy = { source = "procedural:addition", seed = 0, limit = 30, options = { digits = 1 } }
[[stages]]
kind = "sft"
data = "easy"
steps = 120
sequences_per_step = 16
tokens_per_microbatch = 800
optimizer = { lr = 1e-2, schedule = "cosine", warmup_fraction = 0.1 }
"""


def write_study(folder: Path, text: str = STUDY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.toml").write_text(BASE)
    path = folder / "study.toml"
    path.write_text(text)
    return path
