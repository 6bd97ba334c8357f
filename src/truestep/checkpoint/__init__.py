"""What remains after a process: crash-safe checkpoints, and the finished model as a Hugging Face folder."""
