"""The attack that knows the defence: its gradient through TTC by finite differences, its expectation, gate term and budget.

Shapes: B images, C channels (or classes, in logits), D embedding width, H x W pixels.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_clip import tiny_clip
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zsr.attacks.adaptive import Adaptive, AdaptiveConfig
from zsr.attacks.base import input_gradients_only
from zsr.attacks.noise import derived_seeds, fill_uniform, sample_seeds
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.attacks.square import Square, SquareConfig
from zsr.config import ATTACKS, ModelConfig
from zsr.data.pipeline import eval_batches
from zsr.data.shards import ShardSet
from zsr.defenses.ttc import TTC, TTCConfig
from zsr.engine.quick_eval import ZeroShotHead
from zsr.eval import DefendedCLIP
from zsr.models import ImageFeatures, TextBank, load_model

torch.set_num_threads(1)

ALWAYS = 1e9
CLASSES = ["cat", "dog", "tree"]


class DoubleTower:
    """An image tower in float64, without fused attention: exact enough for finite differences of its gradient."""

    def __init__(self, tower) -> None:
        self.visual = copy.deepcopy(tower.visual).double().eval().requires_grad_(False)
        self.mean, self.std = tower.mean.double(), tower.std.double()

    def __call__(self, image_BCHW: Tensor) -> ImageFeatures:
        with sdpa_kernel(SDPBackend.MATH):
            pooled = self.visual((image_BCHW - self.mean) / self.std)
        raw_BD = pooled[0] if isinstance(pooled, tuple) else pooled
        return ImageFeatures(F.normalize(raw_BD, dim=-1), raw_BD)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("victim"), seed=0).eval()


@pytest.fixture(scope="module")
def victim(clip):
    return DoubleTower(clip.image)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    return DoubleTower(tiny_clip(tmp_path_factory.mktemp("frozen"), seed=1).image)


@pytest.fixture(scope="module")
def image() -> Tensor:
    """Pixels in [0, 1], a good share of them exactly at an end, where the box cuts."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand((4, 3, 32, 32), dtype=torch.float64, generator=generator) * 1.3 - 0.15).clamp(0, 1)


@pytest.fixture(scope="module")
def noise(image) -> Tensor:
    return fill_uniform(image, [11, 12, 13, 14])


def pull(victim, anchor: Tensor, point: Tensor) -> Tensor:
    """Gradient of the squared distance from the anchor, as a plain number: nothing goes back through it."""
    point = point.detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(((victim(point).raw_BD - anchor.detach()) ** 2).sum(), point)
    return grad


def tau_of(gate, image: Tensor, delta: Tensor) -> float:
    with torch.no_grad():
        plain, noisy = gate(image).raw_BD, gate(image + delta).raw_BD
    return math.sqrt(((noisy - plain) ** 2).sum()) / math.sqrt((plain**2).sum())


