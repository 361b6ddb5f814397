"""``python -m bench``, which ``wam bench`` starts."""

import sys

from bench.cli import main

sys.exit(main())
