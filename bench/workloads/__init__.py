"""What suites run on, and what several of them need to make it."""
