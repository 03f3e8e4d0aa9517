"""The fine-tuning job on Ray Train.

Reading order: `config`, `job`, `checks` (before the start), `data` and `batches` (rows, assigned to steps),
`answers` (for rows without any), `objective` (losses, with or without a teacher), `on_policy` (the student's
own answers), `teacher_cache`, `learner` (training without Ray), `worker` (one process of Ray Train), `folder`
(resume), `progress`, `flops`, `memory`.
"""
