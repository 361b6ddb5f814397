"""What this library is compared with: attention and norms of other libraries, and plain PyTorch."""
