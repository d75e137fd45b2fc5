"""Class folders and archives."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from focusdd_det.errors import DataError
from focusdd_det.sources import Located, Root, folder_names, locate, stream

MAP = {"n1": "dog", "n2": "cat"}


def write_folders(top: Path) -> dict[str, bytes]:
    content = {"n1/a.JPEG": b"a1", "n1/deep/b.jpg": b"b1", "n2/c.png": b"c2", "n3/d.jpg": b"d3", "n1/notes.txt": b"no"}
    for name, data in content.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)
    return content


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def seen(root: Root) -> dict[str, tuple[str, str, bytes]]:
    return {s.source.path: (s.source.folder, s.source.group, s.read()) for s in stream(root)}


def test_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path)
    root = Root("r", tmp_path, MAP)
    assert folder_names(root) == {"n1", "n2", "n3"}
    assert seen(root) == {
        "n1/a.JPEG": ("n1", "dog", b"a1"),
        "n1/deep/b.jpg": ("n1", "dog", b"b1"),
        "n2/c.png": ("n2", "cat", b"c2"),
    }
    assert {s.source.path for s in stream(root, {"n2"})} == {"n2/c.png"}


def test_what_lies_in_class_folders(tmp_path: Path) -> None:
    """Hidden files are not looked at, links are followed (but not back up), `!` is a letter like others."""
    files = {
        "n1/wow!/a!.jpg": b"a",
        "n1/b.JFIF": b"b",
        "n1/._b.jpg": b"no",
        "n1/.cache/c.jpg": b"no",
        "far/d.jpg": b"d",
    }
    for name, data in files.items():
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(data)
    (tmp_path / "top" / "n1" / "more").symlink_to(tmp_path / "top" / "far")
    (tmp_path / "top" / "far" / "back").symlink_to(tmp_path / "top" / "n1")
    (tmp_path / "top" / "n1" / "round").symlink_to(tmp_path / "top" / "n1")
    root = Root("r", tmp_path / "top", MAP)
    found = seen(root)
    assert {path: data for path, (_, _, data) in found.items()} == {
        "n1/wow!/a!.jpg": b"a", "n1/b.JFIF": b"b", "n1/more/d.jpg": b"d",
    }  # fmt: skip
    for located in stream(root):
        s = located.source
        assert locate(root, s.path, s.folder, s.group, None, located.size, 0).read() == found[s.path][2]
    write_tar(tmp_path / "all.tar", {f"./{name}": data for name, data in files.items()})
    assert set(seen(Root("r", tmp_path / "all.tar", {"wow!": "dog", "n1": "dog"}))) == {
        "./n1/wow!/a!.jpg",
        "./n1/b.JFIF",
    }


def test_a_tar_whose_innermost_folders_are_no_classes_is_refused(tmp_path: Path) -> None:
    """Tiny-ImageNet as it is published: <class>/images/*.JPEG."""
    write_tar(tmp_path / "tiny.tar", {"n1/images/a.JPEG": b"a", "n2/images/b.JPEG": b"b"})
    with pytest.raises(DataError, match="folders called images lie below n1 and n2"):
        folder_names(Root("r", tmp_path / "tiny.tar", {}))


def test_a_tar_a_class_as_imagenet_ships_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "n1.tar", {"n1_1.JPEG": b"one", "n1_2.JPEG": b"two"})
    write_tar(tmp_path / "n3.tar", {"n3_1.JPEG": b"three"})
    root = Root("r", tmp_path, MAP)
    assert folder_names(root) == {"n1", "n3"}
    assert seen(root) == {"n1.tar!n1_1.JPEG": ("n1", "dog", b"one"), "n1.tar!n1_2.JPEG": ("n1", "dog", b"two")}


def test_one_tar_of_tars_is_read_in_place(tmp_path: Path) -> None:
    inner = {"n1.tar": tar_bytes({"n1_1.JPEG": b"one"}), "n2.tar": tar_bytes({"n2_1.JPEG": b"other"})}
    write_tar(tmp_path / "train.tar", inner)
    root = Root("r", tmp_path / "train.tar", MAP)
    assert folder_names(root) == {"n1", "n2"}
    assert seen(root) == {"n1.tar!n1_1.JPEG": ("n1", "dog", b"one"), "n2.tar!n2_1.JPEG": ("n2", "cat", b"other")}


def test_one_tar_of_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", {"train/n1/a.jpg": b"a", "train/n9/b.jpg": b"b"})
    assert seen(Root("r", tmp_path / "t.tar", MAP)) == {"train/n1/a.jpg": ("n1", "dog", b"a")}


@pytest.mark.parametrize("name", ["train.tar", "folders"])
def test_a_source_is_found_again_from_what_is_kept_of_it(name: str, tmp_path: Path) -> None:
    if name == "folders":
        write_folders(tmp_path / name)
    else:
        write_tar(tmp_path / name, {"n1.tar": tar_bytes({"a.JPEG": b"a", "b.JPEG": b"b"})})
    root = Root("r", tmp_path / name, MAP)
    found = list(stream(root))
    assert found
    for s in found:
        again = locate(root, s.source.path, s.source.folder, s.source.group, s.offset, s.size, s.mtime_ns)
        assert again == Located(s.source, s.file, s.size, s.mtime_ns, s.offset)
        assert again.read() == s.read()


def test_what_cannot_be_a_picture_comes_with_its_problem(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "n1" / "x.JPEG").mkdir()
    (tmp_path / "n1" / "loop.jpg").symlink_to("loop.jpg")
    problems = {s.source.path: s.problem for s in stream(Root("r", tmp_path, MAP)) if s.problem}
    assert set(problems) == {"n1/x.JPEG", "n1/loop.jpg"}
    assert "folder" in str(problems["n1/x.JPEG"])


def test_archive_members_that_lead_outside_are_never_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "n1.tar", {"../../etc/x.jpg": b"x", "/abs.jpg": b"y", "fine.jpg": b"z"})
    found = {s.source.path: s.problem for s in stream(Root("r", tmp_path, MAP))}
    assert found["n1.tar!fine.jpg"] is None
    assert "outside" in str(found["n1.tar!../../etc/x.jpg"])
    assert "outside" in str(found["n1.tar!/abs.jpg"])


def test_a_root_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read source folder"):
        folder_names(Root("r", tmp_path / "absent", MAP))
    (tmp_path / "x.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(DataError, match="not an uncompressed tar"):
        folder_names(Root("r", tmp_path / "x.tar", MAP))


def test_a_member_that_was_cut_off_is_an_error_not_a_short_picture(tmp_path: Path) -> None:
    write_tar(tmp_path / "n1.tar", {"a.jpg": b"x" * 5000})
    only = next(iter(stream(Root("r", tmp_path, MAP))))
    with (tmp_path / "n1.tar").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(OSError, match="ends inside"):
        only.read()
