"""Which sources become what: orders, draws and composites."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from focusdd_det.layouts import Layout
from focusdd_det.select import Candidates, background_order, proposals, ranked


def three_and_one(number: int) -> Layout:
    return Layout(2, 3)


def one_each(number: int) -> Layout:
    return Layout(1, 1)


def candidates(
    score: list[int], folder: list[int] | None = None, p: list[float] | None = None, phash: list[int] | None = None
) -> Candidates:
    n = len(score)
    sha = np.stack([np.frombuffer(hashlib.sha256(str(i).encode()).digest(), np.uint8) for i in range(n)])
    rng = np.random.default_rng(0)
    return Candidates(
        ids=np.arange(n),
        sha=sha,
        folder=np.array(folder or [0] * n, np.int32),
        p=np.array(p or [0.5] * n, np.float64),
        score=np.array(score, np.int64),
        phash=np.array(phash, np.uint64) if phash else rng.integers(0, 2**63, n).astype(np.uint64),
    )


def test_best_first_and_ties_by_content() -> None:
    c = candidates([5, 9, 5, 5, 7])
    tied = sorted([0, 2, 3], key=lambda i: c.sha[i].tobytes())
    assert ranked(c, c.score, False).tolist() == [1, 4, *tied]


def test_the_order_of_the_sources_decides_nothing() -> None:
    c = candidates([3, 3, 3, 8, 1, 3, 8], folder=[0, 1, 0, 1, 2, 2, 0])
    turn = np.random.default_rng(1).permutation(7)
    shuffled = Candidates(turn, c.sha[turn], c.folder[turn], c.p[turn], c.score[turn], c.phash[turn])
    for stratify in (False, True):
        assert turn[ranked(shuffled, shuffled.score, stratify)].tolist() == ranked(c, c.score, stratify).tolist()
    assert turn[background_order(shuffled, 0, "dog")].tolist() == background_order(c, 0, "dog").tolist()


def test_ties_go_by_content_whether_the_sources_come_by_hash_or_not() -> None:
    rng = np.random.default_rng(2)
    shuffled = candidates(rng.integers(0, 4, 200).tolist(), rng.integers(0, 3, 200).tolist(), [0.0, 0.3, 0.9, 1.0] * 50)
    rising = np.array(sorted(range(200), key=lambda i: shuffled.sha[i].tobytes()))
    columns = (shuffled.sha, shuffled.folder, shuffled.p, shuffled.score, shuffled.phash)
    by_hash = Candidates(rising, *(column[rising] for column in columns))
    assert ranked(by_hash, by_hash.score, False).tolist() == np.argsort(-by_hash.score, kind="stable").tolist()
    for c in (shuffled, by_hash):
        assert ranked(c, c.score, False).tolist() == sorted(
            range(200), key=lambda i: (-int(c.score[i]), c.sha[i].tobytes())
        )
    for stratify in (False, True):
        assert (
            rising[ranked(by_hash, by_hash.score, stratify)].tolist()
            == ranked(shuffled, shuffled.score, stratify).tolist()
        )
    drawn = background_order(by_hash, 0, "dog")
    assert rising[drawn].tolist() == background_order(shuffled, 0, "dog").tolist()
    last = [i for i in drawn if by_hash.p[i] == 0]  # never drawn: all tied, so by hash
    assert drawn[-50:].tolist() == last == sorted(last)


def test_no_sources_no_order() -> None:
    c = candidates([1])
    none = Candidates(c.ids[:0], c.sha[:0], c.folder[:0], c.p[:0], c.score[:0], c.phash[:0])
    assert ranked(none, none.score, True).tolist() == background_order(none, 0, "dog").tolist() == []


def test_stratified_is_round_robin_over_folders_best_first() -> None:
    c = candidates([9, 8, 7, 6, 5, 4], folder=[0, 0, 0, 0, 1, 2])
    assert ranked(c, c.score, True).tolist() == [0, 4, 5, 1, 2, 3]


def test_backgrounds_are_drawn_in_proportion_to_confidence() -> None:
    c = candidates([0, 0, 0], p=[0.8, 0.2, 0.0])
    firsts = [int(background_order(c, seed, "cat")[0]) for seed in range(2000)]
    assert firsts.count(0) / 2000 == pytest.approx(0.8, abs=0.03)
    assert firsts.count(2) == 0
    orders = {tuple(background_order(c, seed, "cat")) for seed in range(2000)}
    assert orders == {(0, 1, 2), (1, 0, 2)}


def test_three_best_then_one_background_and_a_larger_set_begins_like_a_smaller_one() -> None:
    order, backgrounds = np.arange(12), np.array([5, 0, 11, 3, 10, 9, 8, 7, 6, 4, 2, 1])
    made = list(proposals(order, backgrounds, np.arange(12).astype(np.uint64), three_and_one))
    assert [m.keys for m in made] == [(0, 1, 2), (3, 4, 6), (7, 8, 9)]
    assert [m.backgrounds for m in made] == [(5,), (11,), (10,)]
    assert [m.number for m in made] == [0, 1, 2]


def test_the_papers_order_takes_all_key_patches_first() -> None:
    order, backgrounds = np.arange(8), np.array([5, 0, 6, 7, 1, 2, 3, 4])
    made = list(proposals(order, backgrounds, np.arange(8).astype(np.uint64), three_and_one, reserved=6))
    assert [m.keys for m in made] == [(0, 1, 2), (3, 4, 5)]
    assert [m.backgrounds for m in made] == [(6,), (7,)]


def test_a_banned_source_changes_only_what_comes_from_it_on() -> None:
    order, phash = np.arange(16), np.arange(16).astype(np.uint64)
    whole = list(proposals(order, order[::-1], phash, three_and_one))
    without = list(proposals(order, order[::-1], phash, three_and_one, banned=order == 4))
    assert without[0] == whole[0]
    assert whole[1].keys == (3, 4, 5)
    assert without[1].keys == (3, 5, 6)


def test_unusable_sources_and_those_of_little_entropy_are_barred() -> None:
    c = dataclasses.replace(candidates([1, 2, 3, 4, 5]), entropy=np.array([3.1999, 3.2, np.nan, 0.0, 7.5]))
    assert np.flatnonzero(c.barred(3.2)).tolist() == [0, 3]
    assert not c.barred(0).any()
    assert not dataclasses.replace(c, entropy=None).barred(3.2).any()
    damaged = dataclasses.replace(c, unusable=np.arange(5) == 4)
    assert np.flatnonzero(damaged.barred(3.2)).tolist() == [0, 3, 4]
    damaged.barred(0)[0] = True  # a table of its own
    assert np.flatnonzero(damaged.barred(0)).tolist() == [4]
    with pytest.raises(ValueError, match=r"entropy \[5\]"):
        dataclasses.replace(c, entropy=np.zeros(4))


def test_near_duplicates_are_passed_over() -> None:
    phash = np.array([0, 0b111, 0b11111111, 2**40 - 1, 2**63, 0], np.uint64)
    made = list(proposals(np.arange(6), np.arange(6), phash, one_each, near=3))
    assert [m.keys[0] for m in made] == [0, 2, 3]  # 1 and 5 are like 0, 4 differs from 0 in one bit
    assert len(list(proposals(np.arange(6), np.arange(6), phash, one_each, near=0))) == 6


def test_running_out_of_sources_ends_or_starts_again() -> None:
    order, phash = np.arange(5), np.arange(5).astype(np.uint64)
    assert len(list(proposals(order, order, phash, three_and_one))) == 1
    reused = proposals(order, order, phash, three_and_one, reuse=True)
    groups = [next(reused) for _ in range(4)]
    assert [g.keys for g in groups] == [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 0)]  # other company each time
    assert [g.backgrounds for g in groups] == [(3,), (4,), (0,), (1,)]
    assert [g.number for g in groups] == [0, 1, 2, 3]
    assert list(proposals(order[:2], order[:2], phash, three_and_one, reuse=True)) == []


def test_columns_of_different_length_are_refused() -> None:
    c = candidates([1, 2])
    with pytest.raises(ValueError, match="one length"):
        Candidates(c.ids, c.sha, c.folder, c.p, c.score[:1], c.phash)
