"""`focusdd map audit`: which pictures are drawn, what is counted, what is suggested, and that a run goes on."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from conftest import draw

from focusdd_det.classmap import LEVELS, read_class_map, read_folder_map
from focusdd_det.cli import main
from focusdd_det.config import read_yaml
from focusdd_det.errors import WeightsError
from focusdd_det.maps import audit as map_audit
from focusdd_det.maps.audit import best_boxes, read_looks
from focusdd_det.maps.suggestions import Tally, changes, once, report, suggested_levels, titles, wilson
from focusdd_det.types import Detections

DOG, CAT, BIRD = "n02085620", "n02123045", "n01530575"  # synsets of ImageNet-1K
MAP = f"""
dog: {{coco_id: 0, exact: [{{{DOG}: 151 chihuahua}}], strong: [], near: [{{{CAT}: 281 tabby}}]}}
cat: {{coco_id: 1, exact: [], strong: [{{{CAT}: 281 tabby}}], near: []}}
bird: {{coco_id: 2, exact: []}}
"""


def tally(folder: str, class_name: str | None, level: str | None, n: int, found: dict[str, int], **more: Any) -> Tally:
    main_ = more.pop("main", found)
    return Tally("r", folder, "", class_name, level, pictures=n, found=Counter(found), main=Counter(main_), **more)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (tally("a", "dog", "exact", 20, {"dog": 10}), None),  # half is enough
        (tally("a", "dog", "exact", 20, {"dog": 9}), ("lower", "dog", "near")),
        (tally("a", "dog", "exact", 20, {"dog": 2}), ("lower", "dog", "near")),
        (tally("a", "dog", "exact", 20, {"dog": 1}), ("drop", None, None)),  # less than a fifth of half
        (tally("a", "dog", "near", 20, {"dog": 9}), ("drop", None, None)),  # there is no lower level
        (
            tally("a", "dog", "exact", 20, {"dog": 9}, has_levels=False),
            ("drop", None, None),
        ),  # a plain map has no levels
        (tally("a", "dog", "exact", 20, {"dog": 6, "cat": 12}), ("move", "cat", "strong")),
        (tally("a", "dog", "exact", 20, {"dog": 7, "cat": 13}), ("lower", "dog", "near")),  # not twice as often
        (tally("a", "dog", "exact", 20, {"dog": 10, "cat": 20}), ("move", "cat", "strong")),
        (tally("a", "dog", "exact", 20, {"dog": 0, "cat": 9}), ("drop", None, None)),  # the other is not there enough
        # people who only stand beside: their box is seldom the largest
        (tally("a", "dog", "exact", 20, {"dog": 4, "person": 20}, main={"person": 8}), ("lower", "dog", "near")),
        (tally("a", None, None, 20, {"cat": 16, "dog": 3}), ("add", "cat", "strong")),
        (tally("a", None, None, 20, {"cat": 15}), None),
        (
            tally("a", None, None, 20, {"person": 20, "cat": 17}, main={"person": 4, "cat": 16}),
            ("add", "cat", "strong"),
        ),
        (tally("a", None, None, 4, {"cat": 4}), None),  # too few pictures to say
        (tally("a", "dog", "exact", 0, {}), None),
    ],
)
def test_what_is_suggested(given: Tally, expected: tuple[str, str | None, str | None] | None) -> None:
    made = changes([given], found_share=0.5, add_share=0.8, least=5)
    assert [(c.kind, c.new, c.new_level) for c in made] == ([expected] if expected else [])


def test_a_folder_of_several_sources_has_one_suggestion() -> None:
    """Unless a source has a map of its own."""
    one = tally("a", "dog", "exact", 20, {"dog": 16})
    two = replace(tally("a", "dog", "exact", 20, {"cat": 20, "dog": 1}), root="s")  # alone: move to cat
    apart = replace(two, root="t", own_map=True, has_levels=False)
    made = changes([one, two, apart], found_share=0.5, add_share=0.8, least=5)
    assert [(c.root, c.kind, c.new) for c in made] == [
        ("r", "lower", "dog"),
        ("s", "lower", "dog"),
        ("t", "move", "cat"),
    ]
    assert made[0].why == "dog found in 17 of 40"
    assert [c.root for c in once(made)] == ["s", "t"]
    text = report([one, two, apart], made, [], 0.5)
    assert "Suggestions: 1 lower, 0 drop, 1 move, 0 add" in text
    few = [replace(one, root=root, pictures=3, found=Counter()) for root in ("r", "s")]
    assert len(changes(few, found_share=0.5, add_share=0.8, least=5)) == 2, "together they are enough to say"


def test_a_picture_is_counted_once_a_class_and_its_largest_box_leads() -> None:
    one = Tally("r", "a", class_name="dog", level="exact")
    one.add({"dog": (0.9, 0.2), "person": (0.3, 0.6), "cat": (0.2, 0.9)}, conf=0.25)  # the cat is not sure enough
    one.add({}, conf=0.25)
    assert one.pictures == 2 and one.found == {"dog": 1, "person": 1} and one.main == {"person": 1}
    assert one.share("dog") == 0.5


def test_wilson_s_interval() -> None:
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)
    assert wilson(0, 0) == (0, 1) and wilson(5, 5)[1] == 1 and wilson(0, 5)[0] == 0


def test_a_suggested_map_is_a_map_and_leaves_the_old_one_alone(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(MAP)
    content = read_yaml(tmp_path / "old.yaml")
    given = [
        tally(DOG, "dog", "exact", 10, {"dog": 3}),
        tally(CAT, "cat", "strong", 10, {"dog": 10}),
        tally(BIRD, None, None, 10, {"bird": 10}),
    ]
    new = suggested_levels(content, changes(given, 0.5, 0.8, 5))
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(new, sort_keys=False))
    found = read_class_map(tmp_path / "new.yaml", LEVELS)
    assert found.folders == {DOG: "dog", CAT: "dog", BIRD: "bird"}
    assert found.levels == {DOG: "near", CAT: "strong", BIRD: "strong"}
    assert found.names == read_class_map(tmp_path / "old.yaml", LEVELS).names
    assert content == read_yaml(tmp_path / "old.yaml")
    assert titles(new)[CAT] == "tabby; suggested: cat found in 0 of 10, dog in 10"


def test_the_best_box_of_each_class_is_kept_with_its_share_of_the_picture() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 5, 4]], np.float32)
    answer = Detections(boxes, np.array([1, 1, 0]), np.array([0.9, 0.8, 0.4], np.float32), np.zeros((3, 2), np.float32))
    assert best_boxes(answer, ("a", "b"), area=400) == {"b": (0.9, 0.25), "a": (0.4, 0.05)}


def test_looks_of_another_teacher_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "looks.jsonl"
    good = {"signature": "s", "picture": "p", "found": {"dog": [0.5, 0.1]}}
    lines = [json.dumps(good), json.dumps({**good, "signature": "t", "picture": "q"}), '{"signature": "s", "pic', "[]"]
    lines += [json.dumps({**good, "picture": "r", "found": {"dog": 1}}), json.dumps({**good, "picture": "z"})[:-1]]
    file.write_text("\n".join(lines))
    assert read_looks(file, "s") == {"p": {"dog": (0.5, 0.1)}}
    assert read_looks(tmp_path / "none.jsonl", "s") == {}


# --- the command


NAMES = ("disc", "square", "bar")


class FakeTeacher:
    """Finds the class whose colour fills the picture's middle; counts what it is asked."""

    path = Path("fake.pt")
    sha256 = "0" * 64
    asked = 0

    def detect(self, images: Any, conf: float, iou: float, most: int, batch: int, imgsz: int) -> list[Detections]:
        assert len({image.shape for image in images}) == 1 and len(images) <= batch
        FakeTeacher.asked += len(images)
        found = []
        for image in images:
            colour = image[imgsz // 2, imgsz // 2]
            index = int(colour.argmax())
            box = np.array([[imgsz / 4, imgsz / 4, 3 * imgsz / 4, 3 * imgsz / 4]], np.float32)
            score = np.array([0.9 if colour.max() > 180 else 0.1], np.float32)
            found.append(Detections(box, np.array([index]), score, np.zeros((1, 3), np.float32)))
        return found


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTeacher]:
    FakeTeacher.asked = 0
    FakeTeacher.sha256 = "0" * 64
    monkeypatch.setattr("focusdd_det.teacher.load_detector", lambda *_: FakeTeacher())
    return FakeTeacher


