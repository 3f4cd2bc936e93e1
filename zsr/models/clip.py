"""RobustCLIP: open_clip with pixels in, unit embeddings out.

Shapes: B images, C classes, K templates, D embedding width, E text width before projection, P patches, H x W pixels.

Normalisation happens inside, so pixels are in [0, 1] for everyone outside and an epsilon means the same thing everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from zsr.config.plugins import suggest
from zsr.config.schema import ModelConfig, Precision
from zsr.models.anchors import class_embeddings, expand, fit_expansion
from zsr.models.fast_compile import compile_blocks
from zsr.models.fast_layers import use_fast_layers
from zsr.models.tower import ImageFeatures, ImageTower

EMBEDDED = Path(__file__).parent / "embedded"


class RobustCLIP(nn.Module):
    """A CLIP whose image tower, and the linear map at the end of its text tower, can be fine-tuned.

    The text transformer itself stays frozen: class features before the last projection are computed once and cached
    (zsr/models/text.py), so no step ever runs it.

    Attributes:
        arch: the name it was loaded by.
        architecture: open_clip's model config, as an export writes it.
        image_size: side of its square input, pixels.
        image: the image tower (trainable).
        text_projection: [E, D], the map that text tuning may change.
        logit_scale: factor on cosines, 100 for OpenAI's models; frozen.
        open_clip: the whole open_clip model; ``image.visual`` is part of it.
        tokenizer: list of prompts -> LongTensor of token ids.
    """

    logit_scale: Tensor
    anchor_mean: Tensor | None
    anchor_angle: Tensor | None

    def __init__(
        self,
        open_clip_model: nn.Module,
        tokenizer: Any,
        arch: str,
        architecture: dict[str, Any],
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        import open_clip

        model = cast(Any, open_clip_model)
        preprocess = open_clip.get_model_preprocess_cfg(model)
        size = preprocess["size"]
        self.arch = arch
        self.architecture = architecture
        self.image_size = int(size if isinstance(size, int) else size[0])
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.image = ImageTower(model.visual, tuple(preprocess["mean"]), tuple(preprocess["std"]), precision)
        self.open_clip = model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.text_projection = nn.Parameter(_text_projection(model).clone(), requires_grad=False)
        # LAAT's expansion of class embeddings, fitted on the training classes; None where the run has none.
        self.register_buffer("anchor_mean", None, persistent=False)
        self.register_buffer("anchor_angle", None, persistent=False)
        self.register_buffer("logit_scale", model.logit_scale.detach().exp().reshape(()).clone(), persistent=False)
        for parameter in self.image.parameters():
            parameter.requires_grad_(True)

    def encode_image(self, image_BCHW: Tensor, tokens: bool = False) -> ImageFeatures:
        """See :meth:`ImageTower.forward`."""
        features: ImageFeatures = self.image(image_BCHW, tokens=tokens)
        return features

    def class_embeddings(self, features_CKE: Tensor) -> Tensor:
        """Unit class embeddings ``[C, D]`` of cached prompt features, with the text side as it is now; differentiable."""
        text_CD = class_embeddings(features_CKE, self.text_projection)
        if self.anchor_mean is None or self.anchor_angle is None:
            return text_CD
        return expand(text_CD, self.anchor_mean, self.anchor_angle)

    @torch.no_grad()
    def fit_text_expansion(self, features_CKE: Tensor) -> None:
        """Spread class embeddings out from now on, around the mean of these classes (zsr/models/anchors.py).

        Raises:
            ValueError: the classes have one embedding between them.
        """
        self.anchor_mean, self.anchor_angle = fit_expansion(class_embeddings(features_CKE, self.text_projection))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], chunk: int = 256) -> Tensor:
        """Text features before the last projection, float32 ``[len(prompts), E]``, with the text tower in eval mode."""
        owner = projection_owner(self.open_clip)
        projection = owner.text_projection
        modes = [(module, module.training) for module in self.open_clip.modules()]
        device = self.text_projection.device
        self.open_clip.eval()
        try:
            if isinstance(projection, nn.Parameter):
                owner.text_projection = None
            parts = [
                self.open_clip.encode_text(self.tokenizer(prompts[i : i + chunk]).to(device)).float()
                for i in range(0, len(prompts), chunk)
            ]
        finally:
            owner.text_projection = projection
            for module, training in modes:
                module.training = training
        return torch.cat(parts)

    def train(self, mode: bool = True) -> RobustCLIP:
        super().train(mode)
        self.image.train(mode)  # last: open_clip's model contains the tower, which knows what must stay in eval mode
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """Everything fine-tuning can change, by name, and the frozen weights under a prompt; what a checkpoint stores."""
        state = {f"visual.{name}": value for name, value in self.image.visual.state_dict().items()}
        if self.image.prompt is not None:
            state |= {f"prompt.{name}": value for name, value in self.image.prompt.state_dict().items()}
        state |= {"text_projection": self.text_projection.detach()}
        if self.anchor_mean is not None and self.anchor_angle is not None:
            state |= {"anchor_mean": self.anchor_mean, "anchor_angle": self.anchor_angle}
        return state

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`trained_state` gave.

        Raises:
            ValueError: names or shapes are those of another model.
        """
        for name in ("anchor_mean", "anchor_angle"):
            setattr(self, name, state[name].to(self.text_projection.device).clone() if name in state else None)
        mine = self.trained_state()
        wrong = sorted(set(mine) ^ set(state)) or [name for name in mine if mine[name].shape != state[name].shape]
        if wrong:
            way_out = "model.name to the model they were trained from"
            if wrong[0].startswith("prompt."):
                way_out = "model.adapt, model.prompt_tokens and model.prompt_pixels to what they were trained with"
            raise ValueError(
                f"these weights do not fit {self.arch}: {len(wrong)} tensors differ, {wrong[0]} for one; set {way_out}"
            )
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(state[name])


