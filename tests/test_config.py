"""Config files and command lines."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from focusdd_det.build import load_config
from focusdd_det.commandline import parse_tokens
from focusdd_det.config import BuildConfig, as_plain, cfg_dir, load, read_yaml
from focusdd_det.errors import ConfigError

HINTS = get_type_hints(BuildConfig)


def test_the_shipped_config_loads_and_has_a_comment_a_key() -> None:
    config = load_config()
    text = (cfg_dir() / "build_det.yaml").read_text()
    assert (config.ipc, config.grid, config.n_key, config.alpha, config.side_ratio) == (50, 2, 3, 30.0, 0.8)
    for key in HINTS:
        line = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
        assert "# " in line, f"{key} has no comment"


def test_every_shipped_yaml_is_safe_yaml() -> None:
    shipped = list(cfg_dir().glob("*.yaml"))
    assert len(shipped) > 10
    for path in shipped:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["ipc=5"], {"ipc": 5}),
        (["--ipc", "5", "--out", "a b"], {"ipc": 5, "out": "a b"}),
        (["--ipc=5", "alpha=1e-3"], {"ipc": 5, "alpha": 0.001}),
        (["--overwrite", "--ipc", "5"], {"overwrite": True, "ipc": 5}),
        (["--overwrite", "false"], {"overwrite": False}),
        (["--short-class", "skip"], {"short_class": "skip"}),
        (["--source", "a", "--source", "b::m.yaml"], {"sources": ["a", "b::m.yaml"]}),
        (["classes=dog,cat"], {"classes": "dog,cat"}),
        (["scores="], {"scores": None}),
        (["licence.my-own.set-1=CC0", "--made-by.a-b", "x"], {"licence.my-own.set-1": "CC0", "made_by.a-b": "x"}),
        (["ipc=1", "--ipc", "2"], {"ipc": 2}),
        (["sources=[a, b]", "--source", "c"], {"sources": ["a", "b", "c"]}),
        (["sources=[{path: a, map: m.yaml}]", "source=007"], {"sources": [{"path": "a", "map": "m.yaml"}, "007"]}),
        (["out=0010", "classes=00042", "--scores", "1_000"], {"out": "0010", "classes": "00042", "scores": "1_000"}),
        (["out=true", "method=2024-01-01", "teacher=~"], {"out": "true", "method": "2024-01-01", "teacher": "~"}),
        (["out=null", "scores=none", "grow_from=null"], {"out": "null", "scores": "none", "grow_from": None}),
        (["classes=[a, b]", "levels=null", "out=[1]"], {"classes": ["a", "b"], "levels": None, "out": "[1]"}),
        (["view=auto", "threads=010", "own_conf=null"], {"view": "auto", "threads": 8, "own_conf": None}),
    ],
)
def test_command_lines(tokens: list[str], expected: dict[str, object]) -> None:
    assert parse_tokens(tokens, HINTS, {"source": "sources"}) == expected


@pytest.mark.parametrize(("tokens", "message"), [(["ipc"], "key=value"), (["--ipc"], "needs a value")])
def test_tokens_that_are_neither(tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_tokens(tokens, HINTS, {})


def test_all_problems_come_at_once_with_suggestions() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ipcc=3, geometry="squish", alpha="much", n_key=None)
    message = str(caught.value)
    for part in ("`ipcc`, did you mean ipc?", "did you mean squash?", "alpha='much'", "n_key=None"):
        assert part in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ipc", 0), ("grid", 5), ("n_key", -1), ("image_size", 31), ("grids", [2, 5]),
        ("side_ratio", 0), ("side_ratio", 1.1), ("least_entropy", -0.1), ("least_entropy", 8.1),
        ("alpha", -1), ("alpha", float("nan")), ("conf", 1.0), ("levels", "exact,weak"), ("jpeg_quality", 101),
        ("max_bad", 2), ("batch", 0), ("seed", 1.5), ("overwrite", "yes"), ("view", "big"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(**{key: value})


def test_a_file_of_ones_own_is_overridden_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("ipc: 7\nseed: 3\nsources: [a, {path: b, map: m.yaml}]\n")
    config = load_config(tmp_path / "my.yaml", seed=4)
    assert (config.ipc, config.seed) == (7, 4)
    assert config.sources == ("a", {"path": "b", "map": "m.yaml"})
    (tmp_path / "my.yaml").write_text("ipcs: 7\n")
    with pytest.raises(ConfigError, match=r"my.yaml: unknown key `ipcs`, did you mean ipc"):
        load_config(tmp_path / "my.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "!!python/object/apply:os.system ['touch canary']", "7"])
def test_files_that_are_no_config(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_yaml(tmp_path / "bad.yaml")
    assert not (tmp_path / "canary").exists()


def test_a_config_survives_yaml() -> None:
    config = load_config(sources=["x"], levels="exact")
    again = load(BuildConfig, "build_det.yaml", yaml.safe_load(yaml.safe_dump(as_plain(config))))
    assert again == config
