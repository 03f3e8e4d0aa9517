"""Data sets: files of any format become rows, and rows become model inputs.

    file ── records, sources ──► Record ── conversations ──► TrainingRow ── chat, collate ──► Batch
                                    └────── prompts ────────► messages to answer

Reading order: `rows`, `images` with `damage` (broken metadata), `conversations` with `turns` and
`message_parts`, `media` (rows that are rejected), `training_rows` with `rejects`, `chat` with
`special_tokens`, `collate`. Then `sources` and `prompts`, which captioning and scoring use, with `literals`
and `instructions`.

Files: `folders` finds them, `formats` knows their suffixes, `storage` opens them. `records` reads JSON (with
`json_items`) and tables (`columnar`, with `arrow_files`, `parquet_cells` and `presence`), `tar_records`
WebDataset tars, and `tsv_records` VLMEvalKit's tables. `encoded` decodes base64. `error_limit` limits
the share of error rows. `shapes_words` are the words of the data that `pipelines.shapes` generates.
"""
