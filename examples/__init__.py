"""Short scripts to start from (`python examples/clip.py`), and the demo: `python -m examples.retrieval`."""
