"""SingLoRA for Stable Diffusion: train a subject adapter, generate with it, score it."""

__version__ = "0.1.0"
