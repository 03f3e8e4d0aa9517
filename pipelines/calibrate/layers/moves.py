"""Moves of the greedy search: skipped tokens bypass the FFN of more layers, or leave after an earlier one."""

from __future__ import annotations

from collections.abc import Sequence

from skipvision.config import SkipConfig


def before_all(config: SkipConfig) -> SkipConfig:
    """Return the config from which the search starts: no FFN is bypassed, and nothing is dropped."""
    return _changed(config, skip_ffn=False, skip_layers="all", drop_after=None)


def everywhere(config: SkipConfig) -> SkipConfig:
    """Return the config that bypasses the FFN of every layer and drops nothing."""
    return _changed(config, skip_ffn=True, skip_layers="all", drop_after=None)


def moves(config: SkipConfig, layers: int, block: int) -> dict[str, SkipConfig]:
    """Return the configs one move away, by a description of the move.

    Args:
        config: the present one.
        layers: decoder layers of the model.
        block: adjacent layers that a move changes together.
    """
    found = {}
    skipping = set(_skipping(config, layers))
    for first in range(0, layers, block):
        members = {*range(first, min(first + block, layers))}
        if not members <= skipping:
            found[f"skip {_range(members)}"] = _skip_in(config, skipping | members, layers)
    last = layers if config.drop_after is None else config.drop_after + 1
    after = (last - 1) // block * block - 1
    if after >= 0:
        found[f"drop after {after}"] = _changed(config, drop_after=after)
    return found


def _skipping(config: SkipConfig, layers: int) -> Sequence[int]:
    if not config.skip_ffn:
        return ()
    return range(layers) if config.skip_layers == "all" else config.skip_layers


def _skip_in(config: SkipConfig, members: set[int], layers: int) -> SkipConfig:
    every = len(members) == layers
    return _changed(config, skip_ffn=True, skip_layers="all" if every else sorted(members))


def _range(layers: set[int]) -> str:
    first, last = min(layers), max(layers)
    return str(first) if first == last else f"{first}–{last}"


def _changed(config: SkipConfig, **values: object) -> SkipConfig:
    return SkipConfig(**{**config.model_dump(), **values})
