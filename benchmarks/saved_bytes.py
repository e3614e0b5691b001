"""Bytes that a forward pass keeps for its backward, fused against stock."""

from __future__ import annotations

from typing import Any

import fusedcnn
import torch
from blocks import SIMPLECNN_1, SIMPLECNN_2
from torch import Tensor, nn


def measure_saved_bytes(
    batch_size: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Count what autograd keeps, for each block and for both in a row.

    Args:
        batch_size: images.
        dtype: of parameters and images.
        device: where.

    Returns:
        One row each: ``what``, ``batch``, the counts of :func:`held_bytes` for ``stock`` and
        ``fused``, and ``ratio``, stock to fused, of ``saved``.
    """
    pairs = (
        ("block 1", SIMPLECNN_1.stock(), SIMPLECNN_1.fused(), SIMPLECNN_1.image),
        ("block 2", SIMPLECNN_2.stock(), SIMPLECNN_2.fused(), SIMPLECNN_2.image),
        (
            "both blocks",
            fusedcnn.SimpleCNN().features,
            fusedcnn.FusedSimpleCNN().features,
            (3, 32, 32),
        ),
    )
    rows = []
    for what, stock, fused, image in pairs:
        # Block 2's input is an activation; images need no gradient.
        images = torch.randn(batch_size, *image, dtype=dtype, device=device)
        images.requires_grad_(image[0] != 3)
        counts = [held_bytes(m.to(device, dtype), images) for m in (stock, fused)]
        rows.append(
            {
                "what": what,
                "batch": batch_size,
                "stock": counts[0],
                "fused": counts[1],
                "ratio": counts[0]["saved"] / counts[1]["saved"],
            }
        )
    return rows


def held_bytes(module: nn.Module, input: Tensor) -> dict[str, int]:
    """Count the bytes of the distinct storages alive between a forward and its backward.

    Parameters are left out: they live on whoever computes.

    Returns:
        ``saved``: what autograd saved: the input, the activations between the layers, indices and
        codes; ``input``: the part of it that is the input; ``output``: what the module returned,
        where it is not itself saved (the next layer will save it).
    """
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor  # keeps the storage alive, so that no address comes twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(input)
    saved = {pointer: size for pointer, size in saved.items() if pointer not in parameters}
    result = output.untyped_storage()
    return {
        "saved": sum(saved.values()),
        "input": saved.get(input.untyped_storage().data_ptr(), 0),
        "output": 0 if result.data_ptr() in saved else result.nbytes(),
    }
