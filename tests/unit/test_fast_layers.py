"""Faster layers against torch's own: same outputs, same gradients, same parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zsr  # noqa: F401  first: makes torchvision importable beside CPU torch
from zsr.models import fast_linear
from zsr.models.attention import ContiguousAttention
from zsr.models.fast_layers import use_fast_layers
from zsr.models.fast_linear import FastLinear
from zsr.models.fast_patches import PatchProjection

torch.set_num_threads(1)


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of the input and of every parameter, for one fixed direction."""
    x = x.clone().requires_grad_(True)
    out = module(x)
    direction = torch.linspace(-1, 1, out.numel()).view_as(out)
    return out.detach(), list(torch.autograd.grad((out.float() * direction).sum(), [x, *module.parameters()]))


def assert_same(module: nn.Module, fast: nn.Module, x: Tensor, tolerance: float = 1e-6) -> None:
    (out, gradients), (fast_out, fast_gradients) = run(module, x), run(fast, x)
    assert fast_out.shape == out.shape and fast_out.dtype == out.dtype
    for found, expected in zip([fast_out, *fast_gradients], [out, *gradients], strict=True):
        assert (found - expected).norm() <= tolerance * max(expected.norm().item(), 1)


def fast_copy(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    holder = nn.Sequential(copy.deepcopy(module))
    assert use_fast_layers(holder) == 1 and type(holder[0]) is cls
    return holder[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 24), (3, 2, 4, 24)])
def test_a_linear_layer_equals_torchs_forward_and_backward(shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    assert_same(linear, fast_copy(linear, FastLinear), torch.randn(shape))


def test_a_linear_layer_takes_input_that_is_not_contiguous():
    torch.manual_seed(0)
    linear = nn.Linear(24, 40)
    assert_same(linear, fast_copy(linear, FastLinear), torch.randn(7, 24, 2).transpose(1, 2).transpose(0, 1))


def test_a_frozen_linear_layer_gives_the_inputs_gradient_and_fills_no_weights():
    linear = nn.Linear(24, 40).requires_grad_(False)
    fast = fast_copy(linear, FastLinear)
    x = torch.randn(5, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    fast(x).square().sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in fast.parameters())


def test_second_derivatives_are_right():
    torch.manual_seed(0)
    fast = fast_copy(nn.Linear(3, 4), FastLinear)
    weight, bias = fast.weight.detach().double(), fast.bias.detach().double()
    x = torch.randn(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(fast(x).pow(3).sum(), x, create_graph=True)
    found = torch.autograd.grad(slope.pow(2).sum(), [x, fast.weight])
    # By hand: the slope is 3 z^2 W with z = x W^T + b, so its squared norm has these derivatives.
    z = x.detach().double() @ weight.T + bias
    s = 3 * z**2 @ weight
    by_z = (2 * s @ weight.T) * 6 * z
    expected = [by_z @ weight, by_z.T @ x.detach().double() + (3 * z**2).T @ (2 * s)]
    for mine, wanted in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), wanted, rtol=1e-4, atol=1e-4)


def test_other_precisions_devices_and_torches_go_to_torchs_own(monkeypatch):
    linear = nn.Linear(24, 40)
    fast = fast_copy(linear, FastLinear)
    monkeypatch.setattr(fast_linear._OneDNNLinear, "apply", lambda *_: pytest.fail("not float32 outside autocast"))
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), linear(x)) and fast(x).dtype == torch.bfloat16
    assert torch.equal(fast.double()(x.double()), linear.double()(x.double()))
    assert fast.to("meta")(x.double().to("meta")).shape == (5, 40)
    monkeypatch.setattr(fast_linear, "_ONEDNN", None)
    linear = linear.float()
    assert torch.equal(fast_linear.linear(x, linear.weight, linear.bias), F.linear(x, linear.weight, linear.bias))


def test_this_torch_has_the_operator_that_linear_layers_hope_for():
    assert not torch.backends.mkldnn.is_available() or fast_linear._ONEDNN is not None


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (37, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_embedding_equals_the_convolution_forward_and_backward(size, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, 8, 8, bias=bias)
    assert_same(conv, fast_copy(conv, PatchProjection), torch.rand(2, 3, *size))


def test_a_patch_embedding_may_have_oblong_patches():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, (4, 8), (4, 8))
    assert_same(conv, fast_copy(conv, PatchProjection), torch.rand(2, 3, 32, 32))


def test_convolutions_of_other_kinds_keep_their_class():
    others = nn.ModuleList(
        [
            nn.Conv2d(3, 16, 3, 1, padding=1),
            nn.Conv2d(3, 16, 4, 2),
            nn.Conv2d(3, 16, 1, 1),
            nn.Conv2d(3, 16, 4, 4, padding=1),
            nn.Conv2d(4, 16, 4, 4, groups=2),
            nn.Conv2d(3, 16, 4, 4, dilation=2),
            nn.Conv1d(3, 16, 4, 4),
        ]
    )
    assert use_fast_layers(others) == 0


@pytest.mark.parametrize("length", [7, 300])
def test_attention_in_bf16_is_as_near_to_float32_as_torchs_own_forward_and_backward(length):
    torch.manual_seed(0)
    exact = nn.MultiheadAttention(32, 4, batch_first=True)
    fast = nn.Sequential(copy.deepcopy(exact))
    use_fast_layers(fast)
    assert isinstance(fast[0], ContiguousAttention) and isinstance(fast[0].out_proj, FastLinear)

    class SelfAttention(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    x = torch.randn(2, length, 32)
    out, gradients = run(SelfAttention(exact), x)
    with torch.autocast("cpu", torch.bfloat16):
        slow_out, slow_gradients = run(SelfAttention(exact), x)
        fast_out, fast_gradients = run(SelfAttention(fast[0]), x)
    for exactly, slowly, found in zip(
        [out, *gradients], [slow_out, *slow_gradients], [fast_out, *fast_gradients], strict=True
    ):
        error, allowed = ((some.float() - exactly).norm() / exactly.norm() for some in (found, slowly))
        assert error < max(1.5 * allowed, 1e-3), (error, allowed)


def test_names_order_and_values_of_parameters_stay():
    module = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 4), nn.MultiheadAttention(16, 2, batch_first=True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert use_fast_layers(module) == 4  # attention's output projection is a linear layer of its own
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert use_fast_layers(module) == 0
