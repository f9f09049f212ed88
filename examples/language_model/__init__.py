"""A small language model with fast-weight memories, trained on short sequences and read over long ones."""
