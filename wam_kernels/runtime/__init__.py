"""What the ops have in common: checks, choice of a backend, autograd, the extension, index buffers, launch choices.

For this repository; nothing of it is public.
"""
