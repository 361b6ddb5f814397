"""``python -m bench`` is ``wam bench``."""

import sys

from wam_models.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
