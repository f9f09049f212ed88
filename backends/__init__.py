"""One folder per framework, each with ops.py (pure functions) and layer.py (the module)."""
