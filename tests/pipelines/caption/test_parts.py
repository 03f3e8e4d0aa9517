"""The parts of a captioning job that need no Ray."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections import Counter

import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from pipelines.caption.attempts import Attempts
from pipelines.caption.config import CaptionConfig, ScalingSection
from pipelines.caption.folder import CaptionShards, Tally
from pipelines.caption.progress import CaptionProgress
from pipelines.caption.resources import engine_resources
from pipelines.caption.rows import Caption, CaptionRow, caption_table, manifest_rows, manifest_table
from pipelines.caption.stages import Assignment, CaptionActor, PreparedRow, _few_at_once, prepare_row
from pipelines.data.images import FileImage, InlineImage, ParquetImage, TarImage
from pipelines.data.rows import Message
from pipelines.data.special_tokens import SpecialTokens
from pipelines.engines.model import EngineModel, find_model
from pipelines.engines.thread import EngineThread
from pipelines.tracking.registry import fetch_model
from pipelines.tracking.run import Tracker
from skipvision.engine import Engine, Request, Sampling, prepare
from skipvision.errors import ConfigError, InputError, ResourceError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# ----------------------------------------------------------------------------------------- the result

CAPTIONS = [
    Caption(
        "a", text='a "cat"\nor <b>', finish_reason="stop", prompt_tokens=20, visual_tokens=16, seconds=0.5
    ),
    Caption("b", error_kind="missing image", error="image b.png does not exist"),
    Caption("ü\u2028", text="", prompt_tokens=21, visual_tokens=16, output_tokens=1),
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_captions_are_read_from_files_as_they_were_written(tmp_path, kind):
    shards = CaptionShards(tmp_path / "captions", kind)
    assert shards.missing(3) == [0, 1, 2]
    shards.write(1, CAPTIONS)
    assert shards.missing(3) == [0, 2]
    assert [Caption(**row) for row in shards.read(1).to_pylist()] == CAPTIONS
    assert [path.name for path in shards.folder.iterdir()] == [f"000001.{kind}"]


def test_a_half_written_file_does_not_count(tmp_path, monkeypatch):
    shards = CaptionShards(tmp_path, "parquet")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shards.write(0, CAPTIONS)
    assert shards.missing(1) == [0]
    assert not list(tmp_path.iterdir())
    (tmp_path / f".{shards.path(0).name}.partial").touch()  # as a killed process leaves it
    assert shards.missing(1) == [0]
    shards.clean()
    assert not list(tmp_path.iterdir())


def test_a_tally_counts_rows_errors_and_tokens(tmp_path):
    shards, tally = CaptionShards(tmp_path, "parquet"), Tally()
    for number in range(2):
        shards.write(number, CAPTIONS)
        tally.add(caption_table(CAPTIONS))
    assert shards.tally(3) == tally
    assert (tally.rows, tally.failed, tally.errors) == (6, 2, Counter({"missing image": 2}))
    assert tally.tokens["prompt_tokens"] == 82
    assert tally.tokens["output_tokens"] == 2


def test_rows_are_read_from_the_manifest_as_they_were_written():
    images = (
        FileImage("/a.png", 9),
        InlineImage(b"\x00\xff", "#1 of row a", 9),
        ParquetImage("/a.parquet", 1, 2, "image", 3, 9),
        TarImage("/a.tar", "x.png", 512, 100, 9),
    )
    row = CaptionRow("a", "rows.jsonl: line 1", (Message("system", "s"), Message("user", "u")), images)
    assert manifest_rows(manifest_table([row]), 9) == [row]


# ----------------------------------------------------------------------------------------- resources


@pytest.mark.parametrize(
    ("nodes", "scaling", "each"),
    [
        ([{"CPU": 2}], {}, (1.5, 0)),
        ([{"CPU": 16}], {"workers": 2, "readers": 4}, (7, 0)),
        ([{"CPU": 8}, {"CPU": 8}], {"workers": 2, "readers": 2}, (7.5, 0)),
        ([{"CPU": 8, "GPU": 2}], {"workers": 2}, (1, 1)),
        ([{"CPU": 8, "GPU": 2}], {"workers": 4, "gpus_per_worker": 0.5, "cpus_per_worker": 1.5}, (1.5, 0.5)),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 2}], {"gpus_per_worker": 0, "workers": 2}, (4, 0)),
        ([{"CPU": 0}], {"autoscaling": True, "workers": 8}, (1, 0)),
        ([], {"autoscaling": True, "workers": 2, "cpus_per_worker": 4, "gpus_per_worker": 1}, (4, 1)),
    ],
)
def test_engines_get_the_cpus_that_readers_leave(nodes, scaling, each):
    resources = engine_resources(nodes, ScalingSection(**scaling))
    assert (resources["CPU"], resources["GPU"]) == each


@pytest.mark.parametrize(
    ("nodes", "scaling"),
    [
        ([{"CPU": 2}], {"workers": 5}),
        ([{"CPU": 2}], {"cpus_per_worker": 2}),
        ([{"CPU": 8, "GPU": 1}], {"workers": 2}),
        ([{"CPU": 4, "GPU": 0}], {"gpus_per_worker": 1}),
        ([{"CPU": 1, "GPU": 1}], {"readers": 1}),
        ([], {}),
    ],
)
def test_engines_that_do_not_fit_are_refused(nodes, scaling):
    with pytest.raises(ResourceError, match="more than the cluster holds"):
        engine_resources(nodes, ScalingSection(**scaling))


# ----------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def processor(tiny_model):
    return AutoProcessor.from_pretrained(tiny_model)


def settings_of(tiny_model, **sections):
    model = {"path": str(tiny_model), "dtype": "float32", **sections.pop("model", {})}
    return CaptionConfig.model_validate({"name": "x", "model": model, "input": {"source": "x"}, **sections})


def test_a_registered_adapter_is_fetched_once_and_must_not_change(tiny_model, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = tmp_path / "adapter"
    for number in (1, 2):
        base = AutoModelForImageTextToText.from_pretrained(tiny_model)
        with sv.attach(base, sv.SkipConfig(retained=number)):
            sv.save_adapter(base, made)
        run = Tracker.start(uri, experiment="x", run_name="x", artifacts=tmp_path / "artifacts")
        run.register(made, "tiny", "candidate")
    config = settings_of(tiny_model, model={"adapter": "models:/tiny@candidate"})
    first = find_model(config, uri, tmp_path / "copy", "models:/tiny/1")
    assert (first.adapter_label, first.skip.retained) == ("models:/tiny/1", 1)
    newest = find_model(config, uri, tmp_path / "copy", None)
    assert (newest.adapter_label, newest.skip.retained) == ("models:/tiny/2", 2)
    before = (tmp_path / "copy/skip_config.json").stat().st_mtime_ns
    assert fetch_model(uri, "models:/tiny/2", tmp_path / "copy") == "models:/tiny/2"
    assert (tmp_path / "copy/skip_config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (None, sv.SkipConfig.full()),
        ("full", sv.SkipConfig.full()),
        ({"retained": 3}, sv.SkipConfig(retained=3)),
    ],
)
def test_without_an_adapter_nothing_is_skipped_by_default(tiny_model, tmp_path, skip, expected):
    model = find_model(settings_of(tiny_model, skip=skip), "sqlite:///none", tmp_path, None)
    assert (model.skip, model.adapter, model.adapter_label) == (expected, None, None)


# ------------------------------------------------------------------------------------------ readers


def test_a_prepared_row_has_the_inputs_of_the_processor(processor, tmp_path):
    Image.new("RGB", (40, 60), "red").save(tmp_path / "a.png")
    row = CaptionRow(
        "a",
        "a.png",
        (Message("user", "<image>What colour?"),),
        (FileImage(str(tmp_path / "a.png")),),
    )
    prepared = prepare_row(processor, 3, row)
    assert (prepared.number, prepared.key, prepared.problem) == (3, "a", None)
    content = [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    messages = [{"role": "user", "content": content}]
    expected = prepare(processor, Request(messages, [Image.open(tmp_path / "a.png")])).inputs
    from safetensors.torch import load

    found = load(prepared.inputs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name])


def test_only_few_results_wait_and_they_keep_their_order():
    running, most, done = set(), [], []
    lock = threading.Lock()

    def work(number):
        with lock:
            running.add(number)
            most.append(len(running) + len(done))
        time.sleep(0.01 * (5 - number % 5))
        with lock:
            running.discard(number)
            done.append(number)
        return number

    for expected, found in enumerate(_few_at_once(work, range(12), 3)):
        assert found == expected
        with lock:
            done.remove(found)
    assert max(most) <= 3


# ------------------------------------------------------------------------------------------ engines


@pytest.fixture
def engine(tiny_model, processor):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    with Engine(model, processor, sv.SkipConfig(retained=4, skipped=4), max_sequences=2) as engine:
        yield engine


def request(words, tokens=6):
    content = [{"type": "text", "text": words}]
    return Request([{"role": "user", "content": content}], sampling=Sampling(max_new_tokens=tokens))


def test_threads_share_an_engine_and_each_gets_its_own_answers(engine):
    batches = [[request(f"say {t} {i}", 3 + i) for i in range(3)] for t in range(5)]
    alone = [[next(engine.run([one])).text for one in batch] for batch in batches]
    shared, found = EngineThread(lambda: engine), {}

    def send(number):
        found[number] = [outcome.text for outcome in shared.answer(batches[number])]

    threads = [threading.Thread(target=send, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(5)] == alone
    assert shared.statistics().decode_steps > 0


def test_only_the_wrong_request_is_refused(engine):
    good, bad = EngineThread(lambda: engine).answer([request("hello"), request("word " * 600)])
    assert good.text is not None
    assert isinstance(bad, InputError)


def test_a_broken_engine_is_an_error_for_waiting_and_later_requests(engine, monkeypatch):
    shared = EngineThread(lambda: engine)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            shared.answer([request("hello")])


def test_requests_of_an_engine_that_ends_are_answered(engine, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()

    def fail():
        entered.set()
        go_on.wait(60)
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "step", fail)
    shared = EngineThread(lambda: engine)
    number = shared.submit(request("hello"), lambda item: None)
    entered.wait(60)
    question = shared.call(Engine.statistics)
    go_on.set()
    assert number.result(60) is not None
    with pytest.raises(ZeroDivisionError):
        question.result(60)
    with pytest.raises(ZeroDivisionError):
        shared.statistics()
    assert isinstance(shared.failure, ZeroDivisionError)


def test_an_engine_that_cannot_start_is_an_error_for_every_request(engine):
    shared = EngineThread(lambda: 1 / 0)
    for call in (shared.wait_until_ready, shared.statistics, lambda: shared.answer([request("hello")])):
        with pytest.raises(ZeroDivisionError):
            call()


class Undisturbed(CaptionActor):
    """An actor without Ray."""

    def __init__(self, work, engine):
        self.work, self.name, self.engine, self.alone = work, "here", engine, threading.Lock()
        self.special = SpecialTokens(AutoProcessor.from_pretrained(work.config.model.path))


def work_of(tiny_model, tmp_path, **sections):
    model = EngineModel("base", "base", None, None, sv.SkipConfig.full(), "auto", "sdpa")
    return Assignment(
        settings_of(tiny_model, **sections), model, tmp_path / "manifest", Attempts(tmp_path / "attempts")
    )


def test_only_the_row_that_kills_engines_becomes_an_error_row(tiny_model, tmp_path, engine):
    from pipelines.caption.stages import Block
    from pipelines.caption.stream import packed, unpacked

    class Deadly(EngineThread):
        def answer(self, requests):
            if any(request.inputs["input_ids"].shape == deadly for request in requests):
                raise SystemExit
            return super().answer(requests)

    work = work_of(tiny_model, tmp_path, scaling={"max_failures": 2})
    actor = Undisturbed(work, Deadly(lambda: engine))
    processor = AutoProcessor.from_pretrained(tiny_model)
    rows = [
        prepare_row(processor, number, CaptionRow(words, "", (Message("user", words),)))
        for number, words in enumerate(["a word", "the four words", "that kill this whole engine", "another"])
    ]
    deadly = safetensors.torch.load(rows[2].inputs)["input_ids"].shape
    block = packed(Block(7, rows))
    for _ in range(3):
        with pytest.raises(SystemExit):
            actor(block)
    (written,) = unpacked(actor(block))
    assert {number: caption.error_kind for number, caption in written.captions.items()} == {
        0: None,
        1: None,
        2: "generation",
        3: None,
    }
    assert "engines died 2 times while they captioned this row" in written.captions[2].error
    assert not list(work.attempts.folder.iterdir())


def test_the_error_of_an_engine_that_cannot_start_reaches_the_job(tiny_model, tmp_path):
    from pipelines.caption.stages import Block
    from pipelines.caption.stream import packed, unpacked

    actor = Undisturbed(work_of(tiny_model, tmp_path), ConfigError("summary_tokens = 3"))
    with pytest.raises(ConfigError, match="summary_tokens = 3"):
        list(unpacked(actor(packed(Block(0, [PreparedRow(0, "a")])))))


def test_each_row_has_its_own_constant_seed(tiny_model, tmp_path):
    sampling = {"temperature": 1.0, "seed": 5}
    actor = Undisturbed(work_of(tiny_model, tmp_path, sampling=sampling), None)
    again = Undisturbed(work_of(tiny_model, tmp_path, sampling=sampling), None)
    other = Undisturbed(work_of(tiny_model, tmp_path, sampling={**sampling, "seed": 6}), None)
    seeds = [actor._sampling("a").seed, actor._sampling("b").seed, other._sampling("a").seed]
    assert len(set(seeds)) == 3
    assert again._sampling("a").seed == seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)
    greedy = Undisturbed(work_of(tiny_model, tmp_path, sampling={"seed": 5}), None)
    assert greedy._sampling("a") == greedy._sampling("b")


def test_a_problem_of_a_row_is_kept_whatever_the_engine_answers(tiny_model, tmp_path):
    actor = Undisturbed(work_of(tiny_model, tmp_path), None)
    caption = actor._caption(PreparedRow(0, "a"), InputError("too long"))
    assert (caption.error_kind, caption.error) == ("prompt", "too long")


# ----------------------------------------------------------------------------------------- progress


class Silent:
    def metrics(self, values, step):
        self.values = values


def test_progress_has_rate_and_remaining_time(monkeypatch, capsys):
    from pipelines.caption.stages import CaptionedBlock

    now = [100.0]
    monkeypatch.setattr("pipelines.caption.progress.time.monotonic", lambda: now[0])
    progress = CaptionProgress("job", 1000, Tally(rows=100, errors=Counter({"prompt": 1})), Silent(), 7.0)
    for number in range(4):
        now[0] += 10
        captions = {row: Caption(str(row)) for row in range(40)}
        captions[0] = dataclasses.replace(captions[0], error_kind="missing image")
        progress.add(CaptionedBlock(number, captions, "engine", _statistics()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "row 260/1,000  5 errors  4.0 rows/s  3 min 5 s left"
    assert len(lines) == 3
    assert progress.seconds == 47.0
    assert progress.tracker.values["rows_per_second"] == 4.0
    assert progress.tracker.values["engine/running"] == 3


def test_progress_exports_the_rows_before_the_first_block(monkeypatch):
    exported = []
    monkeypatch.setattr("pipelines.cluster.metrics.JobGauges.set", lambda _, values: exported.append(values))
    CaptionProgress("job", 1000, Tally(rows=100), Silent(), 0.0).start()
    assert exported == [{"skipvision_batch_rows": 1000.0, "skipvision_batch_rows_done": 100.0}]


def _statistics():
    fields = {f.name: 3 for f in dataclasses.fields(sv.engine.Statistics)}
    return sv.engine.Statistics(**fields)


def test_malformed_names_of_models_are_refused(tmp_path):
    for name in ("models:/", "models:/a", "models:/a@", "models:/a/b/c", "models:/a@b@c"):
        with pytest.raises(ConfigError, match=re.escape(f"{name!r} names no model")):
            fetch_model("sqlite:///none", name, tmp_path)
