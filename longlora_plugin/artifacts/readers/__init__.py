"""Scripts that score a row of tokens in an inference engine, run by that engine's own Python.

The command line is `reader.py TOKENS.json FOLDER OUT.json [FOLDER OUT.json …]`. A reader loads the
model of each FOLDER and writes `version` and `scores`: the log-likelihood in nats of each token but
the first, null where the engine does not tell it; or `error`: why it could not. Nothing here
imports this package.
"""
