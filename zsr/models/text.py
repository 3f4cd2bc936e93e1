"""Class prompts to class embeddings, with the text transformer run once per prompt set and never inside a step.

Shapes: C classes, K templates, E text width before projection, D embedding width.

The bank keeps features *before* the last linear map. That map is all that text tuning changes, so a tuned step costs one
small matrix product and a frozen one costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from zsr.models.clip import RobustCLIP


class TextBank:
    """Cached prompt features of one model.

    Args:
        model: whose frozen text tower encodes.
        cache_dir: keep features on disk too, so that thousands of prompts are encoded once per machine.
    """

    def __init__(self, model: RobustCLIP, cache_dir: Path | None = None) -> None:
        self._model = model
        self._cache_dir = cache_dir
        self._memory: dict[str, Tensor] = {}

    def features(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Features before projection, float32 ``[C, K, E]``, on the model's device.

        Raises:
            ValueError: no class, no template, or a template without ``{}``.
        """
        if not class_names or not templates:
            raise ValueError("zero-shot classification needs at least one class name and one template")
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no {{}} for the class name")
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        key = self._key(prompts)
        if key not in self._memory:
            features = self._from_disk(key)
            if features is None:
                features = self._model.encode_prompts(prompts)
                self._to_disk(key, features)
            self._memory[key] = features
        features_CKE = self._memory[key].view(len(class_names), len(templates), -1)
        return features_CKE.to(self._model.text_projection.device)

    def _key(self, prompts: list[str]) -> str:
        """Content hash of everything the features depend on: prompts, tokenizer, frozen text weights."""
        digest = hashlib.sha256(self._text_digest.encode())
        digest.update(self._model.tokenizer(prompts).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def _text_digest(self) -> str:
        # Weights alone do not say how they are used: activation and heads are the architecture's.
        digest = hashlib.sha256(json.dumps(self._model.architecture, sort_keys=True, default=str).encode())
        for name, value in sorted(self._model.open_clip.state_dict().items()):
            if not name.startswith("visual.") and not name.endswith(("logit_scale", "text_projection")):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()

    def _from_disk(self, key: str) -> Tensor | None:
        if self._cache_dir is None or not (file := self._cache_dir / f"{key}.safetensors").is_file():
            return None
        return load_file(file)["features"].to(self._model.text_projection.device)

    def _to_disk(self, key: str, features: Tensor) -> None:
        if self._cache_dir is None:
            return
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = self._cache_dir / f".{key}.{id(self)}.part"
        save_file({"features": features.cpu().contiguous()}, unfinished)
        unfinished.replace(self._cache_dir / f"{key}.safetensors")  # another process may write the same: last one wins