class Smooth:
    """METHODS 4.1 for one image with its cuts replaced by the identity and its sign by the straight line through zero that fits
    it best, both plus constants, chosen so that at ``image`` it gives what TTC gives there. Its slope, which finite differences
    can measure, is what BPDA calls TTC's."""

    def __init__(self, victim, gate, image: Tensor, noise: Tensor, config: TTCConfig) -> None:
        self.victim, self.gate, self.config = victim, gate, config

        def cut(delta: Tensor) -> Tensor:
            delta = delta.clamp(min=-config.eps).clamp(max=config.eps)
            return torch.minimum(torch.maximum(delta, 0 - image), 1 - image)

        self.start = cut(config.eps * noise)
        anchor, path = victim(image).raw_BD, [self.start]
        self.slopes: list[float] = []
        self.offsets: list[Tensor] = []
        for _ in range(config.num_steps):
            grad = pull(victim, anchor, image + path[-1])
            path.append(cut(path[-1] + config.step_size * torch.sign(grad)))
            fitted = torch.linalg.lstsq(grad.view(-1, 1), torch.sign(grad).view(-1, 1)).solution.item()
            self.slopes.append(config.step_size * fitted)
            self.offsets.append(path[-1] - path[-2] - self.slopes[-1] * grad)
        weights = [math.exp(config.beta * i) for i in range(config.num_steps + 1)]
        if tau_of(gate, image, self.start) >= config.threshold:
            weights = [1.0] + [0.0] * config.num_steps
        self.weights = [weight / sum(weights) for weight in weights]
        mixed = image + sum(weight * delta for weight, delta in zip(self.weights, path, strict=True))
        self.last_cut = mixed.clamp(0, 1) - mixed

    def __call__(self, image: Tensor) -> tuple[Tensor, float]:
        """Purified image, gate margin."""
        with torch.no_grad():
            anchor = self.victim(image).raw_BD
        path = [self.start]
        for slope, offset in zip(self.slopes, self.offsets, strict=True):
            path.append(path[-1] + slope * pull(self.victim, anchor, image + path[-1]) + offset)
        mixed = sum(weight * delta for weight, delta in zip(self.weights, path, strict=True))
        return image + mixed + self.last_cut, self.config.threshold - tau_of(self.gate, image, self.start)


@pytest.mark.parametrize("own_gate", [False, True])
@pytest.mark.parametrize(
    ("steps", "step_size"),
    [(2, 1 / 255), (3, 20 / 255)],  # the second hits the budget, so that cuts matter
)
def test_the_unrolled_gradient_is_what_finite_differences_give(
    victim, frozen, image, noise, own_gate, steps, step_size
):
    gate = frozen if own_gate else victim
    config = TTCConfig(num_steps=steps, step_size=step_size)
    taus = sorted(
        tau_of(gate, x[None], Smooth(victim, gate, x[None], u[None], config).start) for x, u in zip(image, noise)
    )
    config = config.model_copy(update={"threshold": (taus[1] + taus[2]) / 2})  # both branches in one batch
    generator = torch.Generator().manual_seed(1)
    slope, along = (torch.randn(image.shape, dtype=torch.float64, generator=generator) for _ in range(2))

    attacked = image.clone().requires_grad_(True)
    purified, margin = TTC(config).purify_differentiably(victim, gate, attacked, noise, "unrolled")
    (grad,) = torch.autograd.grad((purified * slope).sum(), attacked, retain_graph=True)
    (margin_grad,) = torch.autograd.grad(margin.sum(), attacked)
    plain = 0.0
    for i in range(len(image)):
        smooth = Smooth(victim, gate, image[i : i + 1], noise[i : i + 1], config)
        here, margin_here = smooth(image[i : i + 1])
        assert (purified[i] - here[0]).abs().max() < 1e-14
        assert margin[i].item() == pytest.approx(margin_here, abs=1e-12)
        far, near = 1e-5 * along[i : i + 1], -1e-5 * along[i : i + 1]
        (ahead, margin_ahead), (behind, margin_behind) = smooth(image[i : i + 1] + far), smooth(image[i : i + 1] + near)
        expected = (((ahead - behind) * slope[i]).sum() / 2e-5).item()
        assert (grad[i] * along[i]).sum().item() == pytest.approx(expected, rel=1e-5)
        assert (margin_grad[i] * along[i]).sum().item() == pytest.approx(
            (margin_ahead - margin_behind) / 2e-5, rel=1e-5
        )
        if margin[i] > 0:  # the counterattack's own part is there to be seen
            plain = max(plain, abs((slope[i] * along[i]).sum().item() - expected) / abs(expected))
    assert plain > 1e-3


