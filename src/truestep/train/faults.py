"""Settings of an injected fault → the weights of a step's micro-batches: data, no branch in the step."""

from __future__ import annotations

from truestep import faults
from truestep.errors import UserError
from truestep.faults import FAULTS, WeightsOf
from truestep.settings import FaultSettings

OFFLOAD = {"first_last": faults.offload_first_last, "first_only": faults.first_only}


def fault_of(settings: FaultSettings) -> WeightsOf | None:
    """The product of all that is asked for; None where nothing is. Raises UserError for an unknown
    name."""
    asked: list[WeightsOf] = []
    if settings.offload_drop != "none":
        asked.append(OFFLOAD[settings.offload_drop])
    if settings.micro_mean:
        asked.append(faults.micro_mean)
    if settings.dp_token_mean:
        asked.append(faults.dp_token_mean)
    for name in settings.others:
        if name not in FAULTS:
            raise UserError(f"faults.others: {name!r} is not one of {', '.join(FAULTS)}")
        asked.append(FAULTS[name][0])
    return faults.combine(*asked) if asked else None
