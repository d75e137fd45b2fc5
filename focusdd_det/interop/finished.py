"""A finished set, read part by part: no byte is passed on that its manifest does not vouch for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from focusdd_det import detset, disk
from focusdd_det.detset import Item
from focusdd_det.disk import file_sha256, sha256
from focusdd_det.errors import DataError, VerifyError


@dataclass(frozen=True)
class FinishedSet:
    """A set whose description is what COMPLETE says.

    Attributes:
        folder: where it lies.
        task: detect or classify.
        names: its classes, in order.
        manifest_sha256: stands for the whole set.
    """

    folder: Path
    task: str
    names: tuple[str, ...]
    manifest_sha256: str

    def items(self) -> Iterator[Item]:
        """The composites in plan order, a line of the manifest at a time.

        Raises:
            VerifyError: a line that is damaged, or contradicts data.yaml.
        """
        parts = set(detset.TASKS[self.task])
        for item in detset.read_manifest(self.folder):
            known = item.class_index < len(self.names) and self.names[item.class_index] == item.class_name
            if set(item.sha256) != parts or not known:
                raise VerifyError(f"{self.folder / 'manifest.jsonl'}: {item.id} does not fit the set; {self._advice}")
            yield item

    def read(self, part: str, item: Item) -> bytes:
        """A file of a composite.

        Raises:
            VerifyError: it is missing, or not the bytes that the manifest names.
        """
        path = detset.part_path(self.folder, part, item)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise VerifyError(f"cannot read {path}: {error.strerror}; {self._advice}") from error
        if sha256(data) != item.sha256[part]:
            raise VerifyError(f"{path}: not the bytes that the manifest names; {self._advice}")
        return data

    @property
    def _advice(self) -> str:
        return f"`focusdd verify {self.folder}` says what is damaged; its build with --resume repairs it"


def open_set(folder: Path) -> FinishedSet:
    """Open a set for reading.

    Raises:
        DataError: no set of ours.
        VerifyError: an unfinished one, or one whose description is damaged.
    """
    task = detset.task_of(folder)
    if task is None:
        raise DataError(f"{folder} is not a distilled set of this program (no build.yaml of one); give a set's folder")
    if folder.name.endswith(disk.INCOMPLETE) or not (folder / "COMPLETE").is_file():
        raise VerifyError(f"{folder} is a set whose build has not finished; run the build again, it goes on")
    try:
        seal = json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))
        found = {name: file_sha256(folder / name) for name in detset.HASHED}
    except (OSError, ValueError, RecursionError) as error:
        raise VerifyError(f"{folder} cannot be read: {error}; get the set again") from error
    for name, digest in found.items():
        if not isinstance(seal, dict) or seal.get(name) != digest:
            raise VerifyError(
                f"{folder / name}: not the bytes that COMPLETE names; `focusdd verify {folder}` says what is damaged"
            )
    return FinishedSet(folder, task, tuple(detset.read_data_yaml(folder)), found["manifest.jsonl"])
