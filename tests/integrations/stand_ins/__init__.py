"""Small models with the classes, attributes, tensor layouts and masks of public world-action models.

Written from the documented interfaces for these tests; no code of those projects. Each runs in float32 on a CPU.
"""
