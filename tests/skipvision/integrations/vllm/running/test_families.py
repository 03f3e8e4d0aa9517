"""Every family that vLLM prunes answers as our engine does, on tiny random models."""

import numpy as np
import pytest
from PIL import Image

import skipvision as sv
from skipvision.loading import load_model, load_processor
from tests.skipvision.integrations.vllm.running.tiny import FAMILIES, UNPRUNED, save

# Tokens are equal at the ends of rows in LLaVA-NeXT: "similarity" would leave ties among them to rounding.
TUNED = sv.SkipConfig(retained=6, skipped=0, summary_tokens=1, select="diversity")
SKIPS = [
    None,
    "full",
    {"retained": 0.5, "summary_tokens": 0, "select": "similarity"},
    {"select": "uniform", "merge": "drop"},
]
OF_VIEWS = [{"select": "views"}]
SIZES = [(100, 140), (64, 64), (150, 60)]
TOKENS = 6


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    base = save(FAMILIES[family], tmp_path_factory.mktemp("family") / "base")
    return sv.export(base, None, base.parent / "exported", config=TUNED)


@pytest.fixture(scope="module")
def llm(family, folder):
    return start(folder, FAMILIES[family])


def start(folder, tiny):
    from vllm import LLM

    return LLM(
        str(folder),
        model_impl=tiny.implementation,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=160,
        max_num_seqs=8,
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 3, "video": 0},
    )


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(4)
    return [
        Image.fromarray(rng.integers(0, 255, (rows // 4, columns // 4, 3), dtype=np.uint8)).resize(
            (columns, rows)
        )
        for rows, columns in SIZES
    ]


@pytest.fixture(scope="module")
def prompts(family, images):
    """(text, images, skip): every config, an image of each size, and several images in a prompt."""
    skips = SKIPS + (OF_VIEWS if family in ("llava_next", "internvl") else [])
    chosen = [images[:1], images[1:2], images[2:], images]
    mark = FAMILIES[family].image
    return [(f"USER: {mark * len(some)}\nblue? ASSISTANT:", some, skip) for skip in skips for some in chosen]


@pytest.fixture(scope="module")
def expected(folder, prompts):
    """The engine's tokens and their log probabilities."""
    model = sv.from_exported(folder, dtype="float32")
    full = sv.SkipConfig.full()
    sampling = sv.Sampling(max_new_tokens=TOKENS, logprobs=0)
    requests = [
        sv.Request(
            text, images, sampling=sampling, key=key,
            skip=full if skip == "full" else TUNED.model_copy(update=skip or {}),
        )
        for key, (text, images, skip) in enumerate(prompts)
    ]  # fmt: skip
    with sv.Engine(model, load_processor(folder), kv_budget_bytes=2**27) as engine:
        done = {completion.key: completion.choices[0] for completion in engine.run(requests)}
    return [
        [(step.token_id, step.logprob) for step in done[key].logprobs or ()] for key in range(len(prompts))
    ]


def test_tokens_and_their_probabilities_are_those_of_the_engine(llm, prompts, expected):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0)
    inputs = [
        {"prompt": text, "multi_modal_data": {"image": images}}
        | ({} if skip is None else {"mm_processor_kwargs": {"skip": skip}})
        for text, images, skip in prompts
    ]
    for _ in range(2):  # The second round finds images and prefixes in the caches.
        for output, (_, _, skip), steps in zip(
            llm.generate(inputs, sampling, use_tqdm=False), prompts, expected, strict=True
        ):
            answer = output.outputs[0]
            assert list(answer.token_ids) == [token for token, _ in steps], skip
            values = [
                step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)
            ]
            assert values == pytest.approx([value for _, value in steps], abs=2e-3), skip


def test_positions_of_mrope_cannot_be_contiguous(family, llm, prompts):
    if not family.startswith("qwen"):
        pytest.skip("no M-RoPE")
    text, images, _ = prompts[0]
    with pytest.raises(ValueError, match="positions='contiguous' is not available for models with M-RoPE"):
        llm.generate(
            {
                "prompt": text,
                "multi_modal_data": {"image": images},
                "mm_processor_kwargs": {"skip": {"positions": "contiguous"}},
            },
            use_tqdm=False,
        )


@pytest.mark.parametrize(
    ("family", "skip", "message"),
    [
        ("aya_vision", {"retained": 4}, "tokens between their visual tokens cannot be pruned in vLLM"),
        ("qwen2_5_vl", {"retained": 4}, r"cannot prune .* positions have several axes \(M-RoPE\)"),
    ],
)
def test_other_models_of_transformers_run_with_full_tokens(family, skip, message, tmp_path, images):
    from vllm import SamplingParams

    tiny, greedy = UNPRUNED[family], SamplingParams(temperature=0, max_tokens=TOKENS)
    folder = save(tiny, tmp_path / "model")
    text = f"USER: {tiny.image}\nblue? ASSISTANT:"
    full, sampling = sv.SkipConfig.full(), sv.Sampling(max_new_tokens=TOKENS)
    requests = [
        sv.Request(text, [image], skip=full, sampling=sampling, key=key) for key, image in enumerate(images)
    ]
    with sv.Engine(load_model(folder), load_processor(folder), kv_budget_bytes=2**27) as engine:
        done = {completion.key: list(completion.choices[0].token_ids) for completion in engine.run(requests)}
    llm = start(folder, tiny)
    inputs = [{"prompt": text, "multi_modal_data": {"image": image}} for image in images]
    outputs = llm.generate(inputs, greedy, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [done[key] for key in sorted(done)]
    with pytest.raises(ValueError, match=message):
        llm.generate({**inputs[0], "mm_processor_kwargs": {"skip": skip}}, use_tqdm=False)
