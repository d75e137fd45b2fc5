"""`focusdd export`, `annotations`, `pack`, `unpack` and `card`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from focusdd_det.commandline import read_options, spelled, wants_help
from focusdd_det.config import suggest
from focusdd_det.detset import part_path
from focusdd_det.disk import refuse_overlap, write_atomic
from focusdd_det.errors import ConfigError, VerifyError
from focusdd_det.interop.finished import FinishedSet, open_set
from focusdd_det.interop.folders import refuse_existing, require_space
from focusdd_det.progress import progress_bar

log = logging.getLogger("focusdd")

EXPORT_USAGE = """Write a finished set in the form that another program reads.

  focusdd export datasets/focusdd format=coco out=focusdd_coco                 COCO JSON and copies of the pictures
  focusdd export datasets/focusdd format=coco out=focusdd_coco images=set      the JSON alone, with paths in the set
  focusdd export datasets/focusdd_cls format=ddranking out=focusdd_ddranking
  focusdd export datasets/focusdd_cls format=rethinkdc out=focusdd_rethinkdc val=imagenet/val
  focusdd export datasets/focusdd format=coco out=focusdd_coco --dry-run

  format      coco (detection sets) | ddranking | rethinkdc (classification sets)
  out         new folder; it appears when it is whole. export.json in it says what it is
  categories  coco:      auto | coco (official ids, 1 to 90 with gaps) | contiguous (1 to n). auto: the official ones
              if every class is one of COCO's (default auto)
  images      coco:      copy | set (default copy)
  order       ddranking: auto | sorted (by class name, as ImageFolder numbers the real data) | set (as data.yaml does) |
              imagenette | imagewoof | imagemeow | imagesquawk | imagefruit | imageyellow (DD-Ranking's own lists).
              auto takes the subset that has just these classes, else sorted (default auto)
  val         rethinkdc: the folder that will be its --val-dir; refused if its classes differ

Every file is checked against the set's manifest on the way. --dry-run, --help.
"""

ANNOTATIONS_USAGE = """COCO annotations for a YOLO data set that has label files alone, for the official COCO mAP.

  focusdd annotations data=mine.yaml out=mine_coco
  focusdd annotations data=coco.yaml splits=val,train base=coco/annotations/instances_val2017.json out=coco_both
  python tools/val_coco.py model=best.pt data=mine_coco              the mAP; in a training: eval_data=mine_coco

  data        YOLO data.yaml
  splits      val | train | test, or several with commas, which are put together (default val)
  base        COCO annotations whose images, annotations and categories are taken over as they are; only pictures that
              it does not list, by file name, are added from labels
  subset      true leaves out what base lists and the splits do not hold (default false: refused)
  out         new folder; it appears when it is whole. images/ (hard links where possible), labels/,
              annotations/instances_<first split>.json and data.yaml

Labels are five columns, or polygons, which count as their boxes. A picture without objects has an empty label file; one
without a file is an error. Category ids are those of base, by name; without it COCO's official ones if every class is
one of COCO's, else 1 to n. --dry-run reads and checks everything and writes nothing. --help.
"""

PACK_USAGE = """Write a set, or a store of soft targets or labels, as one tar.

  focusdd pack datasets/focusdd out=focusdd.tar
  focusdd pack datasets/focusdd_targets out=focusdd_targets.tar
  focusdd pack datasets/focusdd out=focusdd.tar --dry-run

  out    new file; <out>.sha256 is written beside it
  log    true packs build.log.json (store.log.json) too: the machine, the command and the paths of the build
         (default false, so that the same set gives the same bytes wherever it was built)

The tar holds SHA256SUMS and, under set/, the files: `tar xf` and `sha256sum -c SHA256SUMS` work on it as well as
`focusdd unpack`. Every file is checked against the records of the set on the way. A pack that was killed leaves
.<out>.tmp, which the same command overwrites. --dry-run, --help.
"""

UNPACK_USAGE = """Unpack an archive of `focusdd pack`, every byte checked.

  focusdd unpack focusdd.tar out=datasets/focusdd
  focusdd unpack focusdd.tar out=datasets/focusdd --dry-run

  out    new folder; it appears when all is checked: against SHA256SUMS inside, against focusdd.tar.sha256 if that
         lies beside, and against the set's own manifest and COMPLETE

Archives that hold anything but regular files under safe names are refused. What a killed run left in <out>.incomplete
is removed by the same command, which begins anew. --dry-run reads the list alone. --help.
"""

CARD_USAGE = """Write a copy of a set's card (README.md, in Hugging Face's form) with measured numbers.

  focusdd card datasets/focusdd results=runs/detect/train/coco_eval.json out=card.md
  focusdd card datasets/focusdd_cls results=a/accuracy.json results=b/accuracy.json out=card.md
  focusdd card datasets/focusdd licence.train="ImageNet's terms of access" license=other out=card.md

  results         accuracy.json of tools/train_cls.py, coco_eval.json of tools/train_det.py or tools/val_coco.py; as
                  often as you like. A run that was trained on another set is refused
  licence.SOURCE  the licence of the pictures of a source, as the card names it
  license         the hub's id for the whole set, such as cc-by-4.0 (default other)
  pretty_name     the set's name on the hub
  out             new file, outside the set: the set's own card is sealed

