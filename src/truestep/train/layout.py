"""Which rows of a parameter this rank has, so that any number of ranks can continue a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from truestep.checkpoint.layout import Rows, RowsOf, Share, every_row

COMPUTE_DTYPE = "compute_dtype"  # attribute of a module whose shards have a wider dtype than its forward pass


def rows_of(tensor: DTensor) -> Rows:
    """Return the rows of a tensor that FSDP2 has split like ``torch.chunk``: all parts have the same number of
    rows, except that the last ones may have fewer or none.

    Raises ValueError if the tensor is split in another way."""
    mesh, num_rows = tensor.device_mesh, tensor.shape[0] if tensor.ndim else 0
    if mesh.ndim != 1 or tuple(tensor.placements) != (Shard(0),):
        raise ValueError(f"a tensor with placements {tensor.placements} on {mesh.ndim} dimensions of ranks")
    size = -(-num_rows // mesh.size())
    first, stop = (min((mesh.get_local_rank() + i) * size, num_rows) for i in (0, 1))
    if stop - first != tensor.to_local().shape[0]:
        raise ValueError(f"this rank has {tensor.to_local().shape[0]} rows, expected {first} to {stop}")
    return first, stop


def share_of(tensor: Tensor) -> Share | None:
    """Return which rows of a tensor this rank has, or None if it has the whole tensor."""
    if not isinstance(tensor, DTensor):
        return None
    return Share(shape=tuple(tensor.shape), start=rows_of(tensor)[0])


def saved_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters, and the buffers that belong to the model's state, by name."""
    kept = module.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    return {**dict(module.named_parameters()), **buffers}


def computed(module: nn.Module, parameter: Tensor) -> Tensor:
    """Return a parameter of a module as its forward pass uses it: a shard may have a wider dtype."""
    return parameter.detach().to(compute_dtype(module, parameter))


def compute_dtype(module: nn.Module, parameter: Tensor) -> torch.dtype:
    found: torch.dtype = getattr(module, COMPUTE_DTYPE, parameter.dtype)
    return found


def needed_rows(module: nn.Module) -> RowsOf:
    """Return the rows that this rank needs of each saved tensor: those of its parameter. An optimizer's tensors
    are called KIND/PARAMETER, and are split like the parameter if they have its shape."""
    parameters = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}

    def rows(group: str, name: str, shape: tuple[int, ...]) -> Rows:
        parameter = parameters.get(name if group == "parameters" else name.partition("/")[2])
        if parameter is None or tuple(parameter.shape) != shape:
            return every_row(group, name, shape)
        return rows_of(parameter)

    return rows
