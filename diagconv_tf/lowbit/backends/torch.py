"""PyTorch: `torch.autograd.Function`."""

from __future__ import annotations

from typing import Any

import torch


def through(operand: Any, tensor: Any, seed: Any) -> Any:
    # A traced graph can hold no Python function.
    return tensor if torch.jit.is_tracing() else _Identity.apply(tensor, seed, operand)


class _Identity(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor, seed, operand):
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(context: Any, inputs: tuple, output: Any) -> None:
        _, seed, context.operand = inputs
        context.save_for_backward(seed)

    @staticmethod
    def backward(context, gradient):
        (seed,) = context.saved_tensors
        return context.operand(gradient, seed), None, None


def take(tensor: Any, indices: Any, axis: int) -> Any:
    return tensor.index_select(axis, indices)


def place_columns(values: Any, columns: Any, count: int) -> Any:
    zeros = values.new_zeros((values.shape[0], count))
    return zeros.index_copy_(1, columns.long(), values)


def largest(magnitudes: Any, k: int) -> Any:
    least = torch.topk(magnitudes, k, dim=-1, sorted=False)[0].amin(-1, keepdim=True)
    above, equal = magnitudes > least, magnitudes == least
    # `topk` promises nothing of equal numbers.
    wanted = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= wanted))


def largest_columns(totals: Any, k: int) -> Any:
    return torch.sort(totals, dim=-1, descending=True, stable=True)[1][..., :k]
