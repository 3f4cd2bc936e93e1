"""Visual prompts: what is learned in front of a frozen image tower, in place of its weights.

Both are TeCoA's (Mao et al., ICLR 2023, arXiv 2212.07016), which trains them together, with SGD at a learning rate of 40; here
a run has either or both. Placement as in the official code, starts as said below.

Shapes: B images, E width inside the tower, L tokens of a sequence, N prompt tokens or border pixels, H x W pixels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from zsr.config.schema import ModelConfig


class PadPrompt(nn.Module):
    """A border added to the normalised image, of which it covers the outermost pixels (it does not enlarge the image).

    Theirs starts from unit Gaussian noise; this one from zeros, where the model is the bare one exactly. The sum may leave
    the range of pixels: the prompt belongs to the model, and an attack's budget is counted before it.

    Attributes:
        border: ``[3, N]``, the border's values row by row, in units of the normalised image.
    """

    index_N: Tensor

    def __init__(self, image_size: tuple[int, int], pixels: int) -> None:
        super().__init__()
        self.image_size = image_size
        inside_HW = torch.zeros(image_size, dtype=torch.bool)
        inside_HW[pixels : image_size[0] - pixels, pixels : image_size[1] - pixels] = True
        self.register_buffer("index_N", (~inside_HW).flatten().nonzero()[:, 0], persistent=False)
        self.border = nn.Parameter(torch.zeros(3, len(self.index_N)))

    def forward(self, input_BCHW: Tensor) -> Tensor:
        """Normalised images to normalised images, of the same shape and size."""
        height, width = self.image_size
        frame = self.border.new_zeros(3, height * width).index_copy(1, self.index_N, self.border)
        return input_BCHW + frame.view(1, 3, height, width)


class TokenPrompt(nn.Module):
    """Tokens behind a ViT's patches, with the tower's first norm but without positions; they join attention in all blocks.

    They are taken out again before pooling, so neither an average nor the patch tokens contain them. They start, as theirs,
    from unit Gaussian noise, here the same for every run. Theirs has a position for each token besides, which starts at
    zero and is not given to the optimizer: it stays out.

    Attributes:
        tokens: ``[N, E]``.
    """

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(0)))

    def forward(self, x_BLE: Tensor, first_norm: nn.Module) -> Tensor:
        """A ViT's sequence after its first norm, to the sequence with the prompt at its end, ``[B, L + N, E]``."""
        prompt_NE = first_norm(self.tokens).to(x_BLE.dtype)
        return torch.cat([x_BLE, prompt_NE.expand(len(x_BLE), -1, -1)], dim=1)


class Prompt(nn.Module):
    """What is trained of a tower with prompts: a border, tokens, or both.

    Attributes:
        adapt: the setting that asked for it.
    """

    def __init__(self, adapt: str, pad: PadPrompt | None, token: TokenPrompt | None) -> None:
        super().__init__()
        self.adapt, self.pad, self.token = adapt, pad, token


def make_prompt(config: ModelConfig, visual: nn.Module, is_vit: bool) -> Prompt | None:
    """The prompt that the settings ask for; None where weights are trained.

    Raises:
        ValueError: the tower can have no such prompt.
    """
    if config.adapt == "weights":
        return None
    pad = None if config.adapt == "token_prompt" else _pad_prompt(config, visual)
    token = None if config.adapt == "pad_prompt" else _token_prompt(config, visual, is_vit)
    return Prompt(config.adapt, pad, token)


def _token_prompt(config: ModelConfig, visual: nn.Module, is_vit: bool) -> TokenPrompt:
    if not is_vit:
        raise ValueError(
            f"model.adapt={config.adapt}: tokens can be added to open_clip's ViTs only, and the image tower of {config.name} "
            f"is a {type(visual).__name__}; use model.adapt=pad_prompt, or another model.name"
        )
    return TokenPrompt(cast(Any, visual).transformer.width, config.prompt_tokens)


def _pad_prompt(config: ModelConfig, visual: nn.Module) -> PadPrompt:
    size = cast(Any, visual).image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    most = (min(height, width) - 1) // 2
    if config.prompt_pixels > most:
        raise ValueError(
            f"model.prompt_pixels={config.prompt_pixels}: leaves nothing of an image of {height} x {width} pixels; "
            f"use at most {most}"
        )
    return PadPrompt((height, width), config.prompt_pixels)
