"""vLLM with the plug-in answers as our engine does, whatever its caches and batches hold."""

import json
import os
import subprocess
import sys

import pytest

from skipvision import SkipConfig
from tests.conftest import ROOT
from tests.skipvision.integrations.vllm.running.conftest import QUESTION, TOKENS, TUNED, prompt

SKIPS = {
    "default": None,
    "full": "full",
    "without summary": {"summary_tokens": 0},
    "contiguous": {"positions": "contiguous"},
    "uniform": {"select": "uniform", "retained": 0.5},
    "dropped": {"merge": "drop", "select": "norm", "retained": 100},
}
BUDGET = 300
"""Tokens of a step: above an image's 256, and below most batches here, so that prompts are cut."""


def resolved(skip):
    if skip == "full":
        return SkipConfig.full()
    return TUNED.model_copy(update=skip or {})


@pytest.fixture(scope="module")
def llm(exported):
    from vllm import LLM

    return LLM(
        str(exported),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=8,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        limit_mm_per_prompt={"image": 4},
        seed=0,
    )


@pytest.fixture
def generate(llm):
    from vllm import SamplingParams

    def run(prompts):
        """Token ids for (question, images, skip)."""
        inputs = []
        for question, images, skip in prompts:
            one = {"prompt": prompt(question, len(images)), "multi_modal_data": {"image": images}}
            inputs.append(one if skip is None else one | {"mm_processor_kwargs": {"skip": skip}})
        outputs = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
        return [(output.prompt_token_ids, list(output.outputs[0].token_ids)) for output in outputs]

    return run


@pytest.fixture(scope="module")
def expected(engine_answers):
    return lambda prompts: engine_answers([(text, images, resolved(skip)) for text, images, skip in prompts])


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
def test_greedy_tokens_are_those_of_the_engine(skip, generate, expected, scenes):
    prompts = [(QUESTION, [scene], skip) for scene in scenes]
    answers = generate(prompts)
    assert [tokens for _, tokens in answers] == expected(prompts)
    kept = resolved(skip).counts(256).total
    assert {ids.count(2) for ids, _ in answers} == {kept}


def test_one_image_under_several_configs_in_one_batch(generate, expected, scenes):
    questions = (QUESTION, "How many objects are there?")
    prompts = [(text, scenes[:1], skip) for text in questions for skip in SKIPS.values()]
    answers = expected(prompts)
    for order in (1, -1, 1):  # Later rounds find images, encodings and prefixes in the caches.
        assert [tokens for _, tokens in generate(prompts[::order])] == answers[::order]


def test_several_images_in_prompts_that_are_prefilled_in_chunks(generate, expected, scenes):
    prompts = [
        (QUESTION, scenes[:3], None),
        (QUESTION, scenes[2:6], {"summary_tokens": 0}),
        (QUESTION, scenes[1:4], "full"),
        (QUESTION, scenes[:3], {"positions": "contiguous"}),
        (QUESTION, scenes[2:6], {"retained": 200}),
        (QUESTION, [scenes[0], scenes[0]], None),
    ]
    answers = expected(prompts)
    assert [tokens for _, tokens in generate(prompts)] == answers
    assert [tokens for _, tokens in generate(prompts)] == answers


def test_text_alone(generate, expected):
    prompts = [(QUESTION, [], None)]
    assert [tokens for _, tokens in generate(prompts)] == expected(prompts)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ({"retained": -1}, "retained=-1"),
        ("ful", "'ful': expected 'full'"),
        ({"skipped": 64}, r"skipped=64: .*retained=\d+, skipped=0"),
        ({"summary_tokens": 3}, "summary_tokens=3"),
        ({"retained": 0, "merge": "drop", "summary_tokens": 0}, "keeps none of the 256 tokens"),
    ],
)
def test_a_wrong_value_is_a_value_error_and_ends_nothing(skip, message, generate, expected, scenes):
    with pytest.raises(ValueError, match=message):
        generate([(QUESTION, scenes[:1], skip)])
    prompts = [(QUESTION, scenes[:1], None)]
    assert [tokens for _, tokens in generate(prompts)] == expected(prompts)


def test_skipped_tokens_are_mapped_to_retained_ones(generate, scenes):
    ((ids, _),) = generate([(QUESTION, scenes[:1], {"skipped": 64, "map_skipped": True})])
    assert 64 < ids.count(2) - 1 < 128


def test_positions_beyond_those_of_the_model_are_refused(generate, scenes):
    long = "blue " * 1100
    pruned = {"retained": 4, "summary_tokens": 0}
    for _ in range(2):  # then vLLM has the images in its cache
        with pytest.raises(ValueError, match=r"positions\s+reach \d+; the model knows 2048"):
            generate([(long, scenes[:4], pruned)])
    generate([(long, scenes[:4], {**pruned, "positions": "contiguous"})])


def test_profiling_counts_the_tokens_that_the_default_keeps(llm):
    config = llm.llm_engine.vllm_config
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    dummy = processor.get_dummy_mm_inputs({"image": 1})
    assert dummy["mm_placeholders"]["image"][0].length == TUNED.counts(256).total


def test_full_tokens_are_those_of_vllm_without_the_plugin(generate, exported, scenes, tmp_path):
    for number, scene in enumerate(scenes):
        scene.save(tmp_path / f"{number}.png")
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, script, exported, tmp_path, prompt(QUESTION), str(TOKENS)],
        capture_output=True, text=True, env=environment, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    plain = json.loads((tmp_path / "answers.json").read_text())
    answers = generate([(QUESTION, [scene], "full") for scene in scenes])
    assert [list(answer) for answer in answers] == plain


PLAIN = """
import json, sys
from pathlib import Path
from PIL import Image

def main():
    from vllm import LLM, SamplingParams
    model, folder, prompt, tokens = sys.argv[1:]
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=8, seed=0)
    images = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
    outputs = llm.generate(
        [{"prompt": prompt, "multi_modal_data": {"image": image}} for image in images],
        SamplingParams(temperature=0, max_tokens=int(tokens)), use_tqdm=False,
    )
    answers = [[output.prompt_token_ids, list(output.outputs[0].token_ids)] for output in outputs]
    Path(folder, "answers.json").write_text(json.dumps(answers))

if __name__ == "__main__":
    main()
"""
