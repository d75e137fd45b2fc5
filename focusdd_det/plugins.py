"""Python files of the user's own that add methods (`methods.register`) and backbones, named by `plugins=`.

They run as any program that the user starts: only files that the user names are ever loaded, never one that a set, a
checkpoint or a config from elsewhere brings along. Their content is part of what determines a set.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from focusdd_det.errors import ConfigError

_MODULE = "focusdd_det_plugin_"  # and the beginning of the content's hash
_loaded: dict[str, str] = {}  # file name -> hash of the content that ran last


def load_plugins(files: Iterable[str]) -> dict[str, str]:
    """Run each file once, whatever the number of calls; again when its content is another than the last time.

    Returns:
        File name -> sha256 of its content.

    Raises:
        ConfigError: a file is missing, is not Python, or fails.
    """
    hashes: dict[str, str] = {}
    for file in files:
        path = Path(file).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"plugins: cannot read {path}: {error.strerror or error}; expected a Python file of yours"
            ) from error
        if path.suffix != ".py":
            raise ConfigError(f"plugins: {path}: expected a Python file (.py)")
        digest = hashlib.sha256(content).hexdigest()
        if path.name in hashes:
            raise ConfigError(f"plugins: two files are called {path.name}; rename one of them")
        hashes[path.name] = digest
        if _loaded.get(path.name) != digest:
            _run(path, digest)
            _loaded[path.name] = digest
    return hashes


def content_of(thing: object) -> list[str]:
    """Names for the content of the user's files that an object's class and its bases come from; none if it is ours."""
    return [cls.__module__ for cls in type(thing).__mro__ if cls.__module__.startswith(_MODULE)]


def _run(path: Path, digest: str) -> None:
    name = f"{_MODULE}{digest[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugins: {path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in it look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"plugins: {path} failed ({type(error).__name__}: {error}); fix the file") from error
