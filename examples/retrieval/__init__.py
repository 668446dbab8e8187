"""Train a small text retriever with FusedInfoNCELoss, measure it, ask it questions: `python -m examples.retrieval`."""
