"""Views: drawn for (epoch, picture) alone, rendered as a plain reference would."""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from class_data import write_class_folders, write_class_set
from torch.utils.data import DataLoader

from focusdd_det.ahead import ahead
from focusdd_det.classify.classset import ClassSet, read_class_set
from focusdd_det.classify.views import EvalDataset, Pictures, ViewDataset, ViewSettings, draw, render, share
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.training.replay import EpochSampler

SETTINGS = ViewSettings(32)
KEYS = [f"{i:040x}" for i in range(9)]
SHAPES = [(40 + i, 60 - i) for i in range(9)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ClassSet:
    return read_class_set(write_class_folders(tmp_path_factory.mktemp("views") / "data", each=4), "train")


def test_a_view_depends_on_epoch_and_picture_alone() -> None:
    there = {(e, i): draw(SETTINGS, e, i, KEYS, SHAPES) for e in range(3) for i in range(9)}
    back = {(e, i): draw(SETTINGS, e, i, KEYS, {i: SHAPES[i]}) for e, i in reversed(list(there))}
    assert all(np.array_equal(there[place], back[place]) for place in there)
    assert len({row.tobytes() for row in there.values()}) == len(there)  # every one another
    assert all(row.dtype == np.int32 and row.shape == (10,) for row in there.values())


def test_key_and_seed_decide() -> None:
    row = draw(SETTINGS, 0, 2, KEYS, SHAPES)
    other = [*KEYS[:2], "0" * 40, *KEYS[3:]]
    assert not np.array_equal(row, draw(SETTINGS, 0, 2, other, SHAPES))
    assert not np.array_equal(row, draw(ViewSettings(32, seed=1), 0, 2, KEYS, SHAPES))


def test_rows_stay_inside_and_follow_the_probabilities() -> None:
    settings = ViewSettings(32, flip=0.3, cutmix=0.5)
    rows = np.array([draw(settings, e, i, KEYS, SHAPES) for e in range(200) for i in range(9)])
    x, y, w, h, flip, partner, bx, by, bw, bh = rows.T
    own = np.tile(np.arange(9), 200)
    height, width = np.tile(np.array(SHAPES), (200, 1)).T
    assert (np.minimum(x, y) >= 0).all() and (np.minimum(w, h) >= 1).all()
    assert (x + w <= width).all() and (y + h <= height).all()
    area = w * h / (width * height)
    assert area.min() >= 0.07 and area.max() <= 1 and 0.4 < area.mean() < 0.54  # the largest often do not fit
    assert flip.mean() == pytest.approx(0.3, abs=0.05)
    mixed = partner >= 0
    assert mixed.mean() == pytest.approx(0.5, abs=0.05)  # a few boxes are empty
    assert (partner != own).all() and set(partner[mixed]) == set(range(9))
    assert (bx + bw <= 32).all() and (by + bh <= 32).all()
    assert (bw[mixed] * bh[mixed] > 0).all() and (bw[~mixed] == 0).all()


def test_one_picture_alone_is_not_mixed() -> None:
    assert draw(SETTINGS, 0, 0, KEYS[:1], SHAPES)[5] == -1


def test_share_is_what_is_not_pasted() -> None:
    black, white = np.zeros((48, 48, 3), np.uint8), np.full((48, 48, 3), 255, np.uint8)
    for epoch in range(20):
        row, partner = (draw(SETTINGS, epoch, i, KEYS, {i: (48, 48)}) for i in (0, 1))
        view = render(row, partner, black, white, 32)
        assert (view == 0).mean() == pytest.approx(share(row, 32))


def test_pixels_are_those_of_a_plain_reference() -> None:
    rng = np.random.default_rng(0)
    small = cv2.resize(rng.integers(0, 256, (6, 7, 3)).astype(np.uint8), (70, 60))  # smooth
    large = rng.integers(0, 256, (90, 80, 3)).astype(np.uint8)

    def alone(picture: np.ndarray, x: int, y: int, w: int, h: int, flip: int) -> np.ndarray:
        how = cv2.INTER_AREA if w > 32 or h > 32 else cv2.INTER_LINEAR
        view = cv2.resize(picture[y : y + h, x : x + w], (32, 32), interpolation=how)
        return view[:, ::-1] if flip else view

    row = np.array((5, 7, 20, 25, 1, 3, 4, 6, 10, 12), np.int32)
    partner = np.array((2, 3, 60, 70, 0, 8, 0, 0, 32, 32), np.int32)  # its own partner plays no part
    expected = alone(small, 5, 7, 20, 25, 1).copy()
    expected[6:18, 4:14] = alone(large, 2, 3, 60, 70, 0)[6:18, 4:14]
    before = small.copy(), large.copy()
    assert np.array_equal(render(row, partner, small, large, 32), expected)
    assert np.array_equal(small, before[0]) and np.array_equal(large, before[1])


def test_pasting_never_writes_into_the_picture() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    row = np.array((0, 0, 32, 32, 0, 1, 0, 0, 8, 8), np.int32)  # a crop that needs no resize
    render(row, np.array((0, 0, 32, 32, 0, -1, 0, 0, 0, 0), np.int32), picture, np.full_like(picture, 9), 32)
    assert not picture.any()


def test_a_row_of_another_picture_is_refused() -> None:
    row = np.array((0, 0, 50, 50, 0, -1, 0, 0, 0, 0), np.int32)
    with pytest.raises(ValueError, match="reaches outside"):
        render(row, None, np.zeros((32, 32, 3), np.uint8), None, 32)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"size": 4}, "size"), ({"scale": (0.5, 0.2)}, "scale"), ({"flip": 2.0}, "flip"), ({"cutmix": -1.0}, "cutmix")],
)
def test_settings_out_of_range(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        ViewSettings(**{"size": 32, **options})  # type: ignore[arg-type]


def test_the_data_set_is_the_same_in_any_order_and_process(folders: ClassSet) -> None:
    one = ViewDataset(folders, SETTINGS)
    other = ViewDataset(folders, SETTINGS)
    other.pictures = Pictures(folders, budget=9000)  # holds a picture or two
    places = [(e, i) for e in (3, 0) for i in range(len(folders))]
    first = {place: one[place] for place in places}
    for place in reversed(places):
        sample = other[place]
        assert all(torch.equal(sample[key], first[place][key]) for key in sample)
    loader = DataLoader(
        one, batch_size=5, sampler=EpochSampler(len(folders), 0), num_workers=1, collate_fn=one.collate_fn
    )
    for batch in loader:
        assert batch["img"].dtype == torch.uint8 and batch["share"].dtype == torch.float32
        for k, index in enumerate(batch["index"].tolist()):
            assert torch.equal(batch["img"][k], first[(0, index)]["img"])


def test_a_sample_says_whose_pixels_it_holds(folders: ClassSet) -> None:
    data = ViewDataset(folders, SETTINGS)
    for index in range(len(folders)):
        sample = data[(1, index)]
        row = draw(SETTINGS, 1, index, folders.keys, {index: data.pictures[index].shape[:2]})
        assert sample["cls"] == folders.classes[index] and sample["share"].item() == pytest.approx(share(row, 32))
        assert sample["partner_cls"] == folders.classes[row[5] if row[5] >= 0 else index]
        assert (sample["epoch"], sample["index"]) == (1, index) and sample["img"].shape == (3, 32, 32)


def test_a_pool_repeats(folders: ClassSet) -> None:
    data = ViewDataset(folders, SETTINGS, pool=2)
    assert torch.equal(data[(0, 1)]["img"], data[(2, 1)]["img"])
    assert not torch.equal(data[(0, 1)]["img"], data[(1, 1)]["img"])
    assert data[(2, 1)]["epoch"] == 2


def test_the_cache_stays_in_its_budget(folders: ClassSet) -> None:
    pictures = Pictures(folders, budget=20_000)
    for index in [*range(len(folders)), 0, 1]:
        pictures[index]
        assert sum(p.nbytes for p in pictures._kept.values()) == pictures._bytes <= 20_000
    assert not pickle.loads(pickle.dumps(pictures))._kept


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "data")
    found = read_class_set(folder, "train")
    (folder / "n02" / "p1.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(DataError, match=r"n02/p1\.jpg"):
        ViewDataset(found, SETTINGS)[(0, 3)]
    (folder / "n02" / "p1.jpg").unlink()
    with pytest.raises(DataError, match=r"n02/p1\.jpg.*No such file"):
        ViewDataset(found, SETTINGS)[(0, 3)]


def test_the_middle_view_by_hand(tmp_path: Path) -> None:
    # size 28: short side 28 / 0.875 = 32, which the picture of 96 x 32 has; the middle crop starts at x 34, y 2
    image = np.repeat(np.repeat(np.arange(96, dtype=np.uint8)[None, :, None], 32, 0), 3, 2) * 2
    (tmp_path / "a").mkdir()
    cv2.imwrite(str(tmp_path / "a" / "p.png"), image)
    view = EvalDataset(read_class_set(tmp_path, "val"), 28)[0]["img"]
    assert view.shape == (3, 28, 28) and np.array_equal(view[0, 0].numpy(), np.arange(34, 62) * 2)


def test_ahead_keeps_order_and_distance() -> None:
    asked: list[int] = []

    def stream() -> object:
        for i in range(30):
            asked.append(i)
            yield i

    for done, value in enumerate(ahead(stream(), lambda i: i * i, 3, 5)):  # type: ignore[arg-type]
        assert value == done * done and len(asked) <= done + 6
    with pytest.raises(ZeroDivisionError):
        list(ahead([1, 0], lambda i: 1 // i, 2, 4))


def test_views_of_a_set_of_ours_follow_the_bytes_not_the_place(tmp_path: Path) -> None:
    found = [read_class_set(write_class_set(tmp_path / name), "train") for name in ("a", "b")]
    first, second = (ViewDataset(s, SETTINGS)[(4, 2)]["img"] for s in found)
    assert torch.equal(first, second)
