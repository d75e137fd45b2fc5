"""Ultralytics' data set, without what it writes beside the user's pictures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ultralytics.data import dataset as ultralytics_dataset
from ultralytics.data.dataset import YOLODataset

from focusdd_det.errors import ConfigError, DataError

_NOWHERE = Path(os.devnull) / "no.npy"  # where nothing can be
_END, _PADDING = b"\xff\xd9", 1 << 16  # how a JPEG ends, and how many bytes may stand behind that


@contextlib.contextmanager
def no_label_cache() -> Iterator[None]:
    """Inside, Ultralytics writes no labels.cache."""

    def keep_in_memory(prefix: str, path: Path, x: dict[str, Any], version: str) -> None:
        x["version"] = version

    before = ultralytics_dataset.save_dataset_cache_file
    ultralytics_dataset.save_dataset_cache_file = keep_in_memory
    try:
        yield
    finally:
        ultralytics_dataset.save_dataset_cache_file = before


def refuse_cut_jpegs(files: Iterable[str], rewritten: bool = True) -> None:
    """Refuse JPEGs that do not end as they should.

    Args:
        rewritten: Ultralytics' own scan follows, which would "restore" them by writing over the originals; then bytes
            after the end marker are refused, too. Otherwise a padding of zeros or line ends is let pass.

    Raises:
        DataError: naming the first such file.
    """
    for name in files:
        with Path(name).open("rb") as file:
            jpeg = file.read(2) == b"\xff\xd8"
            size = file.seek(0, 2)
            file.seek(max(0, size - _PADDING))
            end = file.read()
        if size and (not jpeg or end.endswith(_END)):
            continue
        if not end.rstrip(b"\x00\r\n ").endswith(_END):
            raise DataError(
                f"{name} is cut short ({size} bytes, no JPEG end marker); replace it or take it out of the data"
            )
        if rewritten:
            raise DataError(
                f"{name} has bytes after its JPEG end marker, so Ultralytics would write over it; save the picture "
                "anew, or take it out of the data"
            )


class CleanDataset(YOLODataset):  # type: ignore[misc]
    """A YOLO data set that leaves its folder as it is: label caches (pickles) are neither read nor written.

    Raises:
        DataError: a JPEG that is cut short, which Ultralytics would rewrite.

    Attributes:
        dropped: messages about pictures or labels that Ultralytics left out or complained about.
        missing_labels: number of pictures without a label file.
    """

    def _load_or_scan_cache(self, cache_path: Path, cache_hash: str) -> tuple[dict[str, Any], bool]:
        refuse_cut_jpegs(self.im_files)
        with no_label_cache():
            cache: dict[str, Any] = self.cache_labels(cache_path)
        self.dropped = [str(message) for message in cache["msgs"]]
        self.missing_labels = int(cache["results"][1])
        return cache, False

    def load_image(self, i: int, *args: Any, **kwargs: Any) -> Any:
        """As in Ultralytics, but from the picture itself: an .npy beside it is the user's, no cache to read or mend."""
        self.npy_files[i] = _NOWHERE
        return super().load_image(i, *args, **kwargs)

    def cache_images_to_disk(self, i: int) -> None:
        """Refused: it would write beside the pictures."""
        raise ConfigError("cache=disk writes beside the pictures; give cache=ram, or leave it out")

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """As in Ultralytics, on a copy of the pixels: colour jitter writes into them and they may be
        cached."""
        label: dict[str, Any] = super().get_image_and_label(index)
        label["img"] = label["img"].copy()
        return label
