"""A reference for every family: the untouched decoder at full length, with masks.

No token leaves the sequence here. The untouched model makes the same calls as the one with Skip-Vision, and
the inputs of its decoder are recorded: embeddings, positions, and which token sees which in every layer. The
decoder then runs once over all of them. Dropped and merged columns are hidden from all, skipped ones from
later calls; FFN outputs of skipped ones are zero; and summaries are further columns. So windows, chunks,
two-way images, M-RoPE and DeepStack act as the family implements them. Recurrent layers have no mask: each
row's surviving columns, skipped ones included, run through them alone, in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipvision import SkipConfig, TokenPlan, TokenRole
from skipvision.anatomy.attention import block_indexer, reads_padding_alone
from skipvision.anatomy.deepstack import DeepStack, with_first_features
from skipvision.anatomy.families import dissect
from skipvision.anatomy.masks import is_per_query

Run = Callable[[], Any]


@dataclass
class Call:
    """One call of the decoder: its keywords, and the (B, q, past + q) visible pairs of each attention layer.

    ``real`` are its (B, q) tokens that are not padding.
    """

    keywords: dict[str, Any]
    seen: list[torch.Tensor]
    real: torch.Tensor


@dataclass
class Seen:
    """All calls of an untouched decoder joined into one of T columns.

    Attributes:
        keywords: those of the first call.
        embeds: (B, T, H).
        positions: (…, B, T).
        call: (T,) number of the call that brought each column.
        real: (B, T) columns that are not padding.
        layers: (B, T, T) for each attention layer, True where a query (second axis) sees a key (third).
        deep: DeepStack features at their columns, zero elsewhere; (B, T, H) for each layer that has some.
        visual: (B, T) columns that have DeepStack features.
        others: further keywords with one entry per column, (B, T, …) each.
    """

    keywords: dict[str, Any]
    embeds: torch.Tensor
    positions: torch.Tensor
    call: torch.Tensor
    real: torch.Tensor
    layers: list[torch.Tensor]
    deep: list[torch.Tensor]
    visual: torch.Tensor
    others: dict[str, torch.Tensor]


@dataclass
class Summary:
    """The k-th summary token of a group in row ``row``, as visible as a token at ``place``."""

    row: int
    place: int
    behind: int
    """Last surviving column of its image, which the summary follows."""
    call: int
    k: int
    members: list[int]


@dataclass
class Fate:
    """The plans of all calls by column: where each ends (−1: dropped), which are skipped, and summaries."""

    host: torch.Tensor
    short: torch.Tensor
    summaries: list[Summary]


@torch.no_grad()
def watch(model: nn.Module, run: Run) -> Seen:
    """Record the inputs of an untouched model's decoder."""
    anatomy = dissect(model)
    kinds = getattr(anatomy.text_config, "layer_types", None) or ()
    calls: list[Call] = []

    def begin(decoder: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
        shape, given = keywords["inputs_embeds"].shape[:2], keywords.get("attention_mask")
        if isinstance(given, dict) and not is_per_query(given):
            given = next(iter(given.values()))
        padded = isinstance(given, torch.Tensor) and given.ndim == 2
        real = given[:, -shape[1] :].bool() if padded else torch.ones(shape, dtype=torch.bool)
        calls.append(Call(with_first_features(decoder, dict(keywords)), [], real))

    def note(attention: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
        past = sum(call.keywords["inputs_embeds"].shape[1] for call in calls[:-1])
        shape = calls[-1].keywords["inputs_embeds"].shape[:2]
        given = keywords["attention_mask"]
        if given is not None and given.ndim == 2:  # attention adds causality itself
            real = torch.cat([call.real for call in calls], dim=1)
            given = (_seen(None, *shape, past) & real[:, None])[:, None]
        kept = calls[0].keywords["inputs_embeds"].shape[1] if REFERENCE in kinds else 0
        calls[-1].seen.append(_seen(given, *shape, past, kept))

    handles = [anatomy.decoder.register_forward_pre_hook(begin, with_kwargs=True)]
    attending = [layer.attention for layer in anatomy.layers if layer.attends]
    handles += [attention.register_forward_pre_hook(note, with_kwargs=True) for attention in attending]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return _joined(calls)


REFERENCE = "reference_sliding_attention"
"""Kind of layers that keep the keys of the first call, and a window of later ones."""


def _seen(mask: torch.Tensor | None, rows: int, new: int, past: int, kept: int = 0) -> torch.Tensor:
    """(B, new, past + new) booleans of an attention mask.

    A mask over fewer keys covers those that are kept from the first call, and the last ones.
    """
    if mask is None:  # SDPA then attends to all earlier tokens.
        return torch.ones(rows, new, past + new, dtype=torch.bool).tril(past)
    seen = mask if mask.dtype == torch.bool else mask == 0
    assert seen.shape[1] == 1, "one mask for all heads"
    seen = seen[:, 0].expand(rows, -1, -1)
    unseen = seen.new_zeros(rows, new, past + new - seen.shape[2])
    return torch.cat([seen[:, :, :kept], unseen, seen[:, :, kept:]], dim=2)


def _joined(calls: list[Call]) -> Seen:
    embeds = [call.keywords["inputs_embeds"] for call in calls]
    rows, total = len(embeds[0]), sum(part.shape[1] for part in embeds)
    first = calls[0].keywords
    positions, visual, begin = [], [], 0
    deep = [torch.zeros(rows, total, part.shape[-1], dtype=part.dtype) for part in _deep(first)]
    layers = [torch.zeros(rows, total, total, dtype=torch.bool) for _ in calls[0].seen]
    for call, part in zip(calls, embeds, strict=True):
        end = begin + part.shape[1]
        given = call.keywords.get("position_ids")
        if given is None:
            given = torch.arange(begin, end)[None]
        positions.append(given.expand(*given.shape[:-2], rows, -1))
        for layer, seen in zip(layers, call.seen, strict=True):
            layer[:, begin:end, :end] = seen
        visual.append(torch.zeros(part.shape[:2], dtype=torch.bool))
        for whole, features in zip(deep, _deep(call.keywords), strict=False):
            visual[-1] = DeepStack.of(call.keywords).visual
            whole[:, begin:end][visual[-1]] = features
        begin = end
    return Seen(
        first,
        torch.cat(embeds, dim=1),
        torch.cat(_alike(positions), dim=-1),
        torch.cat([torch.full((part.shape[1],), number) for number, part in enumerate(embeds)]),
        torch.cat([call.real for call in calls], dim=1),
        layers,
        deep,
        torch.cat(visual, dim=1),
        _others(calls, embeds),
    )


def _alike(positions: list[torch.Tensor]) -> list[torch.Tensor]:
    """Give the positions of all calls as many axes as those of the first."""
    shape = positions[0].shape[:-1]
    return [part.expand(*shape, -1) for part in positions]


def _deep(keywords: dict[str, Any]) -> list[torch.Tensor]:
    deep = DeepStack.of(keywords)
    return [] if deep is None else deep.features


def _others(calls: list[Call], embeds: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {"inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "vision_mask"}
    others: dict[str, torch.Tensor] = {}
    for name, value in calls[0].keywords.items():
        if isinstance(value, torch.Tensor) and value.shape[:2] == embeds[0].shape[:2] and name not in named:
            # A later call without it has text only, which zeros express.
            parts = [
                value.new_zeros(*part.shape[:2], *value.shape[2:])
                if call.keywords.get(name) is None
                else call.keywords[name]
                for call, part in zip(calls, embeds, strict=True)
            ]
            others[name] = torch.cat(parts, dim=1)
    return others


def decide(plans: list[TokenPlan | None], seen: Seen) -> Fate:
    """Translate the plans of all calls to columns."""
    rows, total = seen.embeds.shape[:2]
    host = torch.arange(total).repeat(rows, 1)
    short = torch.zeros(rows, total, dtype=torch.bool)
    summaries: list[Summary] = []
    for number, plan in enumerate(plans):
        if plan is None:
            continue
        begin = int((seen.call < number).sum())
        for row in range(rows):
            _decide_row(plan, row, number, begin, host[row], short[row], summaries)
    return Fate(host, short, summaries)


def _decide_row(
    plan: TokenPlan,
    row: int,
    call: int,
    begin: int,
    host: torch.Tensor,
    short: torch.Tensor,
    summaries: list[Summary],
) -> None:
    source, group = plan.source[row].tolist(), plan.group[row].tolist()
    for column, into in enumerate(plan.merged_into[row].tolist()):
        host[begin + column] = begin + source[into] if into >= 0 else -1
    members: dict[int, list[int]] = {}
    for index, role in enumerate(plan.roles[row].tolist()):
        if role == TokenRole.SKIPPED:
            short[begin + source[index]] = True
        if group[index] >= 0:
            members.setdefault(group[index], []).append(begin + source[index])
    for index, slot in enumerate(plan.summary_slot[row].tolist()):
        if slot >= 0:
            own, k = divmod(slot, plan.summary_tokens)
            image = members.get(own, []) + members.get(own ^ 1, [])
            place = begin + int(plan.position_source[row, index])
            assert place == max(members[own]), "the last of its group"
            summaries.append(Summary(row, place, max(image), call, k, members[own]))


@torch.no_grad()
def hidden_states(
    model: nn.Module, seen: Seen, fate: Fate, config: SkipConfig, summary: nn.Module | None
) -> torch.Tensor:
    """(B, T, H) states of the full-length decoder; each column takes the state of the column it ends in."""
    rows, total = seen.embeds.shape[:2]
    columns = _summary_columns(fate, rows)
    width = total + max(map(len, columns))
    places = torch.cat([torch.arange(total).repeat(rows, 1), torch.zeros(rows, width - total).long()], dim=1)
    takes_ffn = torch.ones(rows, width, dtype=torch.bool)
    takes_ffn[:, :total] = ~fate.short if config.skip_ffn else True
    for row, own in enumerate(columns):
        for column, one in enumerate(own):
            places[row, total + column] = one.place

    def extended(values: torch.Tensor) -> torch.Tensor:
        """A summary takes the value of the token whose place it has."""
        index = places.view(rows, width, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return values.gather(1, index)

    embeds = extended(_merged(seen.embeds, fate.host))
    for row, own in enumerate(columns):
        for column, one in enumerate(own):
            embeds[row, total + column] = _summarised(embeds[row, one.members], summary)[one.k]
    visual = torch.cat([seen.visual, seen.visual.new_zeros(rows, width - total)], dim=1)
    keywords = {
        **{name: value for name, value in seen.keywords.items() if name != "past_key_values"},
        **{name: extended(value) for name, value in seen.others.items()},
        "inputs_embeds": embeds,
        "position_ids": torch.take_along_dim(
            seen.positions, places.expand(*seen.positions.shape[:-2], -1, -1), dim=-1
        ),
        "attention_mask": _placeholder(seen.keywords.get("attention_mask"), rows, width),
        "use_cache": False,
    }
    if seen.deep:
        merged = [extended(_merged(features, fate.host))[visual] for features in seen.deep]
        keywords |= DeepStack(visual, DeepStack.of(seen.keywords).layers, merged).arguments()
    masks = [_mask(layer, seen.call, fate, columns, config) for layer in seen.layers]
    orders = _orders(seen.real, fate, columns)
    output = _run(model, keywords, masks, orders, takes_ffn)[:, :total]
    states = torch.take_along_dim(output, fate.host.clamp(min=0)[..., None], dim=1)
    return states.masked_fill((fate.host < 0)[..., None], 0)


def _summary_columns(fate: Fate, rows: int) -> list[list[Summary]]:
    return [[one for one in fate.summaries if one.row == row] for row in range(rows)]


def _merged(values: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """Replace each column by the mean of those that end in it."""
    merged = values.clone()
    for row, ends in enumerate(host.tolist()):
        guests: dict[int, list[int]] = {}
        for column, end in enumerate(ends):
            guests.setdefault(end, []).append(column)
        for end, own in guests.items():
            if end >= 0 and len(own) > 1:
                wide = torch.promote_types(values.dtype, torch.float32)
                merged[row, end] = values[row, own].to(wide).mean(dim=0).to(values.dtype)
    return merged


def _summarised(tokens: torch.Tensor, summary: Any) -> torch.Tensor:
    """(K, H) weighted sums of a group's (n, H) tokens."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    weights = summary.score(summary.norm(tokens.to(summary.norm.weight.dtype))).to(wide).softmax(dim=0)
    return (weights.T @ tokens.to(wide)).to(tokens.dtype)


def _mask(
    layer: torch.Tensor, call: torch.Tensor, fate: Fate, columns: list[list[Summary]], config: SkipConfig
) -> torch.Tensor:
    """(B, W, W) visible pairs among the T columns and the summaries after them."""
    rows, total = fate.host.shape
    width, order = total + max(map(len, columns)), torch.arange(total)
    whole = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1)
    for row, own in enumerate(columns):
        seen, stays = layer[row], fate.host[row] == order
        near, two_way = seen | seen.T, seen & seen.T & ~torch.eye(total, dtype=torch.bool)
        forgotten = fate.short[row] & (call[:, None] > call) & config.skip_kv
        whole[row, :total, :total] |= seen & stays & ~forgotten
        for column, one in enumerate(own, start=total):
            # It sees, and is seen, like the token whose place it has; later tokens only if both see each
            # other.
            at, behind = one.place, order > one.behind
            forgotten = fate.short[row] & (one.call > call) & config.skip_kv
            whole[row, column, :total] = torch.where(behind, two_way[at], near[at]) & stays & ~forgotten
            whole[row, :total, column] = torch.where(behind, seen[:, at], two_way[at])
            for further, another in enumerate(own, start=total):
                whole[row, column, further] |= (near if further <= column else two_way)[at, another.place]
    return whole


def _orders(real: torch.Tensor, fate: Fate, columns: list[list[Summary]]) -> list[torch.Tensor]:
    """Return the surviving columns of each row in their order: a summary follows the last of its image."""
    rows, total = fate.host.shape
    orders = []
    for row in range(rows):
        keys = {(column, 0, 0): column for column in range(total) if real[row, column]}
        keys = {key: column for key, column in keys.items() if fate.host[row, column] == column}
        keys |= {(one.behind, 1, n): n for n, one in enumerate(columns[row], start=total)}
        orders.append(torch.tensor([column for _, column in sorted(keys.items())]))
    return orders


def _placeholder(given: Any, rows: int, width: int) -> Any:
    """Pass the decoder a mask that it accepts, and give every layer its own mask instead."""
    if isinstance(given, dict) and is_per_query(given):
        return dict.fromkeys(given)
    if given is not None and given.ndim == 4:
        return torch.ones(rows, 1, width, width, dtype=torch.bool)
    return torch.ones(rows, width, dtype=torch.long)


def _run(
    model: nn.Module,
    keywords: dict[str, Any],
    masks: list[torch.Tensor],
    orders: list[torch.Tensor],
    takes_ffn: torch.Tensor,
) -> torch.Tensor:
    anatomy = dissect(model)
    adds = anatomy.text_config._attn_implementation == "eager"

    def as_written(mask: torch.Tensor, **_: Any) -> torch.Tensor:
        if not adds:
            return mask
        dtype = keywords["inputs_embeds"].dtype
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def see(mask: torch.Tensor, attention: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        return args, {**given, "attention_mask": as_written(mask[:, None])}

    def silence(mlp: nn.Module, args: Any, output: Any) -> Any:
        update = output[0] if isinstance(output, tuple) else output
        silent = update.reshape(*takes_ffn.shape, -1) * takes_ffn[..., None]
        silent = silent.reshape(update.shape)
        return (silent, *output[1:]) if isinstance(output, tuple) else silent

    def recur(mixer: nn.Module, args: Any, given: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        hidden, output = given.get("hidden_states", next(iter(args), None)), torch.zeros_like(output)
        own = {**given, "attention_mask": None}
        for row, order in enumerate(orders):
            if len(order):
                output[row, order] = mixer.forward(**{**own, "hidden_states": hidden[row, order][None]})[0]
        return output

    def all_blocks(indexer: Any, args: Any, blocks: torch.Tensor) -> torch.Tensor:
        """Tiny models select all blocks; here the order of the columns, summaries last, would hide some."""
        count = -(-takes_ffn.shape[1] // indexer.block_size)
        return torch.arange(count).expand(*blocks.shape[:3], count)

    handles, left = [], iter(masks)
    for layer in anatomy.layers:
        if (indexer := block_indexer(layer.attention)) is not None:
            handles.append(indexer.register_forward_hook(all_blocks))
        if layer.recurrent:
            handles.append(layer.attention.register_forward_hook(recur, with_kwargs=True))
        elif reads_padding_alone(layer.whole):
            written = next(left)[:, None]
            layer.attention.build_attention_mask_from_topk = functools.partial(as_written, written)
        elif layer.attends:
            see_own = functools.partial(see, next(left))
            handles.append(layer.attention.register_forward_pre_hook(see_own, with_kwargs=True))
        if layer.mlp is not None:
            handles.append(layer.mlp.register_forward_hook(silence))
    try:
        return anatomy.decoder(**keywords).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
        for layer in anatomy.layers:
            vars(layer.attention or layer.whole).pop("build_attention_mask_from_topk", None)
