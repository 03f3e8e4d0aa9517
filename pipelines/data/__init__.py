"""Data sets: files of any format become rows, and rows become model inputs.

    file ── records, sources ──► Record ── conversations ──► TrainingRow ── chat, collate ──► Batch
                                    └────── prompts ────────► messages to answer

Reading order: `rows`, `images`, `conversations`, `training_rows`, `chat`, `collate`; then `sources` and
`prompts`, which captioning and scoring use, and the readers of single formats.
"""
