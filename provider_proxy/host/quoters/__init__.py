"""What signs quotes for the batcher."""
