"""``truestep vllm MODEL``, which starts a vLLM server to which RL stages can attach."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

from typer import Argument, Exit, Option

from truestep.cli.output import echo

_MODEL = "The model folder or hub id that the RL stage starts from."
_MORE = "Further arguments for vLLM, after --."


def vllm(
    model: Annotated[str, Argument(help=_MODEL, show_default=False)],
    more: Annotated[list[str] | None, Argument(help=_MORE, show_default=False)] = None,
    host: Annotated[str, Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(help="The port to listen on.", min=1, max=65535)] = 8000,
    dtype: Annotated[str, Option(help="compute.dtype of the recipe: float32 or bfloat16.")] = "bfloat16",
    context: Annotated[int, Option(help="Tokens of the longest prompt and completion.", min=8)] = 4096,
    max_running: Annotated[int, Option(help="Samples that are decoded at once.", min=1)] = 64,
    dry_run: Annotated[bool, Option(help="Print the command and start nothing.")] = False,
) -> None:
    """Start a vLLM server for RL, with the options and the worker extension that prove its weights.

    Set vllm.attach in the recipe to its address. TRUESTEP_VLLM_PYTHON names the Python of vLLM's environment.
    Anybody who can reach the server can change its weights, so listen only on a private network.
    """
    from truestep.errors import UserError
    from truestep.rollout.vllm_server import VllmServer, environment, python_with_vllm, write_extension
    from truestep.rundir import cache_folder

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: expected float32 or bfloat16, as compute.dtype of the recipe")
    server = VllmServer(
        model=model, dtype=dtype, context_length=context, max_running=max_running, options=tuple(more or ()),
        trains=True,
    )  # fmt: skip
    command = server.command(python_with_vllm(), port, host)
    extension = cache_folder("vllm")
    write_extension(extension)
    if dry_run:
        echo(f"PYTHONPATH={shlex.quote(str(extension))} VLLM_SERVER_DEV_MODE=1 {shlex.join(command)}")
        raise Exit
    os.execve(command[0], command, environment(extension))
