"""Which layers of an open_clip model are exchanged for faster equal ones, in one place."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from zsr.models.attention import use_fast_attention
from zsr.models.fast_linear import FastLinear
from zsr.models.fast_patches import PatchProjection, is_patch_projection


def use_fast_layers(module: nn.Module) -> int:
    """Switch attention, linear layers and patch embeddings inside ``module`` to faster equal classes, in place.

    Parameters, names, order and results (up to rounding) stay; layers of any other kind keep their class.

    Returns:
        How many modules were switched.
    """
    switched = use_fast_attention(module)
    for child in module.modules():
        if type(child) in (nn.Linear, NonDynamicallyQuantizableLinear):
            child.__class__ = FastLinear
            switched += 1
        elif is_patch_projection(child):
            child.__class__ = PatchProjection
            switched += 1
    return switched
