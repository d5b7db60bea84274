"""Let torchvision be imported where its compiled part does not load.

PyPI's torchvision is built for CUDA. Beside a torch without CUDA its operators are missing, and the
import fails: "operator torchvision::nms does not exist". timm, torchmetrics (for Lightning) and
transformers import it too. No recipe uses these operators, so declaring them is enough.
"""

import importlib.util
from pathlib import Path

import torch


def mend():
    """Declare the operators that the import looks up, if torchvision is there and broken."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library  # the operators go when it goes
    return None


LIBRARY = mend()