@pytest.mark.parametrize("own_gate", [False, True])
@pytest.mark.parametrize("through", ["identity", "unrolled"])
def test_values_are_the_defences_own_and_identity_passes_gradients_by(victim, frozen, image, noise, own_gate, through):
    gate, config = frozen if own_gate else victim, TTCConfig(step_size="10/255", threshold=0.04)
    expected = TTC(config).purify(victim, gate, image, noise)
    attacked = image.clone().requires_grad_(True)
    purified, margin = TTC(config).purify_differentiably(victim, gate, attacked, noise, through)
    assert (purified - expected).abs().max() < 1e-14
    (grad,) = torch.autograd.grad((purified * noise).sum(), attacked, retain_graph=True)
    assert torch.equal(grad, noise) == (through == "identity")
    assert torch.autograd.grad(margin.sum(), attacked)[0].flatten(1).norm(dim=1).min() > 0
    no_steps, no_margin = TTC(TTCConfig(num_steps=0)).purify_differentiably(victim, gate, attacked, noise, through)
    assert torch.equal(torch.autograd.grad((no_steps * noise).sum(), attacked)[0], noise)
    assert torch.equal(no_margin, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_surrogate_goes_through_the_fast_layers_of_a_real_tower(clip, victim, image, noise, precision):
    """Fused attention and oneDNN's products have no gradient of their gradient, or need one written by hand."""
    config = TTCConfig(threshold=ALWAYS, step_size="4/255")
    head = ZeroShotHead(clip, TextBank(clip), CLASSES, ["a {}"])
    clip.image.precision = precision
    try:
        surrogate = DefendedCLIP(clip, config).surrogate(head)
        single = image.float().requires_grad_(True)
        with input_gradients_only(clip.image):
            logits, _ = surrogate(single, noise.float(), "unrolled")
            (grad,) = torch.autograd.grad(logits[:, 0].sum(), single)
            identity, _ = surrogate(single, noise.float(), "identity")
            (past,) = torch.autograd.grad(identity[:, 0].sum(), single)
        assert clip.image.precision == precision
    finally:
        clip.image.precision = "fp32"
    double = image.clone().requires_grad_(True)
    purified, _ = TTC(config).purify_differentiably(victim, victim, double, noise, "unrolled")
    expected_logits = clip.logit_scale.double() * victim(purified).embed_BD @ head.text_CD.double().T
    (expected,) = torch.autograd.grad(expected_logits[:, 0].sum(), double)
    assert (logits - expected_logits).abs().max() < 0.05
    assert F.cosine_similarity(grad.flatten(1).double(), expected.flatten(1)).min() > 0.99
    assert F.cosine_similarity(past.flatten(1).double(), expected.flatten(1)).max() < 0.97  # it could tell


# The attack itself, on a classifier of two classes in closed form whose "defence" multiplies noise into the image.


class Bent:
    """Logits and margins that depend on image and noise, row by row; remembers what it was asked."""

    def __init__(self, target: Tensor, push: float = 0.0) -> None:
        self.target, self.push = target, push
        self.images: list[Tensor] = []
        self.noises: list[Tensor] = []

    def answer(self, image_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        target_BCHW = self.target[: len(image_BCHW)] if len(self.target) >= len(image_BCHW) else self.target
        score_B = ((image_BCHW + 0.3 * noise_BCHW - target_BCHW) ** 2 * (1 + noise_BCHW)).flatten(1).sum(1)
        margin_B = 0.5 - image_BCHW.flatten(1).mean(1)
        return torch.stack([torch.sin(3 * score_B), 0 * score_B], dim=1), self.push * margin_B

    def bare(self, image_BCHW: Tensor) -> Tensor:
        return self.answer(image_BCHW, torch.zeros_like(image_BCHW))[0]

    def __call__(self, image_BCHW: Tensor, noise_BCHW: Tensor, through: str) -> tuple[Tensor, Tensor]:
        self.images.append(image_BCHW.detach().clone())
        self.noises.append(noise_BCHW.clone())
        return self.answer(image_BCHW, noise_BCHW)


def pictures(seed: int, dtype=torch.float64, num: int = 3) -> Tensor:
    return torch.rand(num, 2, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))


LABEL = torch.tensor([0, 1, 0])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@given(seed=st.integers(0, 2**32), eps=st.sampled_from([0.0, 0.02, 0.9]), steps=st.integers(0, 3))
@settings(max_examples=25)
def test_eps_and_the_pixel_range_are_never_exceeded(norm, seed, eps, steps):
    image = pictures(seed)
    config = AdaptiveConfig(norm=norm, eps=eps, step_size=0.3, steps=steps, eot=2, restarts=2)
    found = Adaptive(config).attack_defended(Bent(pictures(seed + 1)), image, LABEL, [seed, 1, 2])
    delta = (found.image_BCHW - image).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= eps + 1e-14).all()
    assert found.image_BCHW.min() >= 0 and found.image_BCHW.max() <= 1
    assert not found.image_BCHW.requires_grad


