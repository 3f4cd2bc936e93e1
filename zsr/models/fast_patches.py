"""The same patch embedding as a convolution, computed as one matrix product.

A ViT cuts an image into squares that do not overlap and maps each linearly; open_clip writes that as a convolution whose
stride is its kernel. The gradient of such a convolution with respect to its input, which every attack step needs, is slow:
on CPU it took as long as two transformer blocks. As a product of cut-out patches it costs what its arithmetic says.

Only the class of the module changes: parameters, their names and their order stay.

Shapes: B images, C channels, p x p pixels a patch, h x w patches, E width.
"""

from __future__ import annotations

from torch import Tensor, nn

from zsr.models.fast_linear import linear


class PatchProjection(nn.Conv2d):
    """A convolution whose stride equals its kernel, without padding, dilation or groups."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """``[B, C, h p, w p] -> [B, E, h, w]``, laid out with E innermost, as the transformer wants its tokens."""
        batch, channels, height, width = image_BCHW.shape
        p, q = self.kernel_size
        h, w = height // p, width // q
        if (h * p, w * q) != (height, width):  # a convolution drops the remainder
            image_BCHW = image_BCHW[:, :, : h * p, : w * q]
        patches = image_BCHW.reshape(batch, channels, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
        embedded_BNE = linear(patches.reshape(batch, h * w, channels * p * q), self.weight.flatten(1), self.bias)
        return embedded_BNE.transpose(1, 2).unflatten(2, (h, w))


def is_patch_projection(module: nn.Module) -> bool:
    """Whether :class:`PatchProjection` can take the place of this module."""
    return (
        type(module) is nn.Conv2d
        and module.stride == module.kernel_size
        and module.kernel_size != (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
    )
