"""Every source is looked at: read, decoded, shown to the ViT (or the detection teacher), kept in the file of scores."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.errors import WeightsError
from focusdd_det.methods import REALISM_LEAST, Method
from focusdd_det.plugins import content_of
from focusdd_det.scoring.bad_sources import Judged
from focusdd_det.scoring.batches import Batch, Batches, Pixels, outcomes_of
from focusdd_det.scoring.contents import Content, confidence, steps
from focusdd_det.scoring.deviations import Deviation, deviation
from focusdd_det.scoring.glance import Glance, glance
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.scoring.window_judge import WindowJudge
from focusdd_det.selector import Selector
from focusdd_det.sources import Located
from focusdd_det.windows import best_windows, least_windows, window_side

_VERSION = 4  # of the scoring itself: a change of what a score means must not meet old scores
_TWICE = 64  # of so many batches of a screening one is looked at in both precisions


def score_all(
    stream: Iterable[Located],
    store: ScoreStore,
    selector: Selector | None,
    method: Method,
    columns: Mapping[str, Sequence[int]],
    config: SetConfig,
    workers: int,
    progress: Callable[[int], object],
    judge: WindowJudge | None = None,
    fast: Selector | None = None,
) -> None:
    """Look at every source of the stream that the store does not hold yet.

    Args:
        stream: sources, in any order.
        store: where the results go.
        selector: the ViT; None for methods that need none (then p and share are 0).
        method: says whether the ViT is shown a source as a whole, or crops of it.
        columns: class -> outputs of the ViT that stand for it; empty: the largest probability counts.
        config: geometry, view and limits.
        workers: decoding threads or processes.
        progress: called with the number of sources that are done.
        judge: the detection teacher, for methods that rank windows by what it finds in them.
        fast: the same ViT in low precision, which looks in place of `selector` (screening.py); every `_TWICE`th
            batch, the first included, is looked at by both, unless the second look wants other pixels (decode=full);
            one in which it overflows by `selector` in any case.

    Raises:
        DataError: a larger share of the sources than `max_bad` cannot be decoded, those of earlier runs included.
        WeightsError: what the ViT says is not a number.
    """
    view = judge.side if judge else selector.view if selector else 64
    final = Looker(selector, method, columns, config, store, judge)
    first_config = config if fast is None else as_first(config)
    lookers = [final] if fast is None else [final, Looker(fast, method, columns, first_config, store)]
    device = selector.device if selector else judge.detector.device if judge else torch.device("cpu")
    on_gpu = device.type == "cuda"
    judged = Judged(config.max_bad)
    batches = 0

    def look(batch: Batch, pixels: Pixels) -> list[Seen]:
        nonlocal batches
        batches += 1
        seen = lookers[-1](batch, pixels)
        if first_config != config:  # the second look is at other pixels
            return [seen] if seen.finite else [final.anew(batch, pixels)]
        twice = fast is not None and (batches % _TWICE == 1 or not seen.finite)
        return [final(batch, pixels), seen] if twice else [seen]

    def finish(seen: list[Seen]) -> None:
        seen[0].keep(store)
        if len(seen) > 1 and seen[1].finite:  # of a batch that overflowed nothing is left to the first look
            store.deviate(lookers[1].sight, seen[1].deviation(seen[0]))
        progress(len(seen[0].rows))

    def recalled(located: Located, sha: bytes | None = None) -> bool:
        """Whether this content was looked at before, under whatever name; then it has its row now."""
        for looker in lookers:
            content = store.recall(located, looker.name, sha) if looker.name else None
            if content is not None:
                store.put([looker.row_of(located, content)])
                progress(1)
                judged.add(located.source, "")
                return True
        return False

    def new_sources() -> Iterator[Located]:
        for located in stream:
            reason = store.known(located, [looker.signatures[located.source.group] for looker in lookers])
            if reason is not None:
                progress(1)
                judged.add(located.source, reason)
            elif not recalled(located):
                yield located

    known = store.known_contents([looker.name for looker in lookers if looker.name])
    outcomes, ahead = outcomes_of(new_sources(), view, method, first_config, workers, known, on_gpu)
    with Batches(final.shape(view), look, finish, store, ahead, on_gpu) as waiting, contextlib.closing(outcomes):
        for located, outcome in outcomes:
            if isinstance(outcome, Glance) and not outcome.views:
                if recalled(located, outcome.sha):
                    continue
                outcome = glance(located, view, method, first_config)  # another content with the same first 8 bytes
            if isinstance(outcome, str):
                store.put([final.bad(located, outcome)])
                progress(1)
                judged.add(located.source, outcome)
                continue
            judged.add(located.source, "")
            waiting.add(located, outcome)
    store.commit()
    judged.end()


def as_first(config: SetConfig) -> SetConfig:
    """The configuration of a screening's first look: every picture is decoded at reduced size."""
    return replace(config, decode="reduced")