def test_a_sample_is_attacked_the_same_way_in_any_batch_and_differently_with_another_seed():
    image, target = pictures(0), pictures(1, num=1)
    attack = Adaptive(AdaptiveConfig(eps=0.3, step_size=0.1, steps=4, eot=3, restarts=2))

    def run(rows: list[int], seeds: tuple[int, ...] = (7, 8, 9)) -> Tensor:
        picked = [seeds[row] for row in rows]
        return attack.attack_defended(Bent(target), image[rows], LABEL[rows], picked).image_BCHW

    together = run([0, 1, 2])
    assert torch.equal(together, run([0, 1, 2]))
    assert torch.equal(together, torch.cat([run([0]), run([1]), run([2])]))
    assert torch.equal(together[[2, 0]], run([2, 0]))
    other = run([0, 1, 2], (7, 80, 9))
    assert [torch.equal(one, two) for one, two in zip(together, other, strict=True)] == [True, False, True]


def test_the_gradient_is_the_mean_of_single_draws_new_at_each_step():
    spy, image = Bent(pictures(1), push=1.0), pictures(0) / 2 + 0.25
    config = AdaptiveConfig(norm="l2", eps=0.2, step_size=0.01, steps=2, eot=3, gate_weight=0.7, start="random")
    Adaptive(config).attack_defended(spy, image, LABEL, [7, 8, 9])
    assert len(spy.images) == 3 * 3  # draws x (steps and the last look)
    distinct = {tuple(noise.flatten()[:3].tolist()) for noise_BCHW in spy.noises for noise in noise_BCHW}
    assert len(distinct) == 9 * 3
    assert min(noise.min() for noise in spy.noises) >= -1 and max(noise.max() for noise in spy.noises) < 1
    for step in range(2):
        here, there = spy.images[3 * step], spy.images[3 * step + 3]
        grads = []
        for noise in spy.noises[3 * step : 3 * step + 3]:
            point = here.clone().requires_grad_(True)
            logits, margin = spy.answer(point, noise)
            chosen = torch.stack([row[label] for row, label in zip(logits, LABEL, strict=True)])
            loss = torch.log(torch.exp(logits).sum(1)) - chosen - 0.7 * margin.clamp(min=0)
            grads.append(torch.autograd.grad(loss.sum(), point)[0])
        mean = sum(grads) / 3
        # An L2 step from inside the ball goes along the gradient; from its surface it is projected back.
        wanted = here + 0.01 * mean / mean.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        inside = (wanted - image).flatten(1).norm(dim=1) < 0.2
        assert inside.any()
        assert (there - wanted)[inside].abs().max() < 1e-12


def test_it_starts_where_an_attack_on_the_bare_model_ends():
    spy, image, shared = Bent(pictures(1)), pictures(0), {"eps": 0.3, "step_size": 0.1, "steps": 3}
    Adaptive(AdaptiveConfig(**shared, eot=1)).attack_defended(spy, image, LABEL, [7, 8, 9])
    seeds = derived_seeds([7, 8, 9], "adaptive", 0)
    found = PGD(PGDConfig(**shared)).attack_classifier(spy.bare, image, LABEL, seeds)
    assert (spy.images[0] - found.image_BCHW).abs().max() < 1e-14
    at_random = PGD(PGDConfig(**{**shared, "steps": 0})).attack_classifier(spy.bare, image, LABEL, seeds).image_BCHW
    spy.images.clear()
    Adaptive(AdaptiveConfig(**shared, eot=1, start="random")).attack_defended(spy, image, LABEL, [7, 8, 9])
    assert (spy.images[0] - at_random).abs().max() < 1e-14 < (at_random - found.image_BCHW).abs().max()


