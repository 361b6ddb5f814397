"""``python -m wam_models.cli`` is ``wam``."""

import sys

from . import main

sys.exit(main())
