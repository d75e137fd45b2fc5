"""The gallery of a set in a real browser, and what the command writes and refuses."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from browser import Browser, find
from class_data import jpeg, write_class_set
from conftest import draw
from safetensors.torch import save_file

from focusdd_det import detset, disk
from focusdd_det.cli import main
from focusdd_det.methods import METHODS
from focusdd_det.scoring.decode import decode
from focusdd_det.scoring.glance import view_pixels
from focusdd_det.selector import load_selector
from focusdd_det.showing.gallery import NAME, write_gallery
from focusdd_det.types import Detections

EVIL = '</script><script>window.ran=1</script><img src=x onerror="window.ran=2">{BLOCKS}{SCRIPT}'
CLASSES = ("disc", EVIL, "bar")
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}


def write_gallery_set(folder: Path, count: int, pictures: int = 5, sources: Path | None = None) -> Path:
    """A detection set with cells and soft targets: composite i is of class i % 3 and has i % 4 boxes."""
    rng = np.random.default_rng(0)
    files = [jpeg(draw(rng, 96)[0]) for _ in range(pictures)]
    for part in detset.PARTS:
        (folder / part / "train").mkdir(parents=True)
    with (folder / "manifest.jsonl").open("w") as manifest:
        for i in range(count):
            kinds = [(i + k) % 3 for k in range(i % 4)]
            labels = "".join(f"{kind} 0.5 0.{k + 2} 0.2 0.2\n" for k, kind in enumerate(kinds)).encode()
            n = len(kinds)
            conf = np.array([0.9 - 0.1 * k for k in range(n)], np.float32)
            found = Detections(
                np.zeros((n, 4), np.float32), np.array(kinds, np.int64), conf, np.zeros((n, 3), np.float32)
            )
            cells = []
            for k in range(4):
                name = f"{EVIL.replace('/', '')}{i}_{k}.jpg"
                data = b""
                if sources is not None:
                    data = jpeg(rng.integers(0, 255, (40, 60, 3)).astype(np.uint8))
                    (sources / "odd").mkdir(parents=True, exist_ok=True)
                    name = f"{i}_{k}.jpg"
                    (sources / "odd" / name).write_bytes(data)
                digest = hashlib.sha256(data).hexdigest()
                kind, crop = ("key", (5, 3, 30)) if k < 3 else ("background", (10, 0, 40))
                cells.append(
                    detset.Cell(kind, "photos", f"odd/{name}", "odd", digest, 60, 40, crop, 0.1 * k, 0.6, k == i % 3)
                )
            parts = {"images": files[i % pictures], "labels": labels, "soft": detset.soft_bytes(found)}
            hashes = {part: disk.sha256(data) for part, data in parts.items()}
            name = CLASSES[i % 3]
            item = detset.Item(f"c{i:05d}", name, i % 3, name, i // 3, i, i, tuple(cells), len(kinds), hashes)
            for part, data in parts.items():
                detset.part_path(folder, part, item).write_bytes(data)
            manifest.write(item.line())
    (folder / "data.yaml").write_bytes(detset.data_yaml(CLASSES))
    (folder / "build.yaml").write_text("format: focusdd_det set\n")
    (folder / "README.md").write_text("a set for tests\n")
    (folder / "COMPLETE").write_bytes(detset.seal(folder))
    return folder


def write_selector(folder: Path) -> Path:
    import timm

    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **KWARGS)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "vit.safetensors")
    spec = {"arch": "vit_tiny_patch16_224", "kwargs": KWARGS, "classes": ["a", "b", "c"], "weights": "vit.safetensors"}
    (folder / "vit.json").write_text(json.dumps(spec))
    return folder / "vit.json"


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose sources, selector and build.yaml are there: <folder>/set, sources and vit.json."""
    top = tmp_path_factory.mktemp("looked")
    write_gallery_set(top / "set", 6, sources=top / "sources")
    vit = load_selector(str(write_selector(top)), None)
    config = {"method": "focusdd", "geometry": "squash", "max_pixels": 10**6, "side_ratio": 0.8}
    config |= {"attention": "gca", "precision": "fp32"}
    identity = {"format": "focusdd_det set", "task": "detect", "config": config}
    identity["selector"] = {"name": "vit.json", "sha256": vit.sha256, "spec": vit.spec, "view": vit.view}
    (top / "set" / "build.yaml").write_text(json.dumps(identity))
    (top / "set" / "COMPLETE").write_bytes(detset.seal(top / "set"))
    return top


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_gallery_set(tmp_path_factory.mktemp("gallery") / "set <b>", 90)
    write_gallery(folder, folder / NAME)
    return folder


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("NO BROWSER: the gallery is not tested; install chromium (apt-get install -y chromium)")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """The browser; after the test nothing may have gone wrong in it, and nothing may have left this machine."""
    shared_browser.problems.clear()
    shared_browser.requests.clear()
    yield shared_browser
    assert shared_browser.problems == []
    assert {url.partition(":")[0] for url in shared_browser.requests} <= {"file", "data", "about"}


