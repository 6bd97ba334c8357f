"""What remains after the process: crash-safe checkpoints, and the finished model as a Hugging Face folder."""