def projection_owner(model: Any) -> Any:
    """The module that holds ``text_projection``: the model itself (CLIP) or its text tower (CustomTextCLIP)."""
    owner = model if hasattr(model, "text_projection") else model.text
    if not hasattr(owner, "text_projection"):
        owner.text_projection = None  # Hugging Face towers project inside; zsr's own map starts as the identity
    return owner


def _text_projection(model: Any) -> Tensor:
    """The text side's last linear map as ``[E, D]``; identity where the tower's own cannot be taken out."""
    projection = projection_owner(model).text_projection
    if isinstance(projection, nn.Parameter):
        return projection.detach().float()
    width = int(model.visual.output_dim)
    return torch.eye(width)


RANDOM = "random"  # value of model.pretrained that asks for random weights: never the result of forgetting it


def load_model(config: ModelConfig, precision: Precision = "fp32", device: str | torch.device = "cpu") -> RobustCLIP:
    """Load any open_clip model, or an embedded one, as a :class:`RobustCLIP`.

    Raises:
        ValueError: unknown name, no such weights, or options that its image tower cannot have.
    """
    import open_clip

    name, pretrained = config.name, config.pretrained
    if name.startswith("zsr:"):
        folder = _embedded_folder(name.removeprefix("zsr:"))
        architecture, model = _load_embedded(folder)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    else:
        if ":" not in name:
            _check_architecture(name, pretrained)
        tag = None if pretrained == RANDOM else pretrained
        try:
            # Random weights are the same whenever they are loaded: a checkpoint does not carry the text transformer.
            with _seeded() if pretrained == RANDOM else nullcontext():
                model = open_clip.create_model(name, pretrained=tag, require_pretrained=pretrained != RANDOM)
            tokenizer = open_clip.get_tokenizer(name)
            architecture = _architecture(name, model)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"model.name={name} model.pretrained={pretrained}: cannot be loaded: {error}") from error
    _still(cast(nn.Module, model.visual))
    if config.fast_layers:
        use_fast_layers(model)
    robust = RobustCLIP(model, tokenizer, name, architecture, precision)
    robust.image.equip(config)
    robust = robust.to(device)
    if config.compile:
        compile_blocks(robust.image.visual)
    return robust


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _still(visual: nn.Module) -> None:
    """Switch off what an image tower does at random in training: dropped units, paths and patches.

    Fine-tuning compares views of one image, resumes bit for bit and trains on many workers as on one; noise that belongs to
    pre-training from scratch stands in the way of all three. Some of open_clip's configs bring it along.
    """
    modules: list[Any] = list(visual.modules())
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif type(module).__name__ == "DropPath":  # timm's stochastic depth
            module.drop_prob = 0.0
        elif type(module).__name__ == "PatchDropout":  # open_clip's and timm's
            module.prob = 0.0


def _check_architecture(name: str, pretrained: str | None) -> None:
    import open_clip

    if name not in open_clip.list_models():
        raise ValueError(f"model.name={name}: is not an open_clip model{suggest(name, open_clip.list_models())}")
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        some = f"a tag ({', '.join(tags[:4])}, ...), " if tags else ""
        raise ValueError(f"model.pretrained: {name} needs {some}a weights file, or {RANDOM!r}")


def _architecture(name: str, model: nn.Module) -> dict[str, Any]:
    """open_clip's config of a model it made, with what loading may have changed written in."""
    import open_clip
    from open_clip.transformer import QuickGELU

    architecture: dict[str, Any] = dict(open_clip.get_model_config(name))
    if any(isinstance(module, QuickGELU) for module in model.modules()):
        architecture["quick_gelu"] = True  # OpenAI's weights switch it on, whatever the architecture's file says
    return architecture


def _embedded_folder(name: str) -> Path:
    folder = EMBEDDED / name
    if not (folder / "open_clip_config.json").is_file():
        known = [path.parent.name for path in EMBEDDED.glob("*/open_clip_config.json")]
        raise ValueError(f"model.name=zsr:{name}: is not an embedded model{suggest(name, known)}")
    return folder


def _load_embedded(folder: Path) -> tuple[dict[str, Any], nn.Module]:
    import open_clip
    from open_clip.transform import PreprocessCfg

    from zsr.models.compact import load_compact

    config = json.loads((folder / "open_clip_config.json").read_text())
    architecture: dict[str, Any] = config["model_cfg"]
    model = open_clip.CLIP(**architecture)
    size = architecture["vision_cfg"]["image_size"]
    open_clip.set_model_preprocess_cfg(model, vars(PreprocessCfg()) | {"size": (size, size)} | config["preprocess_cfg"])
    model.load_state_dict(load_compact(folder / "model.safetensors"))
    return architecture, model
