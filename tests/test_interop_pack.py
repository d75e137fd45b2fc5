"""One tar and back: the same bytes, and nothing from an archive that was not in a set."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from class_data import write_class_set
from conftest import REPOSITORY
from interop_support import det_set, rename_classes, store, tree, with_gallery

from focusdd_det.cli import main
from focusdd_det.detset import verify
from focusdd_det.errors import ConfigError, DataError, DiskError, FocusDDError, VerifyError
from focusdd_det.interop import pack as pack_module
from focusdd_det.interop.pack import contents, pack, unpack

MAKERS: dict[str, Callable[[Path], Path]] = {"detect": det_set, "classify": write_class_set, "store": store}


@pytest.fixture(scope="module", params=list(MAKERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = MAKERS[request.param](tmp_path_factory.mktemp("pack") / "thing")
    return made if request.param == "store" else with_gallery(made)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_gallery(det_set(tmp_path_factory.mktemp("one") / "set", count=2))


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    digest = pack(folder, tmp_path / "a.tar")
    assert hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest() == digest
    assert (tmp_path / "a.tar.sha256").read_text() == f"{digest}  a.tar\n"
    assert (tmp_path / "a.tar").stat().st_size == contents(folder).size
    unpack(tmp_path / "a.tar", tmp_path / "back")
    expected = {name: data for name, data in tree(folder).items() if not name.endswith("log.json")}
    assert tree(tmp_path / "back") == expected
    if not (folder / "store.json").exists():
        assert verify(tmp_path / "back") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.sha256", "back"]


def test_the_same_set_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "another name")
    for path in sorted(moved.rglob("*"), reverse=True):
        os.utime(path, (1, 1))
        if path.is_file():
            path.chmod(0o600)
    logs = [name for name in ("build.log.json", "store.log.json") if (moved / name).exists()]
    for name in logs:
        (moved / name).write_text("another machine")
    assert pack(folder, tmp_path / "a.tar") == pack(moved, tmp_path / "b.tar")


def test_the_archive_is_a_plain_tar(one: Path, tmp_path: Path) -> None:
    """Anybody's tar opens it, and sha256sum understands the list."""
    pack(one, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
        archive.extractall(tmp_path / "plain", filter="data")
    assert members[0].name == "SHA256SUMS"
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    assert verify(tmp_path / "plain" / "set") == []
    for line in (tmp_path / "plain" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "plain" / name).read_bytes()).hexdigest() == digest


def test_long_and_foreign_names(tmp_path: Path) -> None:
    names = ("étoile bleue " * 6, "n" * 120)
    folder = with_gallery(rename_classes(write_class_set(tmp_path / "set", names=("a", "b")), names))
    pack(folder, tmp_path / "a.tar")
    unpack(tmp_path / "a.tar", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)


def holds_a_gallery(archive: Path) -> bool:
    with tarfile.open(archive) as file:
        return "set/gallery.html" in file.getnames()


def test_a_gallery_of_somebody_else_s_is_not_unpacked(one: Path, tmp_path: Path) -> None:
    """A page with scripts, which no hash vouches for: neither packed, nor taken from an archive that has one."""
    folder = shutil.copytree(one, tmp_path / "set")
    (folder / "gallery.html").write_text("<script>fetch('http://x')</script>")
    pack(folder, tmp_path / "a.tar")
    assert not holds_a_gallery(tmp_path / "a.tar")
    evil = contents(folder)
    files = {**evil.files, "gallery.html": hashlib.sha256((folder / "gallery.html").read_bytes()).hexdigest()}
    pack(folder, tmp_path / "evil.tar", replace(evil, files=files))
    assert holds_a_gallery(tmp_path / "evil.tar")
    for name in ("a", "evil"):
        unpack(tmp_path / f"{name}.tar", tmp_path / name)
        assert tree(tmp_path / name) == tree(one)


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb"])
def test_names_that_no_archive_should_carry(tmp_path: Path, name: str) -> None:
    folder = rename_classes(write_class_set(tmp_path / "set", names=("a", "b")), (name, "b"))
    with pytest.raises(DataError, match="control characters"):
        contents(folder)