def folders(root: Path, **colours: tuple[int, int]) -> Path:
    """Class folders of 8 pictures; of `colours` folder=(class, pictures with it) has so many pictures of that class."""
    rng = np.random.default_rng(0)
    for folder, (index, count) in colours.items():
        (root / folder).mkdir(parents=True)
        for i in range(8):
            image = rng.integers(0, 60, (50, 70, 3)).astype(np.uint8)
            if i < count:
                image[15:35, 20:50, index] = 250
            cv2.imwrite(str(root / folder / f"{i}.png"), image[:, :, ::-1])
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = folders(tmp_path / "src", discs=(0, 8), squares=(1, 3), odd=(2, 8), empty=(0, 0), wrong=(2, 8))
    (tmp_path / "map.yaml").write_text(
        "names: [disc, square, bar]\nfolders: {discs: disc, squares: square, wrong: disc}\n"
    )
    return root


def audit(tmp_path: Path, source: Path, *more: str) -> int:
    command = ["map", "audit", f"source={source}", f"class_map={tmp_path / 'map.yaml'}", "imgsz=64"]
    return main([*command, f"out={tmp_path / 'audit'}", *more])


def test_an_audit_counts_suggests_and_writes(
    tmp_path: Path, source: Path, fake: type[FakeTeacher], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert audit(tmp_path, source) == 0
    assert fake.asked == 40
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    rows = {row["folder"]: row for row in found["folders"]}
    assert {name: row["share"] for name, row in rows.items()} == {
        "discs": 1.0, "squares": 0.375, "odd": None, "empty": None, "wrong": 0.0
    }  # fmt: skip
    assert {name: row["suggestion"]["kind"] for name, row in rows.items() if "suggestion" in row} == {
        "squares": "drop", "odd": "add", "wrong": "move"
    }  # fmt: skip
    text = (tmp_path / "audit" / "audit.md").read_text()
    assert text.index("| wrong |") < text.index("| squares |") < text.index("| discs |")  # worst first
    assert "Suggestions: 0 lower, 1 drop, 1 move, 1 add. None is applied." in text and text in capsys.readouterr().out
    assert "left without an exact or strong folder of these sources: square." in text
    suggested = read_class_map(tmp_path / "audit" / "suggestions.yaml", LEVELS)
    assert suggested.folders == {"discs": "disc", "wrong": "bar", "odd": "bar"}
    assert before == {path: path.read_bytes() for path in before}


def test_a_suggestion_that_is_used_or_was_worked_on_is_not_written_over(
    tmp_path: Path, source: Path, fake: type[FakeTeacher], capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(tmp_path, source) == 0
    file = tmp_path / "audit" / "suggestions.yaml"
    written = file.read_bytes()
    assert audit(tmp_path, source, f"class_map={file}") == 2
    assert "lies in out=" in capsys.readouterr().err
    assert audit(tmp_path, source, "conf=0.95") == 0
    file.write_bytes(written + b"# looked at each\n")
    assert audit(tmp_path, source) == 2
    assert "somebody has worked on it" in capsys.readouterr().err
    assert file.read_bytes() == written + b"# looked at each\n"


def test_a_second_run_looks_at_nothing_again_even_with_another_conf(
    tmp_path: Path, source: Path, fake: type[FakeTeacher]
) -> None:
    assert audit(tmp_path, source, "per_synset=3") == 0
    assert fake.asked == 15
    assert audit(tmp_path, source, "per_synset=5") == 0
    assert fake.asked == 25  # the first three of each folder are among the five
    first = (tmp_path / "audit" / "audit.json").read_bytes()
    assert audit(tmp_path, source, "per_synset=5", "batch=3", "workers=1") == 0
    assert fake.asked == 25 and (tmp_path / "audit" / "audit.json").read_bytes() == first
    assert audit(tmp_path, source, "per_synset=5", "conf=0.95") == 0
    assert fake.asked == 25
    rows = json.loads((tmp_path / "audit" / "audit.json").read_text())["folders"]
    assert all(not row["found"] for row in rows)
    fake.sha256 = "1" * 64
    assert audit(tmp_path, source, "per_synset=5") == 0
    assert fake.asked == 50


def test_a_picture_that_changed_is_looked_at_again(tmp_path: Path, source: Path, fake: type[FakeTeacher]) -> None:
    assert audit(tmp_path, source) == 0
    (source / "discs" / "0.png").write_bytes((source / "odd" / "1.png").read_bytes() + b" ")
    assert audit(tmp_path, source) == 0
    assert fake.asked == 41


def test_an_audit_that_was_killed_goes_on(
    tmp_path: Path, source: Path, fake: type[FakeTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FakeTeacher.detect

    def die(self: FakeTeacher, images: Any, *more: Any) -> Any:
        if fake.asked >= 16:
            raise KeyboardInterrupt
        return plain(self, images, *more)

    monkeypatch.setattr(FakeTeacher, "detect", die)
    assert audit(tmp_path, source) == 130
    looks = tmp_path / "audit" / "looks.jsonl"
    looks.write_bytes(looks.read_bytes()[:-20])  # the last line was cut short
    monkeypatch.setattr(FakeTeacher, "detect", plain)
    fake.asked = 0
    assert audit(tmp_path, source) == 0
    assert fake.asked == 40 - 15
    killed = (tmp_path / "audit" / "audit.json").read_bytes()
    looks.unlink()
    assert audit(tmp_path, source) == 0
    assert (tmp_path / "audit" / "audit.json").read_bytes() == killed


def test_the_draw_does_not_depend_on_the_form_of_the_source(
    tmp_path: Path, source: Path, fake: type[FakeTeacher]
) -> None:
    assert audit(tmp_path, source, "per_synset=4") == 0
    first = json.loads((tmp_path / "audit" / "audit.json").read_text())["folders"]
    moved = tmp_path / "elsewhere" / "src"
    moved.mkdir(parents=True)
    for folder in sorted(source.iterdir(), reverse=True):
        folder.rename(moved / folder.name)
    fake.asked = 0
    assert audit(tmp_path, moved, "per_synset=4") == 0
    assert fake.asked == 0  # the same pictures
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["folders"] == first
    assert audit(tmp_path, moved, "per_synset=4", "seed=1") == 0
    assert fake.asked > 0


def test_archives_are_read_in_place(tmp_path: Path, source: Path, fake: type[FakeTeacher]) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for path in sorted(source.rglob("*.png")):
            archive.add(path, path.relative_to(source).as_posix())
    assert audit(tmp_path, tmp_path / "all.tar") == 0
    rows = {r["folder"]: r for r in json.loads((tmp_path / "audit" / "audit.json").read_text())["folders"]}
    assert fake.asked == 40 and rows["discs"]["share"] == 1


def test_bad_pictures_are_counted_and_passed_over(tmp_path: Path, source: Path, fake: type[FakeTeacher]) -> None:
    (source / "discs" / "0.png").write_bytes(b"not a picture")
    (source / "discs" / "1.png").write_bytes(b"")
    assert audit(tmp_path, source) == 0
    rows = {r["folder"]: r for r in json.loads((tmp_path / "audit" / "audit.json").read_text())["folders"]}
    assert (rows["discs"]["pictures"], rows["discs"]["unusable"], rows["discs"]["share"]) == (6, 2, 1.0)


def test_levels_choose_what_is_looked_at(tmp_path: Path, fake: type[FakeTeacher]) -> None:
    source = folders(tmp_path / "src", **{DOG: (0, 2), CAT: (1, 8), "loose": (2, 8)})
    (tmp_path / "map.yaml").write_text(MAP)

    def looked_at(*more: str) -> dict[str, Any]:
        assert audit(tmp_path, source, *more) == 0
        rows = json.loads((tmp_path / "audit" / "audit.json").read_text())["folders"]
        return {row["folder"]: (row["level"], row["title"]) for row in rows}

    assert looked_at("levels=exact", "unmapped=false") == {DOG: ("exact", "chihuahua")}
    assert looked_at("levels=strong", "unmapped=false") == {CAT: ("strong", "tabby")}
    assert set(looked_at()) == {DOG, CAT, "loose"}
    suggested = read_class_map(tmp_path / "audit" / "suggestions.yaml", LEVELS)
    assert suggested.levels == {DOG: "near", CAT: "strong"}
    # a folder that is no synset of ImageNet-1K cannot stand in a map with levels: it gets a map of its source
    assert read_folder_map(tmp_path / "audit" / "suggestions_src.yaml") == {"loose": "bird"}


def test_a_source_with_a_map_of_its_own(tmp_path: Path, source: Path, fake: type[FakeTeacher]) -> None:
    (tmp_path / "own.yaml").write_text("squares: square\nodd: square\n")
    assert audit(tmp_path, source, f"source={source}::{tmp_path / 'own.yaml'}", "unmapped=false") == 0
    rows = {
        (r["source"], r["folder"]): r for r in json.loads((tmp_path / "audit" / "audit.json").read_text())["folders"]
    }
    assert {key for key in rows if key[0] == "src2"} == {("src2", "squares"), ("src2", "odd")}
    assert read_folder_map(tmp_path / "audit" / "suggestions_src2.yaml") == {"odd": "bar"}


def test_a_dry_run_opens_no_model_and_writes_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("focusdd_det.teacher.load_detector", never)
    assert audit(tmp_path, source, "per_synset=4", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "5 folders, 20 pictures" in text and "not in the map: 2 folders, 8 pictures; 2 with fewer than least" in text
    assert not (tmp_path / "audit").exists()


def test_a_real_detector(tmp_path: Path, teacher_file: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("disc", "bar"):
        (tmp_path / "src" / folder).mkdir(parents=True)
        for i in range(3):
            cv2.imwrite(str(tmp_path / "src" / folder / f"{i}.jpg"), draw(rng, 80)[0])
    (tmp_path / "map.yaml").write_text("names: [disc, square, bar]\n")
    assert audit(tmp_path, tmp_path / "src", f"teacher={teacher_file}", "least=1") == 0
    looks = [json.loads(line) for line in (tmp_path / "audit" / "looks.jsonl").read_text().splitlines()]
    assert len(looks) == 6 and any(look["found"] for look in looks)
    assert all(set(look["found"]) <= set(NAMES) for look in looks)  # `other` of the teacher is no class of the map


@pytest.mark.parametrize(
    ("tokens", "code", "message"),
    [
        (["map"], 2, "expected audit"),
        (["map", "audi"], 2, "expected audit, got audi"),
        (["map", "audit", "per_synset=5"], 2, "sources=()"),
        (["map", "audit", "source=src", "per_synsett=5"], 2, "did you mean per_synset"),
        (["map", "audit", "source=src", "levels=exakt"], 2, "levels="),
        (["map", "audit", "source=src", "conf=0.01"], 2, "a score from 0.05 to 1"),
        (["map", "audit", "source=src", "class_map=none.yaml"], 3, "no class map"),
        (["map", "audit", "source=nowhere"], 3, "no source folder"),
        (["map", "audit", "source=src", "class_map=map.yaml", "out=src/audit"], 2, "lie in each other"),
        (["map", "audit", "source=src::map2.yaml", "class_map=map.yaml"], 3, "none of its folders"),
        (["map", "audit", "source=src", "class_map=map.yaml", "teacher=none.pt"], 4, "checkpoint not found"),
    ],
)
def test_bad_commands_name_the_way_out(
    tokens: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    (tmp_path / "map2.yaml").write_text("elsewhere: disc\n")
    monkeypatch.chdir(tmp_path)
    assert main(tokens) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "audit").exists()


def test_a_teacher_without_the_classes_writes_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise WeightsError("the teacher does not know bar")

    monkeypatch.setattr("focusdd_det.teacher.load_detector", refuse)
    assert audit(tmp_path, source) == 4
    assert not (tmp_path / "audit").exists()


def test_a_folder_s_name_cannot_leave_its_comment(tmp_path: Path, fake: type[FakeTeacher]) -> None:
    hostile = "odd\ndisc: !!python/object/apply:os.system [ls]"
    source = folders(tmp_path / "src", **{"discs": (0, 8), hostile.replace("/", "_"): (2, 8)})
    (tmp_path / "map.yaml").write_text("names: [disc, square, bar]\nfolders: {discs: disc}\n")
    assert audit(tmp_path, source) == 0
    content = yaml.safe_load((tmp_path / "audit" / "suggestions.yaml").read_text())
    assert set(content) == {"names", "folders"}


def test_help_has_examples_and_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "audit", "--help"]) == 0
    text = capsys.readouterr().out
    assert "focusdd map audit source=imagenet/train teacher=yolo11x.pt" in text
    assert all(f"\n{key}:" in text for key in map_audit.AuditConfig.__dataclass_fields__)