def test_the_image_that_fools_most_draws_is_kept():
    spy, image = Bent(pictures(1)), pictures(0)
    config = AdaptiveConfig(eps=0.3, step_size=0.2, steps=4, eot=5, restarts=2)
    found = Adaptive(config).attack_defended(spy, image, LABEL, [7, 8, 9])
    looks = []  # of each point: (draws fooled, mean loss, image) by sample
    for first in range(0, len(spy.images), 5):
        logits = [spy.answer(spy.images[first], noise)[0] for noise in spy.noises[first : first + 5]]
        wrong = sum((one.argmax(1) != LABEL).long() for one in logits)
        ce = sum(F.cross_entropy(one, LABEL, reduction="none") for one in logits) / 5
        looks.append([(int(w), float(loss), row) for w, loss, row in zip(wrong, ce, spy.images[first], strict=True)])
    assert len(looks) == 2 * 5
    for sample in range(3):
        fooled, _, best = max((look[sample] for look in looks), key=lambda look: look[:2])
        assert (found.image_BCHW[sample] - best).abs().max() < 1e-14
        assert bool(found.success_B[sample]) == (fooled > 2.5)
    assert not torch.equal(found.image_BCHW, spy.images[-1])


def test_the_gate_term_leads_out_of_the_region_where_the_defence_acts():
    class OnlyGate(Bent):
        def answer(self, image_BCHW, noise_BCHW):
            logits, margin = super().answer(image_BCHW, noise_BCHW)
            return 0 * logits, margin

    image = torch.cat([0.3 * torch.ones(2, 2, 4, 4), 0.9 * torch.ones(1, 2, 4, 4)]).double()  # the last is outside
    spy = OnlyGate(pictures(1), push=1.0)
    config = AdaptiveConfig(eps=0.1, step_size=0.05, steps=4, eot=1, start="random")
    found = Adaptive(config).attack_defended(spy, image, LABEL, [7, 8, 9])
    assert (spy.images[-1][:2] - image[:2] - 0.1).abs().max() < 1e-12  # as far towards the gate's edge as eps allows
    assert torch.equal(spy.images[-1][2], spy.images[0][2])
    assert found.zero_grad_B.tolist() == [False, False, True]
    without = Adaptive(config.model_copy(update={"gate_weight": 0.0}))
    assert without.attack_defended(spy, image, LABEL, [7, 8, 9]).zero_grad_B.all()


