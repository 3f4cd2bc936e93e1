"""Make ``import torchvision`` work beside a CPU build of torch; do nothing beside a matching torchvision.

open_clip imports torchvision for its transforms. The torchvision wheel on PyPI is linked against CUDA torch, so beside
CPU torch its operator library ``_C.so`` cannot be loaded, and then ``import torchvision`` dies with "operator
torchvision::nms does not exist": it registers fake kernels for operators whose schemas were never defined. Defining the
two schemas first is enough (nothing in zsr calls the operators).

``import zsr`` installs one import hook, so every process that uses zsr is covered, Ray workers included: their function
is unpickled from a ``zsr`` module. The hook acts when torchvision is about to be imported, so ``import zsr`` stays free
of torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: object | None = None  # torch drops the schemas when the Library object dies


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Define the missing schemas just before torchvision is imported, then step aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
            if spec is not None and spec.origin is not None:
                define_missing_schemas(Path(spec.origin).parent)
        return None


def define_missing_schemas(torchvision_folder: Path) -> bool:
    """Define torchvision's operator schemas if its own library cannot; return whether that was needed."""
    global _library
    import torch

    if _library is not None or _operators_load(torchvision_folder):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS.values():
        library.define(schema)
    _library = library
    return True


def _operators_load(torchvision_folder: Path) -> bool:
    import torch

    for file in (*torchvision_folder.glob("_C*.so"), *torchvision_folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(file))  # loading it again from torchvision itself is harmless
        except OSError:
            return False
    # Without a library file the operators may still be there (linked in statically).
    return all(hasattr(torch.ops.torchvision, name) for name in _SCHEMAS)


def install() -> None:
    """Install the hook once, ahead of the ordinary finders."""
    if "torchvision" in sys.modules or any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _BeforeTorchvision())
