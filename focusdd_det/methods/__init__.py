"""Ways to choose: FocusDD, the baselines and our own, behind one interface; docs/methods.md has them all.

`method=` names one. A method is an object with the attributes of `Method`, entered into METHODS by `register`; nothing
else has to know of it. Yours can lie in a file of your own: `plugins=my_methods.py method=mine`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from focusdd_det.errors import ConfigError
from focusdd_det.methods.base import Base, Method, check_order, is_monotone, monotone, shuffled
from focusdd_det.methods.baselines import REALISM_LEAST, RandomCrops, Realism, Whole
from focusdd_det.methods.coresets import Herding, KMeans, by_clusters, by_herding
from focusdd_det.methods.focus import FocusDD, LeastAttention, RandomAttention, RankedCrops
from focusdd_det.methods.teacher import TeacherWindows, window_scores

__all__ = [
    "METHODS",
    "REALISM_LEAST",
    "Base",
    "FocusDD",
    "Herding",
    "KMeans",
    "LeastAttention",
    "Method",
    "RandomAttention",
    "RandomCrops",
    "RankedCrops",
    "Realism",
    "TeacherWindows",
    "Whole",
    "by_clusters",
    "by_herding",
    "check_order",
    "is_monotone",
    "monotone",
    "register",
    "shuffled",
    "window_scores",
]

_REQUIRED = tuple(name for name in (*Method.__annotations__, *vars(Method)) if not name.startswith("_"))

METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Enter a method under a name; a newer version of the same class in the same file takes its place.

    Raises:
        ConfigError: the name is taken by another class, or the object is no method.
    """
    if isinstance(method, type):
        raise ConfigError(
            f"method `{name}`: register an object, not the class: register({name!r}, {method.__name__}())"
        )
    lacking = [each for each in _REQUIRED if not hasattr(method, each)]
    if lacking:
        raise ConfigError(
            f"method `{name}`: {type(method).__name__} has no {', '.join(lacking)}; derive it from "
            "focusdd_det.methods.Base, which has all but `order` and `crop`"
        )
    if name in METHODS and _origin(METHODS[name]) != _origin(method):
        raise ConfigError(f"method `{name}` exists already ({type(METHODS[name]).__name__}); choose another name")
    METHODS[name] = method


def _origin(method: Method) -> tuple[str, str]:
    """Class and file: what stays the same when a plugin is changed."""
    file = getattr(sys.modules.get(type(method).__module__), "__file__", None)
    return type(method).__qualname__, Path(file or "").name


register("focusdd", FocusDD())
register("random", RandomCrops())
register("whole", Whole())
register("herding", Herding())
register("kmeans", KMeans())
register("realism", Realism())
register("min_as", LeastAttention())
register("random_as", RandomAttention())
register("ranked_crops", RankedCrops())
register("teacher", TeacherWindows())
