"""RobustCLIP around open_clip, cached class prompts, loading and export."""

from zsr.models.anchors import class_embeddings
from zsr.models.clip import RobustCLIP, load_model
from zsr.models.export import export_open_clip
from zsr.models.text import TextBank
from zsr.models.tower import ImageFeatures, ImageTower, in_precision

__all__ = [
    "ImageFeatures",
    "ImageTower",
    "RobustCLIP",
    "TextBank",
    "class_embeddings",
    "export_open_clip",
    "in_precision",
    "load_model",
]
