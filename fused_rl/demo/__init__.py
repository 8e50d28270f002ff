"""`fused-rl demo`: GRPO on a small transformers model, through the kernels."""
