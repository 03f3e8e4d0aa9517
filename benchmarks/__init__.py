"""Measured claims: every number of docs/benchmarks/ is printed by a script in this folder.

    python -m benchmarks list                  what each benchmark answers and needs
    python -m benchmarks run NAME [options]    measure; writes Markdown and JSON
    python -m benchmarks figures               draw figures, and put the pages' numbers side by side

Read `_registry` first, then one benchmark; `_measure` and `_record` are shared by all.
"""
