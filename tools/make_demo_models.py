"""Train the two models of the demo on drawn pictures and write them to focusdd_det/demo/.

python tools/make_demo_models.py            # about 20 minutes on two idle cores
"""

import tempfile
from pathlib import Path

from focusdd_det.demo.quiet import keep_quiet

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as settings:
        keep_quiet(Path(settings))
        from focusdd_det.demo.train_models import main

        main()
