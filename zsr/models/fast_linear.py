"""The same linear layer as ``nn.Linear``, computed by oneDNN where torch would ask a slower library.

In float32 on CPU torch gives matrix products to the BLAS library that it was built with, and only lower precisions to
oneDNN. On the AMD processors measured (docs/measurements.md) oneDNN is a tenth faster on a ViT's shapes, in the forward
pass and in the gradient of the input; the weight's gradient stays where it is, being no faster there.

Only the class of the module changes: parameters, their names and their order stay.

Shapes: N rows (all leading dimensions together), K input width, M output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _OneDNNLinear(torch.autograd.Function):
    """``x W^T + b`` with both products of the input's path done by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        assert _ONEDNN is not None
        ctx.save_for_backward(x_NK if ctx.needs_input_grad[1] else None, weight_MK)
        return _ONEDNN(x_NK, weight_MK, bias_M, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_NM,) = grads
        x_NK, weight_MK = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = linear(grad_NM, weight_MK.t())
        if needs_weight:
            grad_weight = grad_NM.flatten(0, -2).t() @ x_NK.flatten(0, -2)
        if needs_bias:
            grad_bias = grad_NM.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias


def linear(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """``F.linear``, by the faster library where there is a choice."""
    plain_float = x_NK.dtype == weight_MK.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if torch.compiler.is_compiling():  # inductor chooses its own library, and cannot take this operator in training
        return F.linear(x_NK, weight_MK, bias_M)
    if _ONEDNN is None or x_NK.device.type != "cpu" or not plain_float or x_NK.dim() < 2 or x_NK.numel() == 0:
        return F.linear(x_NK, weight_MK, bias_M)
    result: Tensor = _OneDNNLinear.apply(x_NK, weight_MK, bias_M)  # type: ignore[no-untyped-call]
    return result


class FastLinear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x_NK: Tensor) -> Tensor:
        return linear(x_NK, self.weight, self.bias)
