"""Weights of Hugging Face checkpoints, in and out."""
