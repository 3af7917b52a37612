"""`make demo`: texts, the pre-training of the bundled model, and the summary."""
