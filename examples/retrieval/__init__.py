"""Text retriever trained with FusedInfoNCELoss, measured, and asked questions: `python -m examples.retrieval`."""
