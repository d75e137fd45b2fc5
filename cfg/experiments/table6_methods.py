"""The rows of table6.yaml that are no methods of their own elsewhere: FocusDD with one part after the other."""

from __future__ import annotations

from typing import Any

from focusdd_det.compose import middle_square
from focusdd_det.methods import METHODS, register
from focusdd_det.types import Crop, View

RandomCrops: Any = type(METHODS["random"])
FocusDD: Any = type(METHODS["focusdd"])


class WholeComposites(RandomCrops):
    """+CF: every cell a whole random picture."""

    def crop(self, view: View, *_: Any, **__: Any) -> Crop:
        return middle_square(view.width, view.height)


class CropsAndBackground(RandomCrops):
    """+ABI: n_key random crops; the other cells are whole random pictures."""

    all_keys = False


class KeyPatchesUnranked(FocusDD):
    """+EKP: key patches of random sources, and random backgrounds."""

    def order(self, candidates: Any, config: Any, group: str) -> Any:
        return METHODS["random"].order(candidates, config, group)

    def backgrounds(self, candidates: Any, config: Any, group: str) -> Any:
        return METHODS["random"].backgrounds(candidates, config, group)


register("whole_composites", WholeComposites())
register("crops_and_background", CropsAndBackground())
register("key_patches_unranked", KeyPatchesUnranked())