--help.
"""


def export_command(argv: Sequence[str]) -> int:
    """`focusdd export SET format=... out=...`."""
    kinds = {"coco": ("categories", "images"), "ddranking": ("order",), "rethinkdc": ("val",)}
    keys = ("format", "out", "categories", "images", "order", "val")
    if wants_help(argv):
        print(EXPORT_USAGE)
        return 0
    folder, given, dry_run = _parse("export", argv, keys, ("format", "out"))
    kind = given.pop("format")
    if kind not in kinds:
        raise ConfigError(f"export: format={kind}: expected {', '.join(kinds)}{suggest(kind, list(kinds))}")
    out = Path(given.pop("out"))
    misplaced = [key for key in given if key not in kinds[kind]]
    if misplaced:
        raise ConfigError(
            f"export: {', '.join(misplaced)} is no option of format={kind}, which has {', '.join(kinds[kind])}"
        )
    source = open_set(folder)
    refuse_overlap(out, [folder])
    refuse_existing(out)
    count, size = _measure(source, pictures=given.get("images") != "set")
    if not dry_run:
        require_space(out, size)
    return {"coco": _coco, "ddranking": _ddranking, "rethinkdc": _rethinkdc}[kind](
        source, out, given, count, size, dry_run
    )


def _coco(source: FinishedSet, out: Path, given: Mapping[str, str], count: int, size: int, dry_run: bool) -> int:
    from focusdd_det.interop import coco

    numbering, images = given.get("categories", "auto"), given.get("images", "copy")
    for key, value, known in (("categories", numbering, coco.NUMBERINGS), ("images", images, coco.IMAGES)):
        if value not in known:
            raise ConfigError(f"export: {key}={value}: expected {', '.join(known)}{suggest(value, list(known))}")
    kinds = coco.categories(source.names, cast("coco.Numbering", numbering))
    coco.require_detection(source)
    if dry_run:
        return _planned(out, count, size, f"{len(kinds)} categories, ids {kinds[0]['id']} to {kinds[-1]['id']}")
    with progress_bar(count, "composites") as bar:
        made = coco.export_coco(source, out, cast("coco.Numbering", numbering), cast(Any, images), bar.update)
    where = "pictures in train/" if images == "copy" else f"pictures stay in {source.folder}"
    print(f"{out / coco.ANNOTATIONS}: {made['images']} images, {made['annotations']} annotations, {where}")
    return 0


def _ddranking(source: FinishedSet, out: Path, given: Mapping[str, str], count: int, size: int, dry_run: bool) -> int:
    from focusdd_det.interop import layouts

    order = given.get("order", "auto")
    folders = layouts.ddranking_folders(source, order)
    if dry_run:
        return _planned(out, count, size, _first(folders))
    with progress_bar(count, "composites") as bar:
        made = layouts.export_ddranking(source, out, order, bar.update)
    print(f"{out}: {made['images']} pictures in {len(made['classes'])} class folders; {_first(folders)}")
    print(_uneven(made))
    print(f'next: compute_metrics(image_path="{out / "train"}"), with ipc={max(made["per_class"])} and a')
    print("      custom_train_trans that ends in tensors: DD-Ranking opens the folder with ImageFolder")
    return 0


def _rethinkdc(source: FinishedSet, out: Path, given: Mapping[str, str], count: int, size: int, dry_run: bool) -> int:
    from focusdd_det.interop import layouts

    val = Path(given["val"]) if "val" in given else None
    folders = layouts.rethinkdc_folders(source, out, val)
    if dry_run:
        return _planned(out, count, size, _first(folders))
    with progress_bar(count, "composites") as bar:
        made = layouts.export_rethinkdc(source, out, val, bar.update)
    print(f"{out}: {made['images']} pictures in {len(made['classes'])} class folders; {_first(folders)}")
    print(_uneven(made))
    if val is None:
        print(
            "note: RethinkDC numbers classes by sorted folder name, here and in its --val-dir: that must have just "
            f"these {len(made['classes'])} class folders. val=DIR checks it"
        )
    print(f"next: rethinkdc {out / 'train'} --hard --ipc {max(made['per_class'])} --val-dir {val or 'VAL'}")
    return 0


def annotations_command(argv: Sequence[str]) -> int:
    """`focusdd annotations data=... out=...`."""
    if wants_help(argv):
        print(ANNOTATIONS_USAGE)
        return 0
    given, dry_run = _options("annotations", argv, ("data", "splits", "base", "subset", "out"), ("data", "out"))
    out = Path(given["out"])
    refuse_existing(out)
    from focusdd_det.interop import annotations

    splits = [split.strip() for split in given.get("splits", "val").split(",")]
    base = Path(given["base"]) if "base" in given else None
    truth = annotations.read_truth(given["data"], splits, base, given.get("subset", False))
    count, file = truth.count, out / annotations.file_of(truth.split)
    told = f"{file}: {count['images']} images, {count['annotations']} annotations"
    if base is not None:
        told += f", {count['official_images']} and {count['official_annotations']} of them from {base}"
    if dry_run:
        print(f"{told}. Nothing was written")
        return 0
    with progress_bar(len(truth.pictures), "pictures") as bar:
        annotations.write_truth(truth, out, bar.update)
    print(f"{told}\nnext: {spelled('detect val', 'model=...', f'data={out}')}")
    return 0


def pack_command(argv: Sequence[str]) -> int:
    """`focusdd pack SET out=set.tar`."""
    from focusdd_det.interop.pack import contents, pack

    if wants_help(argv):
        print(PACK_USAGE)
        return 0
    folder, given, dry_run = _parse("pack", argv, ("out", "log"), ("out",))
    out = Path(given["out"])
    refuse_existing(out)
    found = contents(folder, given.get("log", False))
    if dry_run:
        print(f"{found.kind}: {len(found.files)} files\n{out}: {found.size:,} bytes, and {out.name}.sha256")
        return 0
    with progress_bar(len(found.files), "files") as bar:
        digest = pack(folder, out, found, bar.update)
    print(f"{out}: {found.kind}, {len(found.files)} files, {found.size:,} bytes\nsha256 {digest} ({out.name}.sha256)")
    return 0


def unpack_command(argv: Sequence[str]) -> int:
    """`focusdd unpack set.tar out=DIR`."""
    from focusdd_det.interop.pack import peek, unpack

    if wants_help(argv):
        print(UNPACK_USAGE)
        return 0
    archive, given, dry_run = _parse("unpack", argv, ("out",), ("out",))
    out = Path(given["out"])
    refuse_existing(out)
    sums, size = peek(archive)
    if dry_run:
        print(f"{archive}: {len(sums)} files, {size:,} bytes; to {out}. What they hold was not looked at")
        return 0
    beside = archive.with_name(archive.name + ".sha256")
    with progress_bar(len(sums), "files") as bar:
        kind, count = unpack(archive, out, bar.update)
    checked = f"SHA256SUMS, {beside.name}" if beside.exists() else f"SHA256SUMS (no {beside.name} beside it)"
    print(f"{out}: {kind}, {count} files, checked against {checked} and its own records")
    return 0


def card_command(argv: Sequence[str]) -> int:
    """`focusdd card SET results=accuracy.json out=card.md`."""
    from focusdd_det.interop.card import card_with_results

    if wants_help(argv):
        print(CARD_USAGE)
        return 0
    keys = ("results", "license", "pretty_name", "out")
    folder, given, _ = _parse("card", argv, keys, ("out",), prefix="licence.")
    out = Path(given["out"])
    licences = {key.removeprefix("licence."): value for key, value in given.items() if key.startswith("licence.")}
    head: dict[str, str] = {key: given[key] for key in ("license", "pretty_name") if key in given}
    files = [Path(str(name)) for name in given.get("results", ())]
    if not (files or licences or head):
        raise ConfigError("card: nothing to add: give results=, licence.SOURCE=, license= or pretty_name=")
    source = open_set(folder)
    if folder.resolve() in out.resolve().parents:
        raise ConfigError(f"card: out={out} lies in {folder}: a set stays as it was sealed. Choose another `out`")
    refuse_existing(out)
    write_atomic(out, card_with_results(source, files, licences, head).encode())
    print(f"{out}: the card of {folder}" + (f" with {len(files)} results" if files else ""))
    return 0


# --- words -> keys and values

_TYPES: dict[str, Any] = {"log": bool, "subset": bool, "results": tuple[Any, ...]}  # of options that are no text


def _parse(
    command: str, argv: Sequence[str], keys: Sequence[str], needed: Sequence[str], prefix: str = "\0"
) -> tuple[Path, dict[str, Any], bool]:
    """The place that comes first, the options, and whether it is a dry run.

    Raises:
        ConfigError: all problems at once.
    """
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        raise ConfigError(
            f"{command}: expected a path first, got {argv[0] if argv else 'nothing'}; --help has examples"
        )
    return Path(argv[0]), *_options(command, argv[1:], keys, needed, prefix)


def _options(
    command: str, argv: Sequence[str], keys: Sequence[str], needed: Sequence[str], prefix: str = "\0"
) -> tuple[dict[str, Any], bool]:
    """The options, and whether it is a dry run. Any key that begins with `prefix` is one, too.

    Raises:
        ConfigError: all problems at once.
    """
    hints: dict[str, Any] = {**{key: _TYPES.get(key, str) for key in keys}, "dry_run": bool}
    named = (word.lstrip("-").partition("=")[0] for word in argv)
    hints |= {key: str for key in named if key.startswith(prefix)}
    values = read_options(command, argv, hints, needed)
    return values, values.pop("dry_run", False)


def _measure(source: FinishedSet, pictures: bool) -> tuple[int, int]:
    """Number of composites, and about how many bytes an export of them takes."""
    count = size = 0
    for item in source.items():
        count += 1
        size += 400 + 300 * item.boxes
        path = part_path(source.folder, "images", item)
        try:
            size += path.stat().st_size if pictures else 0
        except OSError as error:
            raise VerifyError(f"cannot read {path}: {error.strerror}; get the set again") from error
    return count, size


def _planned(out: Path, count: int, size: int, detail: str) -> int:
    print(f"{out}: {count} composites, about {size / 1e6:.1f} MB; {detail}. Nothing was written")
    return 0


def _first(folders: Mapping[str, str]) -> str:
    """The first folders with their classes, in words."""
    pairs = sorted((folder, name) for name, folder in folders.items())
    shown = ", ".join(f"{folder} = {name}" for folder, name in pairs[:3])
    return f"class folders {shown}" + (", ..." if len(pairs) > 3 else "")


def _uneven(made: Mapping[str, Any]) -> str:
    few, many = min(made["per_class"]), max(made["per_class"])
    return (
        f"{few} pictures a class" if few == many else f"note: the classes have {few} to {many} pictures, not the same"
    )
