"""Drop-in backends: one line accelerates the world-action models of others. Nothing is patched at import."""
