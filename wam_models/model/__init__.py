"""The dual-expert model, its weights and its checkpoints."""
