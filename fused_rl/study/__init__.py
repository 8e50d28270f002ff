"""What each KL does, computed by this library and drawn: `fused-rl study`, for docs/kl.md."""
