"""Rows of ``bench/results`` as tables and figures."""
