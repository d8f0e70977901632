"""Converts PyTorch checkpoints to model directories and back."""
