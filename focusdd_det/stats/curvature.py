"""How sharp the minimum is that a student reached on a set: the Hessian trace of its training loss (Fig. 8)."""

from __future__ import annotations

from dataclasses import dataclass

from focusdd_det.stats.hessian import Trace


@dataclass(frozen=True)
class Sharpness:
    """What was measured of one checkpoint.

    Attributes:
        weights: the checkpoint.
        loss: what the trace is of, in words.
        trace: of the Hessian of that loss, the mean over the set's pictures.
        pictures: of the set; size: px they were shown at.
        accuracy: of a classifier, the share of the set's own pictures that it gets right: training accuracy, no test.
    """

    weights: str
    loss: str
    trace: Trace
    pictures: int
    size: int
    accuracy: float | None = None

    def plain(self) -> dict[str, object]:
        """As it stands in stats.json."""
        found: dict[str, object] = {
            "weights": self.weights,
            "hessian_trace": self.trace.mean,
            "standard_error": self.trace.standard_error,
            "probes": list(self.trace.probes),
            "parameters": self.trace.parameters,
            "loss": self.trace.loss,
            "loss_is": self.loss,
            "pictures": self.pictures,
            "size": self.size,
        }
        return found if self.accuracy is None else {**found, "accuracy_on_the_set": self.accuracy}

    def line(self) -> str:
        """In words."""
        t = self.trace
        error = "one probe: no error" if t.standard_error is None else f"± {t.standard_error:.4g}"
        right = "" if self.accuracy is None else f", accuracy {100 * self.accuracy:.1f} %"
        return (
            f"{self.weights}: Hessian trace {t.mean:.4g} {error} ({len(t.probes)} probes, {t.parameters} weights), "
            f"{self.loss} {t.loss:.4g}{right}, on {self.pictures} pictures of {self.size} px"
        )
