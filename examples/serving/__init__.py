"""What ``examples/serve.py`` stands on: a model of bytes, and where the users' texts and memories are kept."""
