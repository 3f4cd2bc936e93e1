"""One batch to one loss: the attack, the views and the objective.

Shapes: B images, C classes, K templates, D embedding width, E text width before projection, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsr.attacks.base import Attack, AttackResult, input_gradients_only
from zsr.config.schema import ATTACKS, OBJECTIVES, RunConfig
from zsr.engine.sample_cache import SampleCache
from zsr.models import ImageFeatures, ImageTower, RobustCLIP, TextBank
from zsr.objectives.base import FROZEN_VIEWS, LossOutput, Objective, PerSample, StepContext, View


@dataclass(frozen=True)
class StepOutput:
    """What one step gives: the loss to minimise and scalars for the meters (detached, on the device)."""

    loss: LossOutput
    scalars: dict[str, Tensor]


class TrainStep:
    """The forward half of a training step.

    Args:
        config: of the run.
        model: what is trained. Its weights must still be the pre-trained ones: the frozen tower is copied from them.
        bank: the model's text bank.
        class_names: classes of the training set.
        templates: prompts; several are averaged.

    Raises:
        ValueError: the objective needs patch tokens that this model does not have.
    """

    def __init__(
        self, config: RunConfig, model: RobustCLIP, bank: TextBank, class_names: Sequence[str], templates: Sequence[str]
    ) -> None:
        self.model = model
        self.objective: Objective = OBJECTIVES.build(config.objective)  # type: ignore[type-arg]
        self.attack: Attack = ATTACKS.build(config.attack)  # type: ignore[type-arg]
        if self.objective.needs_tokens and not model.image.has_tokens:
            raise ValueError(
                f"objective.name={config.objective.name} needs patch tokens, and model.name={config.model.name} has none: "
                f"{model.image.tokens_missing}"
            )
        self.objective.check(config.attack, model)
        model.text_projection.requires_grad_(self.objective.tunes_text)
        self.frozen = self._copy_frozen()
        self.features_CKE = bank.features(class_names, templates)
        if config.model.expand_text or self.objective.expands_text:
            model.fit_text_expansion(self.features_CKE)
        self.text0_CD = self._constant_text(self.features_CKE)
        self.duplicate_CC = duplicates(self.text0_CD)
        self.extra_text_CD = {
            name: self._constant_text(bank.features(class_names, [template]))
            for name, template in self.objective.extra_templates.items()
        }
        self._constants: dict[str, Tensor] = {}
        self._global_batch = config.train.batch_size
        self._cache = SampleCache() if config.train.cache_frozen and self.frozen is not None else None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer moves, in a fixed order."""
        return [p for p in (*self.model.image.parameters(), self.model.text_projection) if p.requires_grad]

    @property
    def text_parameters(self) -> list[torch.nn.Parameter]:
        """Those of :attr:`parameters` that belong to the text side."""
        return [p for p in (self.model.text_projection,) if p.requires_grad]

    def __call__(
        self,
        image_BCHW: Tensor,
        label_B: Tensor,
        seeds: Sequence[int],
        progress: float,
        keys: Sequence[str] | None = None,
    ) -> StepOutput:
        """Attack the batch and compute the loss.

        Args:
            image_BCHW: float pixels in [0, 1].
            label_B: class indices.
            seeds: one per sample, for the attack's random start.
            progress: of training, in [0, 1].
            keys: of the samples, for what is kept by sample; without them nothing is kept.
        """
        text_CD = self.text0_CD  # a constant unless the text side is tuned
        if self.objective.tunes_text:
            text_CD = self.model.class_embeddings(self.features_CKE)
        images: dict[View, Tensor] = {"clean": image_BCHW, "frozen_clean": image_BCHW}
        if "extra" in self.objective.views:
            images["extra"] = self.objective.extra_image(image_BCHW)

        def make_view(view: View) -> ImageFeatures:
            assert view in self.objective.views, f"{self.objective.config.name} reads {view} without declaring it"
            tokens = self.objective.needs_tokens
            if view in FROZEN_VIEWS:
                return self._see_frozen(images[view], tokens)
            if view == "start":
                # Normally the attack has left it; one without a step sees nothing, and ends where it starts.
                with torch.no_grad(), input_gradients_only(self.model.image):
                    return self.model.encode_image(images["adv"], tokens)
            assert not attacking, f"{self.objective.config.name} reads {view} in its attack: name it in attack_views"
            if view == "clean_fixed":
                with torch.no_grad():
                    return self.model.encode_image(image_BCHW, tokens)
            return self.model.encode_image(images[view], tokens)

        def cached_per_sample(name: str, of: PerSample) -> Tensor:
            assert self._cache is not None
            assert keys is not None
            tokens = self.objective.needs_tokens
            return self._cache.get(
                name, keys, lambda rows: of(self._see_frozen(image_BCHW[rows], tokens), label_B[rows])
            )

        ctx = StepContext(
            label_B,
            self.model.logit_scale,
            text_CD,
            self.text0_CD,
            self.duplicate_CC,
            make_view,
            progress,
            self.extra_text_CD,
            self._constants,
            self._global_batch,
            None if self._cache is None or keys is None else cached_per_sample,
        )
        scalars: dict[str, Tensor] = {}
        attacking = False
        if self.objective.needs_attack:
            for view in sorted(self.objective.attack_views):
                getattr(ctx, view)
            attacking = True
            attacked = self._attack(ctx, image_BCHW, seeds, progress)
            attacking = False
            images["adv"] = images["frozen_adv"] = attacked.image_BCHW
            scalars["train/zero_grad_frac"] = attacked.zero_grad_B.double().mean()
        loss = self.objective.loss(ctx)
        scalars["train/loss"] = loss.total
        scalars |= {f"train/term/{name}": term for name, term in loss.terms.items()}
        for view, name in (("adv", "adv_acc"), ("clean", "clean_acc"), ("clean_fixed", "clean_acc")):
            if view in self.objective.views and self.objective.uses_classes:
                embed_BD = getattr(ctx, view).embed_BD.detach()
                scalars[f"train/{name}"] = (ctx.logits(embed_BD).argmax(-1) == label_B).double().mean()
        return StepOutput(loss, scalars)

    def _see_frozen(self, image_BCHW: Tensor, tokens: bool) -> ImageFeatures:
        assert self.frozen is not None
        # torch's attention for inference rounds otherwise than the one that is trained: a distance to what the tower began as
        # would not begin at zero, and one that is not squared would pull with its full gradient.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad():
                features: ImageFeatures = self.frozen(image_BCHW, tokens)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        return features

    @torch.no_grad()
    def _constant_text(self, features_CKE: Tensor) -> Tensor:
        return self.model.class_embeddings(features_CKE).clone()

    def _attack(self, ctx: StepContext, image_BCHW: Tensor, seeds: Sequence[int], progress: float) -> AttackResult:
        def loss(image_BCHW: Tensor) -> Tensor:
            features = self.model.encode_image(image_BCHW)
            if "start" in self.objective.views:
                ctx.keep_start(features)
            return self.objective.attack_loss(ctx, features)

        modules = [self.model.image] if self.frozen is None else [self.model.image, self.frozen]
        with input_gradients_only(*modules):
            return self.attack.perturb(loss, image_BCHW, seeds, progress)

    def _copy_frozen(self) -> ImageTower | None:
        if not self.objective.views & FROZEN_VIEWS:
            return None
        return self.model.image.pretrained_copy()


def duplicates(text_CD: Tensor) -> Tensor:
    """Bool ``[C, C]``: pairs of different classes whose embeddings coincide, as those of equal prompts do."""
    same_CC = (2 - 2 * text_CD @ text_CD.T) < 1e-6
    same_CC.fill_diagonal_(False)
    return same_CC