# ---- what looks ----


@dataclass(frozen=True)
class Seen:
    """What one looker saw in a batch.

    Attributes:
        rows: of the sources, in the order of the schema.
        p, share, corner: [n], [n], [n, 2].
        name: the looker's; contents: what is kept by content under it.
        finite: whether all that the ViT said are numbers.
    """

    rows: list[tuple[object, ...]]
    p: NDArray[np.float64]
    share: NDArray[np.float64]
    corner: NDArray[np.int64]
    name: str = ""
    contents: list[Content] = field(default_factory=list)
    finite: bool = True

    @property
    def places(self) -> list[tuple[str, str]]:
        """(root, path) of each source."""
        return [(str(row[0]), str(row[1])) for row in self.rows]

    def keep(self, store: ScoreStore) -> None:
        """Put all of it into the file of scores.

        Raises:
            WeightsError: not all of it are numbers.
        """
        self.demand_numbers()
        store.put(self.rows, self.name, self.contents)

    def demand_numbers(self) -> None:
        """Nothing that overflowed becomes a score.

        Raises:
            WeightsError: see there.
        """
        if not self.finite:
            first = ":".join(self.places[0])
            raise WeightsError(
                f"the selector gives infinite or undefined numbers for {first} or one of the {len(self.rows) - 1} "
                "sources after it; its weights are damaged, or overflow in this precision: try precision=fp32 or others"
            )

    def deviation(self, final: Seen) -> Deviation:
        """How far this look is from one in full precision at the same sources."""
        return deviation(self.p, final.p, self.share, final.share)


