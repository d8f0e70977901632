"""Reading and preparing data: videos, annotations, prepared data sets, batches, tokenizers."""
