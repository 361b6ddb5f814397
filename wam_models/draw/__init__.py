"""Pictures: masks, loss curves, films. Pillow only."""