class Looker:
    """The ViT (or the detection teacher) and how what it says becomes a row: p, share and window of a source.

    Attributes:
        signatures: class -> what a row depends on besides the picture.
        sight: the same without what the class is made of.
        name: what a remembered content depends on besides its bytes, made of `sight`. Empty where contents are not
            remembered: nothing is seen, of several looks the best for one class only, or more than the window with the
            most attention.
    """

    def __init__(
        self,
        selector: Selector | None,
        method: Method,
        columns: Mapping[str, Sequence[int]],
        config: SetConfig,
        store: ScoreStore,
        judge: WindowJudge | None = None,
    ) -> None:
        self.selector, self.method, self.columns, self.config, self.judge = selector, method, columns, config, judge
        self.run, self.remembers = store.run, store.contents.enabled
        self.signatures = {
            group: signature(selector, method, own, config, judge, group) for group, own in columns.items()
        }
        plain = selector is not None and not method.looks and not method.needs_features and method.window == "most"
        self.sight = signature(selector, method, (), replace(config, confidence="max"))
        self.name = f"content {self.sight}" if plain else ""

    def shape(self, view: int) -> tuple[int, ...]:
        """Of the pixels of a batch: a ViT at batch 1 and 32 differs in the seventh digit, so it is always the same."""
        looks = max(1, self.method.looks)
        return (max(1, self.config.batch // looks), looks, view, view, 3)

    def __call__(self, batch: Batch, pixels: Pixels) -> Seen:
        """One batch. Of several looks at one source the one with the largest p counts, the first of equals; `corner`
        then holds its number. With a judge the detection teacher looks in place of the ViT."""
        n = len(batch)
        p, share = np.zeros(n), np.zeros(n)
        corner: NDArray[np.int64] = np.zeros((n, 2), np.int64)
        features: NDArray[np.float16] | None = None
        contents: list[Content] = []
        finite = True
        if self.selector is not None:
            looks = pixels.shape[1]
            probabilities, attention, features = self._see(pixels, n * looks)
            finite = bool(probabilities.isfinite().all() and attention.isfinite().all())
            probabilities, attention = probabilities.nan_to_num(), attention.nan_to_num()
            k = window_side(self.selector.grid, self.config.side_ratio)
            share_t, corner_t = best_windows(attention, k)
            if self.method.window == "least":
                corner_t = least_windows(attention, k)
            shares, corners = share_t.double().numpy(), corner_t.numpy()
            table = steps(probabilities.double().numpy())
            for i, (located, seen) in enumerate(batch):
                first = i * looks
                own = self.columns[located.source.group]
                each = confidence(table[first : first + looks], own, self.config.confidence)
                best = int(np.round(each, 4).argmax())
                p[i], share[i] = each[best], shares[first + best]
                corner[i] = corners[first] if looks == 1 else (best, 0)
                if features is not None:
                    features[i] = features[first + best]
                if self.name and self.remembers:
                    where = (int(corner[i, 0]), int(corner[i, 1]))
                    what = (seen.sha, seen.width, seen.height, float(share[i]), where, seen.phash)
                    contents.append(Content(*what, table[first], seen.entropy))
        elif self.judge is not None:
            sizes = [(seen.width, seen.height) for _, seen in batch]
            groups = [located.source.group for located, _ in batch]
            p, corner = self.judge([pixels[i, 0] for i in range(n)], sizes, groups)
        rows = [
            self._row(
                located,
                seen,
                float(p[i]),
                float(share[i]),
                (int(corner[i, 0]), int(corner[i, 1])),
                None if features is None else features[i].tobytes(),
            )
            for i, (located, seen) in enumerate(batch)
        ]
        return Seen(rows, p, share, corner, self.name, contents, finite)

    def anew(self, batch: Batch, pixels: Pixels) -> Seen:
        """A batch that was decoded for another look, decoded once more; `pixels` is written over."""
        pixels[:] = 0
        good: list[tuple[Located, Glance]] = []
        bad = []
        for located, _ in batch:
            seen = glance(located, pixels.shape[2], self.method, self.config)
            if isinstance(seen, str):
                bad.append(self.bad(located, seen))
                continue
            pixels[len(good)] = np.stack(seen.views)
            good.append((located, replace(seen, views=())))
        if not good:
            return Seen(bad, np.zeros(0), np.zeros(0), np.zeros((0, 2), np.int64))
        found = self(good, pixels)
        return replace(found, rows=[*found.rows, *bad])

    def row_of(self, located: Located, content: Content) -> tuple[object, ...]:
        """The row of a source whose content was seen before."""
        seen = Glance(content.sha, content.width, content.height, (), content.phash, content.entropy)
        own = self.columns[located.source.group]
        p = float(confidence(content.probabilities[None], own, self.config.confidence)[0])
        return self._row(located, seen, p, content.share, content.corner)

    def bad(self, located: Located, reason: str) -> tuple[object, ...]:
        """The row of a source that cannot be used."""
        return self._row(located, None, 0.0, 0.0, (0, 0), bad=reason)

    def _see(self, pixels: Pixels, count: int) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float16] | None]:
        """Probabilities, attention and, where the method needs them, features of the first `count` views."""
        assert self.selector is not None
        tensor = torch.from_numpy(pixels).flatten(0, 1)[: self.selector.needed(count)].permute(0, 3, 1, 2)
        tensor = tensor if tensor.is_pinned() else tensor.contiguous()
        if self.method.needs_features:
            probabilities, attention, vectors = self.selector.with_features(tensor)
            return probabilities[:count], attention[:count], vectors[:count].numpy().astype(np.float16)
        probabilities, attention = self.selector(tensor)
        return probabilities[:count], attention[:count], None

    def _row(
        self,
        located: Located,
        seen: Glance | None,
        p: float,
        share: float,
        corner: tuple[int, int],
        feature: bytes | None = None,
        bad: str | None = None,
    ) -> tuple[object, ...]:
        """In the order of the schema; `seen` is None for a source that cannot be used."""
        s = located.source
        sha, width, height, phash = (seen.sha, seen.width, seen.height, seen.phash) if seen else (b"", 0, 0, 0)
        signed = phash - (1 << 64) if phash >= 1 << 63 else phash  # SQLite's integers are signed
        where = (located.offset, located.size, located.mtime_ns)
        found = (sha, width, height, p, share, *corner, signed, bad, feature, seen.entropy if seen else None)
        return (s.root, s.path, s.folder, s.group, self.signatures[s.group], self.run, *where, *found)


def signature(
    selector: Selector | None,
    method: Method,
    columns: Sequence[int],
    config: SetConfig,
    judge: WindowJudge | None = None,
    group: str = "",
) -> str:
    """What a stored score depends on besides the picture; scores with another signature are computed anew."""
    content: list[object] = [_VERSION, config.geometry, config.max_pixels]
    if selector is not None:
        content += [
            selector.sha256,
            selector.spec,
            selector.view,
            selector.grid,
            selector.attention,
            selector.precision,
        ]
        content += [config.side_ratio, config.confidence, list(columns)]
    if config.decode == "full":
        content.append("every pixel")
    if method.looks:
        content += [method.looks, REALISM_LEAST, config.seed, *content_of(method)]
    if method.window != "most":
        content.append(method.window)
    if method.needs_features:
        content.append("features")
    if judge is not None:
        content += [*judge.depends_on(group), *content_of(method)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