def test_the_log_goes_along_when_asked_for(one: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(one, tmp_path / "set")
    (folder / "build.log.json").write_text("{}")
    assert main(["pack", str(folder), f"out={tmp_path / 'a.tar'}", "log=true"]) == 0
    unpack(tmp_path / "a.tar", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)


def test_a_damaged_file_is_not_packed(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "set")
    victim = next(p for p in sorted(broken.rglob("*")) if p.suffix in (".jpg", ".safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(VerifyError, match=victim.name):
        pack(broken, tmp_path / "a.tar")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


# --- archives of enemies


def entry(name: str, data: bytes = b"x", **more: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def forge(path: Path, *members: tuple[tarfile.TarInfo, bytes], sums: str | None = None) -> Path:
    """An archive as `pack` begins one, with these members and a list that vouches for all of them."""
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {info.name}\n" for info, data in members)
    first = entry("SHA256SUMS", (lines if sums is None else sums).encode())
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in (first, *members):
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


HOSTILE = {
    "an absolute path": [entry("/etc/passwd")],
    "a way out": [entry("set/../../out.txt")],
    "a way out at once": [entry("../out.txt")],
    "not under set/": [entry("other/file")],
    "a backslash": [entry("set\\..\\x")],
    "a control character": [entry("set/a\x07b")],
    "an empty part": [entry("set//x")],
    "a symbolic link": [entry("set/a", b"", type=tarfile.SYMTYPE, linkname="/etc"), entry("set/a/b")],
    "a hard link": [entry("set/a", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
    "a device": [entry("set/a", b"", type=tarfile.CHRTYPE)],
    "a pipe": [entry("set/a", b"", type=tarfile.FIFOTYPE)],
    "a folder": [entry("set/a", b"", type=tarfile.DIRTYPE)],
    "a sparse file": [entry("set/a", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})],
    "a size in a pax header": [entry("set/a", pax_headers={"size": "99999999999"})],
    "too deep": [entry("set/a/b/c/d/e")],
    "a name too long": [entry("set/" + "n" * 300)],
    "a file and a folder of one name": [entry("set/a"), entry("set/a/b")],
    "no set at all": [entry("set/a")],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archives(tmp_path: Path, what: str) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    archive = forge(inside / "bad.tar", *HOSTILE[what])
    with pytest.raises(VerifyError, match=r"bad\.tar"):
        unpack(archive, inside / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert {p.name for p in inside.rglob("*")} <= {"bad.tar", "deep"}


def test_a_file_that_comes_twice(one: Path, tmp_path: Path) -> None:
    member = entry("set/a")
    archive = forge(tmp_path / "bad.tar", member, member, sums=f"{hashlib.sha256(b'x').hexdigest()}  set/a\n")
    with pytest.raises(VerifyError, match="comes twice"):
        unpack(archive, tmp_path / "out")


def test_a_file_that_the_list_does_not_name_and_one_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="is not in SHA256SUMS"):
        unpack(forge(tmp_path / "more.tar", entry("set/a"), sums=""), tmp_path / "out")
    with pytest.raises(VerifyError, match="1 files are missing"):
        unpack(forge(tmp_path / "less.tar", sums="0" * 64 + "  set/a\n"), tmp_path / "out")


def test_a_claim_of_more_bytes_than_there_are(one: Path, tmp_path: Path) -> None:
    pack(one, tmp_path / "a.tar")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    huge = tarfile.TarInfo("SHA256SUMS")
    huge.size = 1 << 40
    data[:512] = huge.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "bomb.tar").write_bytes(data)
    with pytest.raises(VerifyError, match="claims 1099511627776 bytes"):
        unpack(tmp_path / "bomb.tar", tmp_path / "out")


def test_no_space_is_found_out_before_anything_is_written(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(one, tmp_path / "a.tar")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(DiskError, match="needed"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    with pytest.raises(DiskError, match="needed"):
        pack(one, tmp_path / "b.tar")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.sha256"]


@pytest.mark.parametrize("where", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("beside", [True, False])
def test_any_flipped_byte_or_cut_is_found(one: Path, tmp_path: Path, where: float, beside: bool) -> None:
    pack(one, tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    end = contents(one).size - 10_240  # the last record is padding: only the hash beside vouches for it
    at = int(where * end)
    bad = tmp_path / "bad.tar"
    if beside:
        (tmp_path / "bad.tar.sha256").write_text((tmp_path / "a.tar.sha256").read_text())
    for damaged in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
        bad.write_bytes(damaged)
        try:
            unpack(bad, tmp_path / "out")
        except FocusDDError:
            assert not (tmp_path / "out").exists()
        else:  # a byte of padding, or of a header's unused fields
            assert not beside
            assert tree(tmp_path / "out") == tree(one)
            shutil.rmtree(tmp_path / "out")


def test_an_archive_that_is_consistent_but_whose_set_is_not(one: Path, tmp_path: Path) -> None:
    """The list inside vouches for every byte, and still the set's own COMPLETE has the last word."""
    members = [entry(f"set/{name}", data) for name, data in tree(one).items()]
    forged = [(i, d + b"#") if i.name == "set/README.md" else (i, d) for i, d in members]
    forged = [entry(info.name, data) for info, data in forged]
    with pytest.raises(VerifyError, match=r"README\.md: not the bytes that"):
        unpack(forge(tmp_path / "a.tar", *forged), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_what_is_no_archive(one: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x" * 1000))
    (tmp_path / "text.tar").write_text("hello " * 200)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "zeros.tar").write_bytes(bytes(10_240))
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.addfile(entry("a/b")[0], io.BytesIO(b"x"))
    for name, error, told in (
        ("a.tar.gz", DataError, "compressed"), ("text.tar", VerifyError, "not a tar header"),
        ("empty.tar", VerifyError, "cut short"), ("zeros.tar", VerifyError, "not an archive of"),
        ("other.tar", VerifyError, "expected SHA256SUMS first"), ("none.tar", DataError, "cannot read"),
    ):  # fmt: skip
        with pytest.raises(error, match=told):
            unpack(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_something_behind_the_end(one: Path, tmp_path: Path) -> None:
    pack(one, tmp_path / "a.tar")
    with (tmp_path / "a.tar").open("ab") as file:
        file.write(b"hidden")
    (tmp_path / "a.tar.sha256").unlink()
    with pytest.raises(VerifyError, match="follows the end"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


# --- what is there stays


def test_existing_targets_are_refused(one: Path, tmp_path: Path) -> None:
    pack(one, tmp_path / "a.tar")
    before = tree(tmp_path)
    with pytest.raises(DiskError, match="exists"):
        pack(one, tmp_path / "a.tar")
    (tmp_path / "b.tar.sha256").write_text("notes of mine")
    with pytest.raises(DiskError, match="is not of a pack"):
        pack(one, tmp_path / "b.tar")
    (tmp_path / "there").mkdir()
    with pytest.raises(DiskError, match="exists"):
        unpack(tmp_path / "a.tar", tmp_path / "there")
    with pytest.raises(ConfigError, match="stays as it was sealed"):
        pack(one, one / "a.tar")
    assert tree(tmp_path) == {**before, "b.tar.sha256": b"notes of mine"}


def test_a_run_that_was_stopped_leaves_nothing_in_the_way(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".a.tar.tmp").write_bytes(b"half an archive")
    (tmp_path / "a.tar.sha256").write_text("0" * 64 + "  a.tar\n")  # killed between the hash and the archive
    pack(one, tmp_path / "a.tar")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.sha256"]

    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_module, "_check", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_killed_and_run_again(tmp_path: Path, command: str) -> None:
    """SIGKILL at moments that differ; the same command then gives the whole."""
    folder = with_gallery(det_set(tmp_path / "set", count=150))
    pack(folder, tmp_path / "whole.tar")
    script = "import sys; from focusdd_det.cli import main; print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
    words = {
        "pack": ["pack", str(folder), f"out={tmp_path / 'a.tar'}"],
        "unpack": ["unpack", str(tmp_path / "whole.tar"), f"out={tmp_path / 'out'}"],
    }[command]
    for delay in (0.05, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, cwd=REPOSITORY, stderr=subprocess.DEVNULL
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    target = tmp_path / ("a.tar" if command == "pack" else "out")
    if not target.exists():
        assert main(words) == 0
    if command == "pack":
        assert target.read_bytes() == (tmp_path / "whole.tar").read_bytes()
    else:
        assert tree(target) == tree(folder)
    assert not list(tmp_path.glob("*.incomplete"))


def test_the_commands(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, out = str(tmp_path / "a.tar"), str(tmp_path / "out")
    assert main(["pack", str(one), f"out={archive}", "--dry-run"]) == 0
    assert f"{contents(one).size:,} bytes" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(["pack", str(one), f"out={archive}"]) == 0
    assert main(["unpack", archive, f"out={out}", "--dry-run"]) == 0
    assert not Path(out).exists()
    assert main(["unpack", archive, f"out={out}"]) == 0
    assert "checked against SHA256SUMS, a.tar.sha256" in capsys.readouterr().out
    assert main(["verify", out]) == 0
    assert main(["pack", str(one), f"output={archive}"]) == 2
    assert "did you mean out" in capsys.readouterr().err
    assert main(["unpack", archive, f"out={out}"]) == 5
    assert main(["pack", "--help"]) == main(["unpack", "--help"]) == 0


def test_a_store_that_is_not_what_it_says(tmp_path: Path) -> None:
    folder = store(tmp_path / "store")
    seal = json.loads((folder / "COMPLETE").read_text())
    for wrong in ({**seal, "../x": "0" * 64}, {"store.json": 3}, [], {}):
        (folder / "COMPLETE").write_text(json.dumps(wrong))
        with pytest.raises(VerifyError, match="not a finished store"):
            contents(folder)
