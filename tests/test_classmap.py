"""Class maps: the shipped one and the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from focusdd_det.classmap import find_map, imagenet_synsets, read_class_map, read_folder_map
from focusdd_det.config import cfg_dir
from focusdd_det.errors import DataError

SHIPPED = "coco_imagenet.yaml"


def test_the_shipped_map_covers_what_the_readme_says() -> None:
    exact = read_class_map(find_map(SHIPPED), ["exact"])
    strong = read_class_map(find_map(SHIPPED), ["exact", "strong"])
    assert len(exact.names) == 80
    assert (exact.names[0], exact.names[16], exact.names[79]) == ("person", "dog", "toothbrush")
    assert len(set(exact.folders.values())) == 59
    assert set(strong.folders.values()) - set(exact.folders.values()) == {"handbag", "potted plant", "toilet", "oven"}
    assert len(strong.folders_of("dog")) == 118
    assert set(strong.folders) <= set(imagenet_synsets())


def test_the_names_are_ultralytics_coco_names() -> None:
    import yaml
    from ultralytics.utils import ROOT

    coco = yaml.safe_load((ROOT / "cfg" / "datasets" / "coco.yaml").read_text())["names"]
    assert read_class_map(find_map(SHIPPED), ["exact"]).names == tuple(coco.values())


def test_a_picture_that_is_near_to_two_classes_stands_for_none() -> None:
    near = read_class_map(find_map(SHIPPED), ["exact", "strong", "near"])
    assert "n02701002" not in near.folders  # ambulance: near to car and to truck
    assert near.folders["n04335435"] == "train"  # streetcar: strong for train, near to bus


def test_folder_maps_that_are_shipped_name_coco_classes() -> None:
    names = read_class_map(find_map(SHIPPED), ["exact"]).names
    shipped = sorted(cfg_dir().glob("*_coco.yaml"))
    assert [path.name for path in shipped] == ["caltech101_coco.yaml", "imagenet_more_coco.yaml"]
    for path in shipped:
        assert read_folder_map(path, names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog: {coco_id: 0, exact: [n99999999]}", "`n99999999` is not an ImageNet-1K synset"),
        ("dog: {coco_id: 0, exact: [n0208562]}", "did you mean n02085620"),
        ("a: {coco_id: 0, exact: [n02085620]}\nb: {coco_id: 1, exact: [n02085620]}", "is exact in `a` and in `b`"),
        ("dog: {coco_id: 0}\ncat: {coco_id: 0}", "has the coco_id of `dog`"),
        ("dog: {coco_id: 1}", "without gaps"),
        ("dog: {coco_id: 0, exakt: []}", "unknown key `exakt`, did you mean exact"),
        ("dog: [n02085620]", "needs a coco_id"),
        ("names: [a, a]", "a class twice"),
        ("names: [ball]\nfolders: {x: bal}", "did you mean ball"),
        ("names: [ball]\nfolder: {x: ball}", "unknown key `folder`, did you mean folders"),
    ],
)  # fmt: skip
def test_wrong_maps_say_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_class_map(tmp_path / "map.yaml", ["exact", "strong", "near"])
    assert caught.value.exit_code == 3
    assert "map.yaml" in str(caught.value)


def test_a_plain_map(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("names: [ball, star]\nfolders: {red_ball: ball, blue_ball: ball, s: star}\n")
    classes = read_class_map(tmp_path / "map.yaml", ["exact"])
    assert classes.names == ("ball", "star")
    assert classes.folders_of("ball") == ("blue_ball", "red_ball")
    (tmp_path / "map.yaml").write_text("names: {0: ball, 1: star}\n")
    assert read_class_map(tmp_path / "map.yaml", ["exact"]).folders == {"ball": "ball", "star": "star"}


def test_the_hash_is_of_the_content_not_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("names: [ball, star]\nfolders: {x: ball, y: star}\n")
    (tmp_path / "b.yaml").write_text("# a comment\nfolders:\n  y: star\n  x: ball\nnames: [ball, star]\n")
    (tmp_path / "c.yaml").write_text("names: [star, ball]\nfolders: {x: ball, y: star}\n")
    a, b, c = (read_class_map(tmp_path / f"{n}.yaml", ["exact"]).sha256 for n in "abc")
    assert a == b != c


def test_no_such_map_lists_the_shipped_ones() -> None:
    with pytest.raises(DataError, match=r"coco_imagenet\.yaml"):
        find_map("nothing.yaml")


def test_a_folder_map_with_unknown_classes(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("giraffes: girafe\nlions: lion\n")
    with pytest.raises(DataError) as caught:
        read_folder_map(tmp_path / "m.yaml", ["giraffe", "dog"])
    assert "did you mean giraffe" in str(caught.value)
    assert "lions" in str(caught.value)
