"""Kernels for training with a cover: a learned policy's scores, its choice, reading, and all gradients."""
