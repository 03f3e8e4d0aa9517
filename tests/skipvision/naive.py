"""A slow reference of the method: one row at a time, in loops and masks, without code of the library.

The library handles ragged batches with sorts, scatters and hooks; this reference follows the explanation of
the method. Tests compute both and compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from skipvision import SkipConfig, TokenRole
from skipvision.testing.llava import IMAGE_TOKEN

# ------------------------------------------------------------------------------------- one image


class Ambiguous(Exception):
    """Two choices are equally good up to rounding, such as two tokens that are each other's neighbours."""


def best(scores: dict[int, float], count: int) -> list[int]:
    """Return the ``count`` keys with the highest scores, best first."""
    order = sorted(scores, key=scores.__getitem__, reverse=True)
    if 0 < count < len(order) and scores[order[count - 1]] - scores[order[count]] < 1e-9:
        raise Ambiguous
    return order[:count]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def redundancy(features: list[list[float]]) -> list[float]:
    return [
        sum(cosine(one, other) for j, other in enumerate(features) if j != i)
        for i, one in enumerate(features)
    ]


def farthest_first(features: list[list[float]], count: int) -> list[int]:
    """The diversity criterion: each next token is the one farthest from those already chosen."""
    places = range(len(features))
    distance = [[1 - cosine(a, b) for b in features] for a in features]
    chosen: list[int] = []
    while len(chosen) < count:
        others = chosen if chosen else list(places)
        gaps = {
            i: min((distance[i][j] for j in others if j != i), default=math.inf)
            for i in places
            if i not in chosen
        }
        chosen += best(gaps, 1)
    return chosen


def largest_determinants(features: list[list[float]], relevance: list[float], count: int) -> list[int]:
    """The relevance criterion: each next token makes the largest determinant with those already chosen."""
    low, high = min(relevance), max(relevance)
    quality = [(value - low) / (high - low) for value in relevance]
    chosen: list[int] = []
    while len(chosen) < count:
        volumes = {}
        for place in set(range(len(features))) - {*chosen}:
            some = [*chosen, place]
            kernel = [
                [quality[i] * cosine(features[i], features[j]) * quality[j] for j in some] for i in some
            ]
            volumes[place] = float(torch.tensor(kernel, dtype=torch.float64).det())
        chosen += best(volumes, 1)
    return chosen


def retain(
    features: list[list[float]], count: int, config: SkipConfig, scores: list[float] | None = None
) -> set[int]:
    """Return the tokens of one image on the full path."""
    tokens = len(features)
    if config.select == "diversity":
        return set(farthest_first(features, count))
    if config.select == "relevance":
        assert scores is not None
        return set(largest_determinants(features, scores, count))
    if config.select == "uniform":
        return {math.floor((i + 0.5) * tokens / count) for i in range(count)}
    if config.select == "similarity":
        scores = [-value for value in redundancy(features)]
    elif config.select == "norm":
        scores = [math.sqrt(sum(x * x for x in one)) for one in features]
    elif config.select == "random":
        generator = torch.Generator().manual_seed(config.seed)
        scores = [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in features]
    assert scores is not None
    return set(best(dict(enumerate(scores)), count))


