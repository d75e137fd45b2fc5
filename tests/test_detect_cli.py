"""The command line of training and evaluation: every key of Ultralytics beside ours, typos, plans, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, tiny_yaml
from ultralytics.utils import DEFAULT_CFG_DICT

from focusdd_det.cli import main, run_main
from focusdd_det.errors import ConfigError
from focusdd_det.training import command as detect_cli
from focusdd_det.training.supervision import Options

KNOWN: dict[str, Any] = {**DEFAULT_CFG_DICT, **dict.fromkeys(Options.keys()), "dry_run": False}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["epochs=3", "lr0=0.02"], {"epochs": 3, "lr0": 0.02}),
        (["--epochs", "3", "--lr0=0.02"], {"epochs": 3, "lr0": 0.02}),
        (["--kl-cls", "2", "kl_dfl=0.5"], {"kl_cls": 2, "kl_dfl": 0.5}),
        (["epochs", "=", "3"], {"epochs": 3}),
        (["epochs=", "3"], {"epochs": 3}),
        (["freeze=[0,", "1]"], {"freeze": [0, 1]}),
        (["--exist-ok", "--dry-run"], {"exist_ok": True, "dry_run": True}),
        (["--cos_lr", "false"], {"cos_lr": False}),
        (["train", "name=007", "teacher=1e3.pt"], {"name": "007", "teacher": "1e3.pt"}),
        (["data=my set/with spaces"], {"data": "my set/with spaces"}),
        (["teacher=none", "device=null"], {"teacher": None, "device": None}),
        (["resume"], {"resume": True}),
        (["--resume", "runs/last.pt"], {"resume": "runs/last.pt"}),
    ],
)
def test_words_become_keys_and_values(words: list[str], expected: dict[str, Any]) -> None:
    assert detect_cli.parse(words, KNOWN) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["techer=a.pt"], "did you mean teacher"),
        (["--kl_temprature", "2"], "did you mean kl_temperature"),
        (["epoch=3"], "did you mean epochs"),
        (["xyzzy=3", "epoch=3"], "`xyzzy`; --help lists the options\nunknown option `epoch`"),
        (["--epochs"], "epochs needs a value"),
        (["epochs="], "has no value"),
        (["project=", "--dry-run"], "project= has no value"),
        (["teacher=", "epochs=3"], "teacher= has no value"),
        (["freeze=[0,1"], "unmatched bracket"),
    ],
)
def test_mistakes_get_a_suggestion(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        detect_cli.parse(words, KNOWN)


def test_shipped_yaml_is_commented_and_loads() -> None:
    overrides = detect_cli.train_overrides({"teacher": "t.pt"})
    assert overrides["optimizer"] == "SGD"
    assert (overrides["lr0"], overrides["momentum"]) == (0.01, 0.937)
    assert Options.of(overrides) == Options(teacher="t.pt")
    detect_cli._check_values(overrides)
    text = (REPOSITORY / "cfg" / "train_det.yaml").read_text()
    for line in text.splitlines():
        assert not line or line.startswith("#") or re.search(r"# \((str|int|float|bool|list)\) ", line), line
    assert set(Options.keys()) <= set(yaml.safe_load(text))


def test_precedence_is_shipped_file_command_line(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("kl_cls: 3\nepochs: 7\n")
    overrides = detect_cli.train_overrides({"cfg": str(mine), "epochs": 9})
    assert (overrides["kl_cls"], overrides["epochs"], overrides["kl_dfl"]) == (3, 9, 1.0)
    mine.write_text("kl_clss: 3\n")
    with pytest.raises(ConfigError, match="did you mean kl_cls"):
        detect_cli.train_overrides({"cfg": str(mine)})


def test_a_resumed_run_keeps_its_own_settings() -> None:
    assert detect_cli.train_overrides({"resume": True, "model": "a/last.pt"}) == {"resume": "a/last.pt"}
    assert detect_cli.train_overrides({"resume": "a/last.pt", "device": "cpu"}) == {
        "resume": "a/last.pt",
        "device": "cpu",
    }


def test_help_lists_every_own_key_and_parses(capsys: pytest.CaptureFixture[str]) -> None:
    for command, keys in ((detect_cli.train, Options.keys()), (detect_cli.val_coco, ("annotations", "subset"))):
        assert run_main(command, ["--help"]) == 0
        said = capsys.readouterr().out
        assert all(key in said for key in keys)
    for line in detect_cli.TRAIN_USAGE.splitlines():
        if "tools/train_det.py" in line:
            detect_cli.parse(line.split("train_det.py")[1].split(), KNOWN)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["techer=a.pt"], 2),
        (["epochs=many", "supervision=labels", "data=x"], 2),
        (["supervision=nothing"], 2),
        (["supervision=labels", "data=/nowhere"], 3),
        (["supervision=labels", "data=SET", "device=cpu0"], 2),
        (["supervision=labels", "data=SET", "device=cuda:99"], 2),
        (["supervision=labels", "data=SET", "optimizer=Foo"], 2),
        (["supervision=labels", "data=SET", "batch=2.5"], 2),
        (["supervision=labels", "data=SET", "batch=0"], 2),
        (["supervision=labels", "data=SET", "imgsz=0"], 2),
        (["supervision=labels", "data=SET", "freeze=abc"], 2),
        (["teacher=/nowhere.pt", "data=SET"], 4),
    ],
)
def test_exit_codes(words: list[str], code: int, drawn_set: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("SET", str(drawn_set)) for word in words]
    assert run_main(detect_cli.train, [*words, f"project={tmp_path / 'runs'}"]) == code
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(
    drawn_set: Path, teacher_file: Path, drawn_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data={drawn_set}", f"teacher={teacher_file}", f"eval_data={drawn_coco}", "--dry-run", "kl_cls=2"]
    assert main(["detect", "train", *words, f"project={tmp_path / 'runs'}"]) == 0
    said = capsys.readouterr().out
    for part in ("10 composites", "teacher.pt", "instances_val.json", "kl_cls=2", "optimizer=SGD", "yolo11n.yaml"):
        assert part in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "word",
    ["model=yolo11n-seg.yaml", "distill_model=x.pt", "split=test", "single_cls=True", "cache=disk"],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    word: str, drawn_set: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"data={drawn_set}", f"teacher={teacher_file}", word, f"project={tmp_path / 'runs'}"]
    assert main(["detect", "train", *words, "--dry-run"]) == 2
    assert main(["detect", "train", *words]) == 2
    assert list(tmp_path.iterdir()) == []


def test_what_follows_a_training_can_be_copied(
    drawn_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from focusdd_det.commandline import spelled

    assert spelled("detect train", "data=my set/é") == "focusdd detect train 'data=my set/é'"
    monkeypatch.setattr("sys.argv", ["tools/build_det_set.py", "--ipc", "1"])
    assert spelled("detect val", "model=last.pt") == "python tools/val_coco.py model=last.pt"


def test_train_then_val(
    drawn_set: Path, teacher_file: Path, drawn_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_yaml(tmp_path)), "--data", str(drawn_set), "--teacher", str(teacher_file)]
    small = ["epochs=1", "imgsz=64", "batch=5", "device=cpu", "plots=False", f"project={tmp_path}", "name=run"]
    assert main(["detect", "train", *words, *small]) == 0
    last = tmp_path / "run" / "weights" / "last.pt"
    said = capsys.readouterr()
    assert f"focusdd detect val model={last} data=datasets/coco.yaml set={drawn_set}" in said.out + said.err
    out = tmp_path / "result.json"
    more = [f"data={drawn_coco}", f"set={drawn_set}", "imgsz=64", "device=cpu", f"out={out}"]
    assert main(["detect", "val", f"model={last}", *more]) == 0
    assert "COCO mAP by pycocotools" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["settings"]["conf"] == 0.001
    assert result["covered_classes"] == ["disc", "square", "bar"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["modl=a.pt"], 2),
        ([], 2),
        (["model=TEACHER"], 2),
        (["model=TEACHER", "annotations=/nowhere.json", "images=/nowhere"], 3),
        (["model=/nowhere.pt", "annotations=/nowhere.json", "images=/nowhere"], 4),
        (["model=TEACHER", "data=DATA", "imgsz=big"], 2),
        (["model=TEACHER", "data=DATA", "device=cuda:99"], 2),
    ],
)
def test_val_exit_codes(words: list[str], code: int, teacher_file: Path, drawn_coco: Path) -> None:
    given = [word.replace("TEACHER", str(teacher_file)).replace("DATA", str(drawn_coco)) for word in words]
    assert run_main(detect_cli.val_coco, given) == code


def test_tools_are_thin() -> None:
    for name in ("train_det.py", "val_coco.py"):
        text = (REPOSITORY / "tools" / name).read_text()
        assert len(text.splitlines()) <= 40
        assert f"python tools/{name}" in text


def test_every_key_of_ultralytics_in_both_spellings() -> None:
    from ultralytics.utils import DEFAULT_CFG_DICT

    from focusdd_det.training.arguments import parse

    for key, default in DEFAULT_CFG_DICT.items():
        value = "False" if isinstance(default, bool) else "0.5"
        assert parse([f"{key}={value}"], DEFAULT_CFG_DICT) == parse([f"--{key}", value], DEFAULT_CFG_DICT), key
    assert parse(["--val", "False"], DEFAULT_CFG_DICT) == {"val": False}
    assert parse(["detect", "train", "--val"], DEFAULT_CFG_DICT) == {"val": True}