def test_on_ttc_the_gate_term_makes_features_move_more_under_noise(clip, image):
    """With equal class vectors cross-entropy is flat, and the gate term alone moves the image."""
    head = ZeroShotHead(clip, TextBank(clip), CLASSES, ["a {}"])
    head.text_CD = torch.zeros_like(head.text_CD)
    surrogate, asked = DefendedCLIP(clip, TTCConfig(threshold=ALWAYS)).surrogate(head), []

    class Spy:
        bare = staticmethod(surrogate.bare)

        def __call__(self, image_BCHW, noise_BCHW, through):
            asked.append(image_BCHW.detach())
            return surrogate(image_BCHW, noise_BCHW, through)

    single, fixed = image.float(), fill_uniform(image.float(), [1, 2, 3, 4])
    config = AdaptiveConfig(eps="48/255", step_size="12/255", steps=4, eot=2, through="identity", start="random")
    with input_gradients_only(clip.image):
        Adaptive(config).attack_defended(Spy(), single, torch.zeros(4, dtype=torch.long), [5, 6, 7, 8])

    def tau(image_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            plain, noisy = clip.image(image_BCHW).raw_BD, clip.image((image_BCHW + fixed * 4 / 255).clamp(0, 1)).raw_BD
        return (noisy - plain).norm(dim=1) / plain.norm(dim=1)

    assert (tau(asked[-1]) > 1.2 * tau(asked[0])).all()


def test_who_knows_the_defence_makes_it_lose_more_than_who_does_not():
    model = load_model(ModelConfig(name="zsr:emoji-vit")).eval()
    shards = ShardSet("zsr:emoji/train")
    head = ZeroShotHead(model, TextBank(model), shards.classes, shards.templates[:1])
    (batch,) = eval_batches(shards, image_size=64, batch_size=16, num_samples=16)
    image, label, seeds = batch.image.float() / 255, batch.label, sample_seeds(batch.key, "eval", 0)
    defended = DefendedCLIP(model, TTCConfig())

    def right(image_BCHW: Tensor, keys: list[str]) -> Tensor:
        return head.logits(defended.encode_image(image_BCHW, keys).embed_BD).argmax(1) == label

    def loss(image_BCHW: Tensor) -> Tensor:
        """Mean cross-entropy of the defended model over noise that no attack has seen."""
        draws = [
            head.logits(defended.encode_image(image_BCHW, [f"{draw} {key}" for key in batch.key]).embed_BD)
            for draw in range(6)
        ]
        return sum(F.cross_entropy(logits_BC, label, reduction="none") for logits_BC in draws) / 6

    with input_gradients_only(model.image):
        shared = {"eps": "4/255", "step_size": "1/255", "steps": 6}
        oblivious = PGD(PGDConfig(**shared)).attack_classifier(head, image, label, seeds).image_BCHW
        rows = (right(image, batch.key) & right(oblivious, batch.key)).nonzero().flatten()[:6]
        assert len(rows) >= 4  # the defence helps against those who do not know it
        knowing = oblivious.clone()
        knowing[rows] = (
            Adaptive(AdaptiveConfig(**shared, eot=2))
            .attack_defended(defended.surrogate(head), image[rows], label[rows], [seeds[row] for row in rows.tolist()])
            .image_BCHW
        )
    assert loss(knowing)[rows].mean() > 1.2 * loss(oblivious)[rows].mean()
    assert right(knowing, batch.key)[rows].sum() < len(rows)


def test_scores_are_the_defended_logits_and_square_can_use_them(clip, image):
    head, config = ZeroShotHead(clip, TextBank(clip), CLASSES, ["a {}"]), TTCConfig(threshold=ALWAYS)
    defended, single = DefendedCLIP(clip, config), image.float()
    scores = defended.scores(head, draws=2, seed=3)
    together = scores(single)
    assert torch.allclose(together, torch.cat([scores(single[:1]), scores(single[1:])]), atol=1e-4)
    seeds = sample_seeds(["0", "1"], "defense scores", 3)
    each = []
    for seed in seeds:
        noise = fill_uniform(single[:1], [seed]).expand_as(single)
        each.append(head(TTC(config).purify(clip.image, clip.image, single, noise)))
    assert torch.allclose(together, sum(each) / 2, atol=1e-4)
    assert not torch.allclose(each[0], each[1], atol=1e-2)
    label = together.argmax(1)
    found = Square(SquareConfig(eps="32/255", queries=20)).attack_classifier(scores, single, label, [1, 2, 3, 4])
    assert torch.equal(scores(found.image_BCHW).argmax(1) != label, found.success_B)


def test_without_a_defence_it_says_that_it_needs_one(image):
    attack = ATTACKS.build(ATTACKS.config_class("adaptive")())
    with pytest.raises(ValueError, match=r"attack.name=adaptive: .* evaluate with --defense ttc"):
        attack.attack_classifier(lambda x: x, image, LABEL, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="--defense ttc"):
        attack.perturb(lambda x: x, image, [1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"step_size=4 is more than the whole pixel range"):
        AdaptiveConfig(step_size=4)
