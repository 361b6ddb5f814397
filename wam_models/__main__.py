"""``python -m wam_models`` is ``wam``."""

import sys

from .cli import main

sys.exit(main())
