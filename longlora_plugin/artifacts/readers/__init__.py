"""Scripts that score a row of tokens in an inference engine, run by that engine's own Python.

The command line is `reader.py FOLDER TOKENS.json OUT.json`. A reader loads the model in FOLDER and
writes `version` and `scores`: the log-likelihood in nats of each token but the first, null where
the engine does not tell it. The last line on standard error with "Error" in it is the reason of a
failure. Nothing here imports this package.
"""
