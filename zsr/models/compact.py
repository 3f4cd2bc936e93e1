"""CLIP weights in a few hundred kilobytes: half precision, and only the token rows that captions use.

A small CLIP with CLIP's tokenizer spends most of its parameters on the table of 49,408 token embeddings, of which a caption
set touches a few thousand; the others keep the noise they were initialised with. `save_compact` stores the touched rows and
one mean row that stands for all others (so that an unknown word is a bland one, not a random one). `load_compact` gives the
ordinary open_clip state dict back, in fp32, so nothing else in zsr needs to know.

Layout of the safetensors file, metadata `format = zsr-compact-1`:
    text.token_ids             [N] int32, ascending: the stored rows' positions in the table
    token_embedding.rows       [N, W] fp16
    token_embedding.mean_row   [W] fp16
    every other key as in open_clip, fp16; scalars (the logit scale) stay fp32
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "zsr-compact-1"
_TABLE = "token_embedding.weight"


def save_compact(state_dict: dict[str, Tensor], path: Path | str, used_token_ids: Iterable[int]) -> None:
    """Write an open_clip CLIP state dict, keeping only the token rows in `used_token_ids`.

    Raises:
        ValueError: `state_dict` has no token table, or an id lies outside it, or none is given.
    """
    if _TABLE not in state_dict:
        raise ValueError(
            f"No {_TABLE} among the {len(state_dict)} tensors: only open_clip's plain CLIP can be compacted."
        )
    table = state_dict[_TABLE].detach().float()
    ids = torch.tensor(sorted(set(used_token_ids)), dtype=torch.int64)
    if not len(ids) or ids[0] < 0 or ids[-1] >= len(table):
        raise ValueError(f"Token ids must be given and lie in 0..{len(table) - 1}.")
    rows = table[ids].half()
    tensors = {
        key: value.detach().float() if value.dim() == 0 else value.detach().half()
        for key, value in state_dict.items()
        if key != _TABLE
    }
    tensors["text.token_ids"] = ids.int()
    tensors["token_embedding.rows"] = rows
    tensors["token_embedding.mean_row"] = rows.float().mean(0).half()  # of rounded rows: saving again changes nothing
    # safetensors refuses tensors that share storage, which views of one buffer do.
    tensors = {key: value.cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(tensors, str(path), metadata={"format": FORMAT, "vocab_size": str(len(table))})


def load_compact(path: Path | str) -> dict[str, Tensor]:
    """Read a state dict: a compact file is expanded to open_clip's own keys in fp32, any other safetensors file is as it is."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    if metadata.get("format") != FORMAT:
        return tensors
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    ids = tensors.pop("text.token_ids").long()
    table = tensors.pop("token_embedding.mean_row").repeat(int(metadata["vocab_size"]), 1)
    table[ids] = tensors.pop("token_embedding.rows")
    return {**tensors, _TABLE: table}