def hosts(features: list[list[float]], retained: set[int], skipped: int, merge: str) -> list[int]:
    """Return, for each token of one image, the token it ends in; −1 if dropped."""
    rest = [i for i in range(len(features)) if i not in retained]
    ends = list(range(len(features)))
    if merge == "pool":
        runs = min(skipped, len(rest))
        members: list[list[int]] = [[] for _ in range(runs)]
        for place, token in enumerate(rest):
            members[place * runs // len(rest)].append(token)
        for run in members:
            for token in run:
                ends[token] = run[(len(run) - 1) // 2]
        return ends
    if merge == "grid":
        side, rows = math.isqrt(len(features)), math.isqrt(skipped)
        columns = skipped // rows
        cells: dict[tuple[int, int], list[int]] = {}
        for place in ends:
            cells.setdefault((place // side * rows // side, place % side * columns // side), []).append(place)
        for members in cells.values():
            down, across = ({divmod(m, side)[axis] for m in members} for axis in (0, 1))
            middle = sorted(down)[(len(down) - 1) // 2] * side + sorted(across)[(len(across) - 1) // 2]
            for place in members:
                ends[place] = middle
        return ends
    if merge == "tome":
        return matched_in_halves(features, rest, skipped)
    summed = redundancy(features)
    survivors = best({i: -summed[i] for i in rest}, skipped)
    for token in rest:
        if token in survivors:
            continue
        similarity = {i: cosine(features[token], features[i]) for i in survivors or retained}
        ends[token] = -1 if merge == "drop" else best(similarity, 1)[0]
    return ends


def matched_in_halves(features: list[list[float]], rest: list[int], left: int) -> list[int]:
    """ToMe's bipartite matching in rounds, each on the means of the groups so far."""
    ends = list(range(len(features)))
    groups = {token: [token] for token in rest}
    while len(groups) > left:
        order = sorted(groups)
        homes = order[1::2]
        mean = {
            token: [sum(axis) / len(members) for axis in zip(*(features[m] for m in members), strict=True)]
            for token, members in groups.items()
        }
        match, alike = {}, {}
        for guest in order[::2]:
            if homes:
                similarity = {home: cosine(mean[guest], mean[home]) for home in homes}
                match[guest] = best(similarity, 1)[0]
                alike[guest] = similarity[match[guest]]
        for guest in best(alike, min(len(alike), len(groups) - left)):
            groups[match[guest]] += groups.pop(guest)
    for token, members in groups.items():
        for member in members:
            ends[member] = token
    return ends


# --------------------------------------------------------------------------------------- one row


@dataclass
class Token:
    """One token of the reduced row; fields as in `TokenPlan`."""

    role: TokenRole
    source: int = -1
    position_source: int = -1
    summary_slot: int = -1
    group: int = -1
    mean_of: list[int] = field(default_factory=list)
    """Caller positions merged into it."""
    sums_up: list[int] = field(default_factory=list)
    """For a summary: caller positions of the tokens of its group."""


def reduce_row(
    length: int,
    images: list[list[int]],
    features: list[list[list[float]]],
    config: SkipConfig,
    *,
    scores: list[list[float]] | None = None,
    first_image: int = 0,
) -> tuple[list[Token], list[int]]:
    """Reduce a row without padding: return its tokens, and each caller position's token index or −1.

    Args:
        length: caller's tokens.
        images: caller positions of each image.
        features: of each image's tokens.
        config: how to reduce.
        scores: of each image's tokens, for criteria that read the model.
        first_image: number of the first image in its batch.
    """
    image_at = {positions[0]: number for number, positions in enumerate(images)}
    inside = {position for positions in images for position in positions}
    ends = list(range(length))
    tokens: list[Token] = []
    for position in range(length):
        if position in image_at:
            number = image_at[position]
            tokens += _reduce_image(
                images[number],
                features[number],
                config,
                scores[number] if scores else None,
                first_image + number,
                ends,
            )
        elif position not in inside:
            tokens.append(Token(TokenRole.TEXT, position, position, mean_of=[position]))
    index = {token.source: place for place, token in enumerate(tokens) if token.source >= 0}
    return tokens, [index.get(end, -1) for end in ends]


def _reduce_image(
    positions: list[int],
    features: list[list[float]],
    config: SkipConfig,
    scores: list[float] | None,
    number: int,
    ends: list[int],
) -> list[Token]:
    retained_count, skipped_count, _ = config.counts(len(positions))
    retained = retain(features, retained_count, config, scores)
    host = hosts(features, retained, skipped_count, config.merge)
    groups: list[list[Token]] = [[], []]
    everyone = []
    for local, position in enumerate(positions):
        ends[position] = positions[host[local]] if host[local] >= 0 else -1
        if host[local] != local:
            continue
        short = local not in retained
        token = Token(
            TokenRole.SKIPPED if short else TokenRole.RETAINED,
            position,
            position,
            group=2 * number + short,
            mean_of=[positions[other] for other in range(len(positions)) if host[other] == local],
        )
        groups[short].append(token)
        everyone.append(token)
    k = config.summary_tokens
    summaries = [
        [
            Token(
                TokenRole.SUMMARY,
                position_source=members[-1].position_source,
                summary_slot=(2 * number + short) * k + nth,
                sums_up=[token.source for token in members],
            )
            for nth in range(k)
            if members
        ]
        for short, members in enumerate(groups)
    ]
    if config.layout == "grouped":
        return [*groups[0], *summaries[0], *groups[1], *summaries[1]]
    return [*everyone, *summaries[0], *summaries[1]]


# ------------------------------------------------------------------------------------- the model


@dataclass
class Row:
    """One reduced row, ready for the decoder."""

    tokens: list[Token]
    lands: list[int]
    embeds: torch.Tensor
    """(1, L, H)"""
    positions: torch.Tensor
    """(L,)"""

    @property
    def takes_ffn(self) -> list[bool]:
        return [token.role != TokenRole.SKIPPED for token in self.tokens]


def embed_rows(model, inputs) -> list[torch.Tensor]:
    """Return (T, H) embeddings of each row without padding, with image features at the placeholders."""
    features = []
    if "pixel_values" in inputs:
        features = list(torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        embeds = list(model.get_input_embeddings()(ids))
        for position in range(len(ids)):
            if ids[position] == IMAGE_TOKEN:
                embeds[position] = features.pop(0)
        rows.append(torch.stack(embeds))
    return rows


def image_positions(ids: torch.Tensor, tokens: int) -> list[list[int]]:
    """Return the caller positions of each image of a row."""
    found = [position for position, token in enumerate(ids.tolist()) if token == IMAGE_TOKEN]
    return [found[start : start + tokens] for start in range(0, len(found), tokens)]


def prepare(model, inputs, config, summary=None, *, from_zero: bool = False) -> list[Row]:
    """Reduce every row of a batch.

    Position ids count padding, as a plain forward's do, or start at a row's first token, as generate's do.
    """
    decoder = model.model.language_model
    rows, first_image = [], 0
    for ids, mask, embeds in zip(
        inputs["input_ids"], inputs["attention_mask"], embed_rows(model, inputs), strict=True
    ):
        images = image_positions(ids[mask.bool()], model.config.image_seq_length)
        features = [embeds[positions].tolist() for positions in images]
        scores = None
        if config.select in ("ffn_ratio", "attention") and images:
            read = ffn_ratio if config.select == "ffn_ratio" else last_attention
            values = read(decoder, embeds[None], config.probe_layer)
            scores = [[values[position] for position in positions] for positions in images]
        elif config.select == "relevance" and images:
            inside = {position for positions in images for position in positions}
            lines = embeds.tolist()
            words = [line for position, line in enumerate(lines) if position not in inside]
            scores = [
                [sum(cosine(lines[position], word) for word in words) / len(words) for position in positions]
                for positions in images
            ]
        elif config.select == "vision_attention" and images:
            scores = class_attention(model, inputs["pixel_values"][first_image : first_image + len(images)])
        tokens, lands = reduce_row(
            len(embeds), images, features, config, scores=scores, first_image=first_image
        )
        first_image += len(images)
        if config.positions == "original":
            positions = torch.tensor([token.position_source for token in tokens])
        else:
            positions = torch.arange(len(tokens))
        if not from_zero:
            # Shifting positions changes nothing but the rotary embedding's float32 rounding.
            positions = positions + mask.argmax()
        rows.append(Row(tokens, lands, _embeds_of(tokens, embeds, summary)[None], positions))
    return rows


def _embeds_of(tokens: list[Token], embeds: torch.Tensor, summary) -> torch.Tensor:
    merged = {token.source: embeds[token.mean_of].mean(dim=0) for token in tokens if token.source >= 0}
    result = []
    for token in tokens:
        if token.role == TokenRole.SUMMARY:
            members = torch.stack([merged[source] for source in token.sums_up])
            nth = token.summary_slot % summary.score.out_features
            result.append(sum_up(members, summary, nth))
        else:
            result.append(merged[token.source])
    return torch.stack(result)


def sum_up(members: torch.Tensor, summary, nth: int) -> torch.Tensor:
    """(H,) the ``nth`` summary of a group (n, H)."""
    scores = [
        summary.score.weight[nth]
        @ F.layer_norm(one, one.shape, summary.norm.weight, summary.norm.bias, summary.norm.eps)
        for one in members
    ]
    exponentials = [score.exp() for score in scores]
    total = sum(exponentials)
    return sum(e / total * one for e, one in zip(exponentials, members, strict=True))


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def run_layers(decoder, layers, hidden, positions, allowed, takes_ffn, cache=None, sizes=None):
    """Run decoder layers: every token enters every FFN, and a mask discards the update of skipped tokens.

    Args:
        decoder: for its rotary embedding.
        layers: what to run.
        hidden: (1, L, H).
        positions: (L,) position ids.
        allowed: (L, keys) who attends to whom.
        takes_ffn: L flags.
        cache: keys and values of earlier tokens, to be extended.
        sizes: of each key, whose log is added to its scores; None = one each.
    """
    rotary = decoder.rotary_emb(hidden, position_ids=positions[None])
    mask = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(~allowed, -torch.inf)[None, None]
    if sizes is not None:
        mask = mask + torch.tensor([math.log(size) for size in sizes], dtype=hidden.dtype)
    keep = torch.tensor(takes_ffn, dtype=hidden.dtype)[None, :, None]
    for layer in layers:
        attended = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=rotary,
            attention_mask=mask,
            past_key_values=cache,
        )[0]
        hidden = hidden + attended
        hidden = hidden + keep * layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden


def left_at(tokens: list[Token], config, number: int) -> list[int]:
    """Return the places of the tokens that a layer has: after drop_after, text and summaries."""
    late = config.drop_after is not None and number > config.drop_after
    roles = (TokenRole.TEXT, TokenRole.SUMMARY) if late else tuple(TokenRole)
    return [place for place, token in enumerate(tokens) if token.role in roles]


def run_row(model, row: Row, config, cache=None, earlier=()) -> torch.Tensor:
    """(L, H) last hidden states of a reduced row; zeros for tokens that a layer dropped.

    Args:
        model: whose decoder runs.
        row: its tokens.
        config: decides what skips, and where.
        cache: earlier rows, and where to add this one.
        earlier: for each entry of the cache's first layer whether this row sees it, and its token.
    """
    decoder, hidden = model.model.language_model, row.embeds
    left = list(range(len(row.tokens)))
    for number, layer in enumerate(decoder.layers):
        now = left_at(row.tokens, config, number)
        hidden, left = hidden[:, [left.index(place) for place in now]], now
        skips = config.skip_ffn and (config.skip_layers == "all" or number in config.skip_layers)
        takes_ffn = [row.takes_ffn[place] or not skips for place in left]
        past = left_at([token for _, token in earlier], config, number)
        seen = [earlier[place][0] for place in past]
        keys = [*(earlier[place][1] for place in past), *(row.tokens[place] for place in left)]
        sizes = [max(len(key.mean_of), 1) for key in keys] if config.size_bias else None
        before = torch.tensor(seen, dtype=torch.bool).expand(len(left), -1)
        allowed = torch.cat([before, causal(len(left))], dim=1)
        positions = row.positions[left]
        hidden = run_layers(decoder, [layer], hidden, positions, allowed, takes_ffn, cache, sizes)
    states = hidden.new_zeros(len(row.tokens), hidden.shape[2])
    return states.index_put((torch.tensor(left),), decoder.norm(hidden)[0])


def ffn_ratio(decoder, embeds: torch.Tensor, probe_layer: int) -> list[float]:
    """‖FFN(norm(h))‖ / ‖h‖ of every token of an unreduced row at one layer."""
    length = embeds.shape[1]
    positions, allowed = torch.arange(length), causal(length)
    with torch.no_grad():
        hidden = run_layers(
            decoder, decoder.layers[:probe_layer], embeds, positions, allowed, [True] * length
        )
        layer = decoder.layers[probe_layer]
        hidden = run_layers(decoder, [layer], hidden, positions, allowed, [False] * length)
        update = layer.mlp(layer.post_attention_layernorm(hidden))
    return [float(u.norm() / h.norm()) for u, h in zip(update[0], hidden[0], strict=True)]


def last_attention(decoder, embeds: torch.Tensor, probe_layer: int) -> list[float]:
    """Return the attention of an unreduced row's last token at one layer, the mean over heads."""
    length, given = embeds.shape[1], {}
    positions, allowed = torch.arange(length), causal(length)
    attention = decoder.layers[probe_layer].self_attn

    def keep(module, args, kwargs):
        given.update(kwargs)

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        run_layers(decoder, decoder.layers[: probe_layer + 1], embeds, positions, allowed, [True] * length)
    handle.remove()
    hidden, (cos, sin) = given["hidden_states"][0], (part[0] for part in given["position_embeddings"])
    size = attention.head_dim

    def rotated(vector, place):
        half = size // 2
        turned = torch.cat([-vector[half:], vector[:half]])
        return vector * cos[place] + turned * sin[place]

    sums = torch.zeros(length, dtype=embeds.dtype)
    heads = attention.config.num_attention_heads
    with torch.no_grad():
        queries = attention.q_proj(hidden[-1]).split(size)
        keys = [attention.k_proj(one).split(size) for one in hidden]
        for head in range(heads):
            group = head * len(keys[0]) // heads
            query = rotated(queries[head], length - 1)
            compared = [query @ rotated(key[group], place) / size**0.5 for place, key in enumerate(keys)]
            sums += torch.stack(compared).softmax(dim=0) / heads
    return sums.tolist()


@torch.no_grad()
def class_attention(model, pixels: torch.Tensor) -> list[list[float]]:
    """Return the class token's attention in the tower's last layer, for each image."""
    tower = model.model.vision_tower
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    layer = tower.encoder.layers[-1]
    normed, attention = layer.layer_norm1(hidden), layer.self_attn
    size, scores = attention.head_dim, []
    for image in normed:
        queries, keys = attention.q_proj(image[0]).split(size), attention.k_proj(image).split(size, dim=1)
        weights = [(key @ query / size**0.5).softmax(dim=0) for query, key in zip(queries, keys, strict=True)]
        scores.append((sum(weights) / len(weights))[1:].tolist())
    return scores


def logits(model, inputs, config, summary=None) -> torch.Tensor:
    """(B, T, V) logits at the caller's positions; those of a zero state where dropped or padding."""
    rows = prepare(model, inputs, config, summary)
    hidden = torch.zeros(*inputs["input_ids"].shape, model.config.text_config.hidden_size)
    hidden = hidden.to(model.dtype)
    for number, row in enumerate(rows):
        states = run_row(model, row, config)
        real = inputs["attention_mask"][number].nonzero().squeeze(1).tolist()
        for position, place in zip(real, row.lands, strict=True):
            if place >= 0:
                hidden[number, position] = states[place]
    return model.lm_head(hidden)


@torch.no_grad()
def decode(model, row: Row, config, answer: list[int]) -> list[torch.Tensor]:
    """Logits before each token of ``answer``, decoding on the full cache.

    Nothing ever leaves the cache; if skip_kv, every step's mask hides the skipped tokens' keys.
    """
    cache = DynamicCache()
    result = [model.lm_head(run_row(model, row, config, cache)[-1])]
    earlier = entries_of(row, config)
    position = int(row.positions[-1])
    for token in answer[:-1]:
        position += 1
        embeds = model.get_input_embeddings()(torch.tensor([[token]]))
        word = Row([Token(TokenRole.TEXT)], [], embeds, torch.tensor([position]))
        result.append(model.lm_head(run_row(model, word, config, cache, earlier))[0])
        earlier += entries_of(word, config)
    return result


def second_turn(model, first, second, config, summary) -> torch.Tensor:
    """(T, V) logits of a row's second call, without its mask, on the cache that a first call filled."""
    cache = DynamicCache()
    [before] = prepare(model, first, config, summary)
    run_row(model, before, config, cache)
    everything = torch.ones_like(second["input_ids"])
    [after] = prepare(model, {**second, "attention_mask": everything}, config, summary)
    original = config.positions == "original"
    after.positions += first["input_ids"].shape[1] if original else len(before.tokens)
    states = run_row(model, after, config, cache, entries_of(before, config))
    return model.lm_head(torch.stack([states[n] if n >= 0 else 0 * states[0] for n in after.lands]))


def entries_of(row: Row, config) -> list[tuple[bool, Token]]:
    """Return for each token whether later ones see it, and the token."""
    return [(not (config.skip_kv and token.role == TokenRole.SKIPPED), token) for token in row.tokens]
