"""From annotation files to padded batches; knows tokenizers and images, not models."""
