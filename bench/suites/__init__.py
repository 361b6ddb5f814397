"""One module a suite, each with ``rows(options)``; their registry is ``bench/registry.py``. None imports another."""
