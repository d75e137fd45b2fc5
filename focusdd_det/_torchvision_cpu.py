"""Lets a CUDA build of torchvision import on a CPU build of torch.

torchvision's wheels from the package index are built for CUDA. On a CPU torch their compiled operators do not load and
`import torchvision` fails with "operator torchvision::nms does not exist" (pytorch/vision#9077). The two operators that
the import needs are declared here and nms is given a plain implementation. Everywhere else this does nothing.
"""

from __future__ import annotations

import sys
from typing import Any

_registrations: list[Any] = []  # torch.library removes an operator when its Library object is collected


def ensure_torchvision() -> bool:
    """Import torchvision, repairing it first where it is a CUDA build on a CPU torch.

    Returns:
        True if the repair was needed. Idempotent.

    Raises:
        ImportError, RuntimeError: whatever torchvision raises for any other reason.
    """
    import torch

    if _registrations:
        return True
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or torch.version.cuda is not None:
            raise
    else:
        return False
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")
    _registrations.append(library)
    import torchvision

    torchvision.ops.nms = _nms
    return True


def _nms(dets: Any, scores: Any, iou_threshold: float) -> Any:
    """Greedy non-maximum suppression: boxes [n, 4] as x1 y1 x2 y2, scores [n] -> kept indices, best first."""
    import numpy as np
    import torch

    from focusdd_det.labels import nms

    order = torch.argsort(scores, descending=True, stable=True)
    boxes = dets[order].double().cpu().numpy()
    return order[torch.from_numpy(nms(boxes, np.zeros(len(boxes), np.int64), iou_threshold))]
