"""`python -m focusdd_det`: the same as `focusdd`."""

import sys

from focusdd_det.cli import main

sys.exit(main())
