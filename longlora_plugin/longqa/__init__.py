"""LongQA: from a folder of documents to long question-answer data (LongLoRA, section 4 and B.6).

The paper fine-tunes on long documents, each with a question about it and its answer. `documents`
reads files, `sections` cuts them to the context by whole sections, `wordings` phrases the rows,
`tasks` makes questions from the text itself, `endpoint` asks a model for them, `quality` checks
evidence and near-duplicates, `build` writes and resumes, `stats` describes a finished file.
"""
