"""What the rooms of the models have in common: checks, files, JSON, sizes, CPU threads.

For this repository; nothing of it is public.
"""
