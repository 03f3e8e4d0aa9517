"""Scenes, their questions, and the files of the data set."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.shapes_words import COLOURS, PLACES, SHAPES
from pipelines.shapes.files import ShapesConfig, write_shapes
from pipelines.shapes.scenes import (
    IMAGE_SIZE,
    SPLITS,
    TASKS,
    digit_centres,
    question_for,
    render,
    sample_scene,
    split_of,
)
from skipvision.errors import ConfigError

PATCH = 14
PLURALS = {
    "circles": "circle",
    "squares": "square",
    "triangles": "triangle",
    "stars": "star",
    "crosses": "cross",
    "diamonds": "diamond",
}


def scenes(count, split="train", seed=3):
    return [sample_scene(seed, split, index)[0] for index in range(count)]


def only(values):
    """Return the only value; with two, the question would be ambiguous."""
    (value,) = values
    return value


def answers_from(scene, prompt):
    """Work out the answer to a prompt from the scene, independently of the generator."""
    grid = {thing.cell: (thing.size, thing.colour, thing.shape) for thing in scene.things}
    assert len(grid) == len(scene.things), "two objects in one cell"
    assert scene.number_cell not in grid, "an object under the number"
    if prompt in ("Describe the image.", "What is in the picture?"):
        phrases = []
        for cell, place in enumerate(PLACES):
            if cell in grid:
                phrases.append(f"a {' '.join(grid[cell])} at the {place}")
            if cell == scene.number_cell:
                phrases.append(f"the number {scene.number} at the {place}")
        return re.sub(r", (?=[^,]*$)", " and ", ", ".join(phrases)) + "."
    if prompt in ("What number is written?", "Read the number."):
        return scene.number
    if prompt == "Where is the number?":
        return PLACES[scene.number_cell]
    if prompt == "How many shapes are there?":
        return str(len(grid))
    if match := re.fullmatch(r"What (colour|shape) is (?:the shape )?at the ([a-z ]+)\?", prompt):
        _, colour, shape = grid[PLACES.index(match[2])]
        return {"colour": colour, "shape": shape}[match[1]]
    if match := re.fullmatch(r"What colour is the ([a-z]+)\?", prompt):
        return only(colour for _, colour, shape in grid.values() if shape == match[1])
    if match := re.fullmatch(r"What shape is ([a-z]+)\?", prompt):
        return only(shape for _, colour, shape in grid.values() if colour == match[1])
    if match := re.fullmatch(r"Where is the ([a-z]+) ([a-z]+)\?", prompt):
        return PLACES[only(cell for cell, thing in grid.items() if thing[1:] == (match[1], match[2]))]
    if match := re.fullmatch(r"How many ([a-z]+) shapes are there\?", prompt):
        assert match[1] in COLOURS
        return str(sum(colour == match[1] for _, colour, _ in grid.values()))
    if match := re.fullmatch(r"How many ([a-z]+) are there\?", prompt):
        return str(sum(shape == PLURALS[match[1]] for _, _, shape in grid.values()))
    raise AssertionError(f"unknown question: {prompt!r}")


# ------------------------------------------------------------------------------------------- scenes


def test_a_scene_is_a_function_of_seed_split_and_index():
    scene, rng = sample_scene(5, "test", 17)
    again, same_rng = sample_scene(5, "test", 17)
    assert scene == again
    assert rng.random() == same_rng.random()
    others = [sample_scene(6, "test", 17), sample_scene(5, "validation", 17), sample_scene(5, "test", 18)]
    assert all(scene != other for other, _ in others)


def test_splits_share_no_scene_whatever_the_seed():
    shown = {split: set() for split in SPLITS}
    for seed, (split, count) in ((s, c) for s in (0, 7) for c in zip(SPLITS, (2000, 500, 500), strict=True)):
        for scene in scenes(count, split, seed):
            assert split_of(scene) == split
            shown[split].add(scene.signature)
    assert not shown["train"] & shown["validation"]
    assert not shown["train"] & shown["test"]
    assert not shown["validation"] & shown["test"]
    assert sum(map(len, shown.values())) > 5900, "nearly all scenes should differ"


def test_the_split_depends_on_the_content_and_not_on_exact_positions():
    for scene in scenes(50):
        nudged = tuple(
            replace(t, centre=(t.centre[0] + 1, t.centre[1]), radius=t.radius - 1) for t in scene.things
        )
        moved = replace(scene, things=nudged, number_centre=(0.0, 0.0), background=(0, 0, 0))
        assert split_of(moved) == split_of(scene)
    signatures = [scene.signature for scene in scenes(500)]
    assert len(set(signatures)) == len(signatures)


def test_scenes_vary_in_every_attribute():
    things = [thing for scene in scenes(400) for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.cell for thing in things} == set(range(9))
    assert {len(scene.things) for scene in scenes(50)} == {1, 2, 3, 4}
    assert {len(scene.number) for scene in scenes(50)} == {2, 3}


def test_objects_and_numbers_stay_in_their_cells():
    side = IMAGE_SIZE / 3
    for scene in scenes(300):
        boxes = [(t.cell, *t.centre, t.radius, t.radius) for t in scene.things]
        digits = [x for _, x, _ in digit_centres(scene)]
        middle = (min(digits) + max(digits)) / 2
        boxes.append(
            (scene.number_cell, middle, scene.number_centre[1], (max(digits) - min(digits)) / 2 + 8, 10)
        )
        for cell, x, y, half_width, half_height in boxes:
            row, column = divmod(cell, 3)
            assert column * side <= x - half_width
            assert x + half_width <= (column + 1) * side
            assert row * side <= y - half_height
            assert y + half_height <= (row + 1) * side


# ------------------------------------------------------------------------------------------ drawing


def test_objects_are_drawn_in_their_colour_at_their_centre():
    for scene in scenes(60):
        pixels = np.asarray(render(scene))
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        for thing in scene.things:
            x, y = (int(coordinate) for coordinate in thing.centre)
            np.testing.assert_array_equal(pixels[y, x], COLOURS[thing.colour])


def test_shapes_look_different():
    scene = scenes(1)[0]
    thing = replace(scene.things[0], centre=(112.0, 112.0), radius=25.0)
    drawn = {shape: render(replace(scene, things=(replace(thing, shape=shape),))) for shape in SHAPES}
    assert len({image.tobytes() for image in drawn.values()}) == len(SHAPES)
    with pytest.raises(ValueError, match="'blob' cannot be drawn"):
        render(replace(scene, things=(replace(thing, shape="blob"),)))


def test_digits_are_at_least_a_patch_apart():
    for scene in scenes(300):
        centres = digit_centres(scene)
        assert "".join(digit for digit, _, _ in centres) == scene.number
        for (_, left, _), (_, right, _) in pairwise(centres):
            assert right - left >= PATCH


def test_digits_are_drawn_at_their_reported_centres():
    for scene in scenes(60):
        row, column = divmod(scene.number_cell, 3)
        side = IMAGE_SIZE // 3
        cell = np.asarray(render(scene).convert("L"))[row * side : (row + 1) * side + 2]
        dark = np.flatnonzero((cell < 90).any(axis=0))
        dark = dark[(dark >= column * side) & (dark <= (column + 1) * side + 2)]
        nearest = [min(digit_centres(scene), key=lambda centre: abs(centre[1] - x)) for x in dark]
        for digit in digit_centres(scene):
            ink = dark[[centre == digit for centre in nearest]]
            assert abs((ink.min() + ink.max() + 1) / 2 - digit[1]) < 3


# ---------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right_and_every_question_has_only_one(task):
    prompts, answers = set(), set()
    for index in range(600):
        scene, rng = sample_scene(11, "train", index)
        question = question_for(scene, task, rng)
        assert question.task == task
        assert question.answer == answers_from(scene, question.prompt), question.prompt
        prompts.add(question.prompt)
        answers.add(question.answer)
    assert len(prompts) > 1
    assert len(answers) >= 5


# -------------------------------------------------------------------------------------------- files


def config(output, **changes):
    return ShapesConfig(**{"output": output, "seed": 2, "train": 24, "validation": 3, "test": 4, **changes})


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return folder, write_shapes(config(folder))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def test_the_summary_matches_the_files(data_set):
    folder, summary = data_set
    assert summary["folder"] == str(folder)
    expected = {"train": (24, 24), "validation": (3, 18), "test": (4, 24)}
    for split, (images, rows) in expected.items():
        file = str(folder / f"{split}.json")
        assert summary["splits"][split] == {"file": file, "images": images, "drawn": images, "rows": rows}
        assert len(rows_of(folder, split)) == rows
        assert len(list((folder / "images" / split).iterdir())) == images


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(data_set, tmp_path):
    folder, _ = data_set
    write_shapes(config(tmp_path / "same"))
    assert files(tmp_path / "same") == files(folder)
    write_shapes(config(tmp_path / "other", seed=4))
    assert rows_of(tmp_path / "other", "train") != rows_of(folder, "train")


def test_a_larger_data_set_starts_with_the_smaller_one(data_set, tmp_path):
    folder, _ = data_set
    write_shapes(config(tmp_path, train=30))
    assert rows_of(tmp_path, "train")[:24] == rows_of(folder, "train")


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_real_files_of_both_kinds_and_show_their_scene(data_set, split):
    folder, _ = data_set
    kinds = set()
    for index, name in enumerate(dict.fromkeys(row["image"] for row in rows_of(folder, split))):
        expected = np.asarray(render(sample_scene(2, split, index)[0]), dtype=int)
        with Image.open(folder / name) as image:
            assert {"PNG": ".png", "JPEG": ".jpg"}[image.format] == Path(name).suffix
            kinds.add(image.format)
            difference = np.abs(np.asarray(image, dtype=int) - expected)
        assert difference.mean() < 1
        assert name.endswith(".jpg") or difference.max() == 0
    assert kinds == {"PNG", "JPEG"}


@pytest.mark.parametrize("split", SPLITS)
def test_conversations_are_llava_with_right_answers(data_set, split):
    folder, _ = data_set
    for row in rows_of(folder, split):
        assert row.keys() == {"id", "image", "task", "conversations"}
        scene, _ = sample_scene(2, split, int(row["id"].split("-")[1]))
        humans, answers = row["conversations"][::2], row["conversations"][1::2]
        assert {turn["from"] for turn in humans} == {"human"}
        assert {turn["from"] for turn in answers} == {"gpt"}
        assert "".join(turn["value"] for turn in humans).count("<image>") == 1
        assert humans[0]["value"].startswith("<image>\n")
        for human, answer in zip(humans, answers, strict=True):
            assert answer["value"] == answers_from(scene, human["value"].removeprefix("<image>\n"))


def test_ids_are_unique(data_set):
    folder, _ = data_set
    ids = [row["id"] for split in SPLITS for row in rows_of(folder, split)]
    assert len(set(ids)) == len(ids)


def test_held_out_rows_have_one_question_and_equal_shares_of_tasks(data_set):
    folder, _ = data_set
    rows = rows_of(folder, "test")
    assert all(len(row["conversations"]) == 2 for row in rows)
    tasks = [row["task"] for row in rows]
    assert {task: tasks.count(task) for task in tasks} == dict.fromkeys(TASKS, 4)
    assert all(row["task"] == row["id"].rsplit("-")[-1] for row in rows)


def test_train_rows_mix_tasks_and_no_question_follows_the_caption(tmp_path):
    write_shapes(config(tmp_path, validation=0, test=0, turns_per_image=4, train=60))
    for row in rows_of(tmp_path, "train"):
        prompts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"][::2]]
        assert row["task"] == "mixed"
        assert len(prompts) == 4
        assert not {"Describe the image.", "What is in the picture?"} & set(prompts[:-1])
    assert not (tmp_path / "test.json").exists()


def test_a_single_turn_names_its_task(tmp_path):
    write_shapes(config(tmp_path, validation=0, test=0, turns_per_image=1))
    rows = rows_of(tmp_path, "train")
    assert {row["task"] for row in rows} <= set(TASKS)
    assert all(len(row["conversations"]) == 2 for row in rows)


def test_running_again_draws_only_what_is_missing(tmp_path):
    write_shapes(config(tmp_path))
    before = files(tmp_path)
    (tmp_path / "images/train/000007.jpg").unlink()
    (tmp_path / "test.json").unlink()
    untouched = tmp_path / "images/train/000006.png"
    stamp = untouched.stat().st_mtime_ns
    summary = write_shapes(config(tmp_path))
    assert {split: part["drawn"] for split, part in summary["splits"].items()} == {
        "train": 1,
        "validation": 0,
        "test": 0,
    }
    assert files(tmp_path) == before
    assert untouched.stat().st_mtime_ns == stamp


def test_an_interrupted_image_never_has_its_final_name(tmp_path, monkeypatch):
    def interrupted(image, path, **options):
        Path(path).write_bytes(b"half an image")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(config(tmp_path))
    assert not (tmp_path / "train.json").exists()
    write_shapes(config(tmp_path))
    for name in {row["image"] for row in rows_of(tmp_path, "train")}:
        Image.open(tmp_path / name).load()


def test_a_folder_of_another_seed_is_rejected(data_set):
    folder, _ = data_set
    with pytest.raises(ConfigError, match=r'"seed": 2.*choose another output folder'):
        write_shapes(config(folder, seed=3))


def test_progress_is_visible(tmp_path, capsys):
    write_shapes(config(tmp_path))
    assert "train 24/24 images" in capsys.readouterr().out


def test_the_job_follows_its_config(tmp_path):
    root = Path(__file__).parents[3]
    command = [
        sys.executable,
        root / "jobs/make_shapes.py",
        "--config",
        root / "jobs/configs/shapes_demo.yaml",
    ]
    options = ["--output", tmp_path / "out", "--train", 3, "--validation", 1, "--test", 1]
    done = subprocess.run(
        list(map(str, command + options)), capture_output=True, text=True, check=True, cwd=tmp_path
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["splits"]["train"]["rows"] == 3
    assert len(rows_of(tmp_path / "out", "test")) == len(TASKS)
