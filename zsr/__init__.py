"""zsr: fine-tune CLIP so that zero-shot classification survives adversarial perturbation."""

from zsr import _torchvision

__version__ = "0.1.0"

_torchvision.install()
