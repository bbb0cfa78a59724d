"""The quoters, which sign quotes for the batcher."""