def show(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.until(
        "document.querySelectorAll('.tile').length && !document.querySelector('#count').textContent.includes('reading')"
    )


def text(browser: Browser, selector: str) -> str:
    return str(browser.ask(f"document.querySelector({json.dumps(selector)}).innerText"))


def test_tiles_filters_order_and_search(browser: Browser, drawn: Path) -> None:
    show(browser, drawn / NAME)
    assert text(browser, "#count") == "90 composites"
    assert text(browser, "h1") == "set <b>"
    assert browser.ask("document.querySelector('.tile img').decode().then(() => true)")
    assert 0 < browser.ask("document.querySelectorAll('.tile').length") < 90
    browser.choose("#class", "2")
    assert text(browser, "#count") == "30 of 90"
    browser.choose("#class", "")
    browser.choose("#box", "0")
    assert text(browser, "#count") == f"{sum(any((i + k) % 3 == 0 for k in range(i % 4)) for i in range(90))} of 90"
    browser.choose("#box", "")
    browser.choose("#order", "most")
    assert browser.ask("document.querySelector('.tile[data-place=\"0\"]').dataset.item") == "3"
    browser.choose("#order", "number")
    browser.ask("document.querySelector('#search').focus()")
    browser.type("c00007")
    browser.until("document.querySelector('#count').textContent === '1 of 90'")
    browser.type(" nothing")
    browser.until("!document.querySelector('#empty').hidden")
    browser.click("#clear")
    assert text(browser, "#count") == "90 composites"


def test_boxes_on_and_off(browser: Browser, drawn: Path) -> None:
    show(browser, drawn / NAME)
    assert browser.ask("document.querySelectorAll('[data-item=\"3\"] .pic rect').length") == 3
    browser.click("#boxes")
    assert browser.ask("document.querySelectorAll('.pic rect').length") == 0
    browser.ask("document.querySelector('#grid').focus()")
    browser.key("b")
    assert browser.ask("document.querySelectorAll('[data-item=\"3\"] .pic rect').length") == 3


def test_pointer_and_keyboard_show_sources_and_scores(browser: Browser, drawn: Path) -> None:
    show(browser, drawn / NAME)
    browser.move('[data-item="3"]')
    browser.until("document.querySelector('#panel').dataset.item === '3'")
    panel = text(browser, "#panel")
    assert browser.ask("document.querySelectorAll('#panel .cell').length") == 4
    for told in ("p 0.2000 · share 0.6000", "crop 30 px at 5, 3 of 60", "Background", "✓ confirmed", "not confirmed",
                 "3 boxes · mean confidence 0.80", f"photos/odd/{EVIL.replace('/', '')}3_1.jpg"):  # fmt: skip
        assert told in panel.replace("\xa0", " ")
    browser.ask("document.querySelector('#grid').focus()")
    browser.key("ArrowRight", 39)
    browser.until("document.querySelector('#panel').dataset.item === '1'")
    browser.key("End", 35)
    browser.until("document.querySelector('#panel').dataset.item === '89'")
    browser.key("Enter", 13)
    browser.until("document.querySelector('#large').open")
    browser.until("document.querySelector('#large .stage img').src.endsWith('/images/train/c00089.jpg')")
    browser.key("ArrowLeft", 37)
    browser.until("document.querySelector('#place').textContent === '89 of 90'")
    browser.click("#close")
    assert browser.ask("document.querySelector('#large').open") is False


def test_names_of_a_set_never_run(browser: Browser, drawn: Path) -> None:
    show(browser, drawn / NAME)
    browser.move('[data-item="1"]')
    browser.until("document.querySelector('#panel').dataset.item === '1'")
    browser.click('[data-item="1"]')
    assert EVIL in text(browser, "#large")
    assert EVIL in text(browser, '[data-item="1"] .caption')
    assert browser.ask("window.ran") is None
    assert browser.ask("document.querySelectorAll('img[onerror]').length") == 0
    browser.ask("(s => (s.textContent = 'window.ran = 3', document.body.append(s)))(document.createElement('script'))")
    assert browser.ask("window.ran") is None  # the policy holds even for what gets into the page
    assert any("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()


def test_a_classification_set_and_a_page_elsewhere(browser: Browser, tmp_path: Path) -> None:
    folder = write_class_set(tmp_path / "set", names=("odd", "n02099601", "plain"))
    odd = "a#b %41?"  # what a link must not take for its own signs
    (folder / "train" / "odd").rename(folder / "train" / odd)
    lines = (folder / "manifest.jsonl").read_text().replace('"class_name":"odd"', f'"class_name":"{odd}"')
    (folder / "manifest.jsonl").write_text(lines)
    (folder / "data.yaml").write_bytes(detset.data_yaml((odd, "n02099601", "plain"), "classify"))
    assert main(["gallery", str(folder), f"out={tmp_path / 'page.html'}"]) == 0
    assert main(["gallery", str(folder)]) == 0
    show(browser, folder / NAME)
    assert "golden retriever" in text(browser, "#tiles")
    assert browser.ask("document.querySelector('#boxes').hidden")
    browser.click('[data-item="0"]')
    browser.until("document.querySelector('#large .stage img').src.startsWith('file:')")
    show(browser, tmp_path / "page.html")
    assert text(browser, "h1") == "set"
    browser.click('[data-item="0"]')
    assert browser.ask("document.querySelector('#file').hidden")


def test_attention_maps(
    browser: Browser, looked_at: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(looked_at / "set", tmp_path / "set")
    sources = shutil.copytree(looked_at / "sources", tmp_path / "sources")
    (sources / "odd" / "0_1.jpg").write_bytes(b"another")
    (sources / "odd" / "0_2.jpg").unlink()
    command = ["gallery", str(folder), f"sources=photos={sources}", f"selector={looked_at / 'vit.json'}"]
    logger = logging.getLogger("focusdd")
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logger, "propagate", True)
    assert main(command) == 0
    assert "1 cells have no attention map: another picture lies at its place now" in caplog.text
    show(browser, folder / NAME)
    picture = decode((sources / "odd" / "0_0.jpg").read_bytes())[0]
    vit = load_selector(str(looked_at / "vit.json"), None)
    pixels = torch.from_numpy(view_pixels(picture, vit.view, "squash")).permute(2, 0, 1)[None]
    expected = vit(pixels)[1][0]
    levels = browser.ask("[...atob(composite(0).cells[0].map)].map(c => c.charCodeAt(0))")
    np.testing.assert_allclose(levels, (expected / expected.max() * 255).flatten().numpy(), atol=1)
    assert browser.ask("composite(0).cells.map(c => Boolean(c.map))") == [True, False, False, True]
    assert browser.ask("composite(0).cells[0].place") == [0, 0, 60, 40]
    browser.click("#heat")
    assert browser.ask("document.querySelectorAll('.tile canvas.heat').length") == 6
    painted = "[...document.querySelector('[data-item=\"1\"] canvas').getContext('2d').getImageData(0,0,160,160).data]"
    assert browser.ask(f"{painted}.some(v => v > 0)")


def test_other_sources_and_selectors_are_refused(
    looked_at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sources = str(looked_at / "set"), f"sources=photos={looked_at / 'sources'}"
    (tmp_path / "vit.json").write_text((looked_at / "vit.json").read_text())
    state = {key: torch.zeros(2) for key in ("a",)}
    save_file(state, tmp_path / "vit.safetensors")
    assert main(["gallery", folder, sources, f"selector={tmp_path / 'vit.json'}"]) == 4
    shutil.copy(looked_at / "vit.safetensors", tmp_path / "vit.safetensors")
    spec = json.loads((tmp_path / "vit.json").read_text())
    (tmp_path / "vit.json").write_text(json.dumps(spec | {"classes": ["c", "b", "a"]}))
    assert main(["gallery", folder, sources, f"selector={tmp_path / 'vit.json'}"]) == 4
    assert "is not the selector of" in capsys.readouterr().err
    assert main(["gallery", folder, sources]) == 2
    assert "give selector=PATH/vit.json" in capsys.readouterr().err
    assert main(["gallery", folder, "sources=photo=x", f"selector={looked_at / 'vit.json'}"]) == 2
    assert "did you mean photos" in capsys.readouterr().err
    assert not (looked_at / "set" / NAME).exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["out={set}/page.html"], 2, "sealed"),
        (["out={set}/images/x.html"], 2, "sealed"),
        (["out=page.txt"], 2, "html"),
        (["tumb=80"], 2, "did you mean thumb"),
        (["thumb=big"], 2, "expected a whole number"),
        (["thumb=9"], 2, "32 to 640"),
        (["selector_weights=x"], 2, "sources= is missing"),
    ],
)
def test_wrong_commands(
    drawn: Path, words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gallery", str(drawn), *(word.format(set=drawn) for word in words)]) == code
    assert told in capsys.readouterr().err


def test_a_page_of_somebody_else_s_is_not_replaced(drawn: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("my page")
    assert main(["gallery", str(drawn), f"out={mine}"]) == 2
    assert mine.read_text() == "my page"
    mine.unlink()
    assert main(["gallery", str(drawn), f"out={mine}"]) == 0
    assert main(["gallery", str(drawn), f"out={mine}"]) == 0, "our own is"


def test_a_set_of_a_method_of_the_user_s_wants_its_file(
    looked_at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(looked_at / "set", tmp_path / "set")
    build = yaml.safe_load((folder / "build.yaml").read_text())
    build["config"]["method"] = "of_the_gallery"
    (folder / "build.yaml").write_text(yaml.safe_dump(build))
    words = ["gallery", str(folder), f"sources=photos={looked_at / 'sources'}", f"selector={looked_at / 'vit.json'}"]
    assert main(words) == 2
    assert "its method `of_the_gallery` is not known here: give plugins=PATH" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(
        "from focusdd_det.methods import register\nfrom focusdd_det.methods.focus import FocusDD\n"
        "register('of_the_gallery', type('Mine', (FocusDD,), {})())\n"
    )
    try:
        assert main([*words, f"plugins={tmp_path / 'mine.py'}"]) == 0
    finally:
        METHODS.pop("of_the_gallery", None)


def test_the_page_is_outside_the_hashes_and_always_the_same(drawn: Path, tmp_path: Path) -> None:
    assert detset.verify(drawn) == []
    folder = shutil.copytree(drawn, tmp_path / "another name")
    write_gallery(folder, folder / NAME)
    assert (folder / NAME).read_bytes() == (drawn / NAME).read_bytes()
    assert str(tmp_path) not in (folder / NAME).read_text()


def test_a_damaged_set_leaves_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_gallery_set(tmp_path / "set", 4)
    (folder / "images" / "train" / "c00002.jpg").write_bytes(b"")
    assert main(["gallery", str(folder)]) == 6
    assert "c00002.jpg: empty file" in capsys.readouterr().err
    assert not [path.name for path in folder.iterdir() if "gallery" in path.name]
    assert main(["gallery", str(tmp_path)]) == 6


def test_contact_sheets_as_png(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (drawn, write_class_set(tmp_path / "set")):
        out = tmp_path / f"{folder.name[:3]}.png"
        assert main(["sheet", str(folder), f"out={out}", "count=4", "columns=2"]) == 0
        assert out.read_bytes().startswith(b"\x89PNG\r\n")
        assert cv2.imread(str(out)).shape == (640, 640, 3)
        assert main(["sheet", str(folder), f"out={out}", "count=2"]) == 0  # a former one may be written over
    assert main(["sheet", str(drawn), f"out={tmp_path / 'sheet.gif'}"]) == 2
    assert "ends in .jpg or .png" in capsys.readouterr().err


def test_a_contact_sheet_is_written_over_no_other_picture(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(drawn, tmp_path / "set")
    mine = tmp_path / "mine.jpg"
    inside = next((folder / "images" / "train").iterdir())
    shutil.copy(inside, mine)
    before = mine.read_bytes()
    assert main(["sheet", str(folder), f"out={mine}"]) == 5
    assert "does not say that it is a contact sheet" in capsys.readouterr().err
    assert main(["sheet", str(folder), f"out={inside}"]) == 2
    assert main(["sheet", str(folder), f"out={folder / 'images' / 'sheet.jpg'}"]) == 2
    assert mine.read_bytes() == inside.read_bytes() == before
    assert main(["sheet", str(folder), f"out={folder / 'contact_sheet.jpg'}"]) == 0
    assert detset.verify(folder) == []


@pytest.mark.slow
def test_ten_thousand_composites(browser: Browser, tmp_path: Path) -> None:
    folder = write_gallery_set(tmp_path / "set", 10_000)
    write_gallery(folder, folder / NAME)
    show(browser, folder / NAME)
    assert text(browser, "#count") == "10,000 composites"
    for share in (0.3, 0.9, 1):
        browser.ask(f"(g => (g.scrollTop = {share} * g.scrollHeight))(document.querySelector('#grid'))")
        place = browser.until(
            "(g => { const seen = [...document.querySelectorAll('.tile')].filter(t => { const r ="
            " t.getBoundingClientRect(), s = g.getBoundingClientRect(); return r.bottom > s.top && r.top < s.bottom });"
            f" return seen.length && Number(seen[0].dataset.place) > {share - 0.05} * 10000"
            " && Number(seen[0].dataset.place) })(document.querySelector('#grid'))"
        )
        assert place < 10_000
        assert browser.ask("document.querySelectorAll('.tile').length") < 100
    browser.choose("#class", "0")
    assert text(browser, "#count") == "3,334 of 10,000"
    browser.ask("document.querySelector('#search').focus()")
    browser.type("c09999")
    browser.until("document.querySelector('#count').textContent === '1 of 10,000'")
