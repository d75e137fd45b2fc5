"""The secondary path: classification.

a set of composites by class -> views drawn per (epoch, picture) -> a teacher's logits, live or stored beforehand
                             -> student trained from scratch on them -> top-1 on real pictures
"""

from __future__ import annotations

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its newest version when imported
