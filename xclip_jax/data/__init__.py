"""Reads and prepares data: videos, annotations, prepared data sets, batches, tokenizers."""
