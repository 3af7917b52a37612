"""RULER's tasks on the quickstart's models, and on models whose score is known (`make ruler`)."""
