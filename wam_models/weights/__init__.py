"""Weights in the layouts of other systems: what their keys are called, in and out, first steps from them, adapters."""
