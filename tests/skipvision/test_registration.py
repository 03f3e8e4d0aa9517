"""A criterion and a merge from another package work everywhere, and no other file changes for them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import skipvision as sv
from skipvision import registry
from skipvision.__main__ import main
from skipvision.merge import MERGES, into_nothing
from skipvision.select import CRITERIA, by_norm
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.methods import scoped

MODULE = "methods_from_outside"
SOURCE = '''
import torch
import skipvision as sv
from skipvision.anatomy.probe import EarlyRun, Probe


def by_likeness(tokens, counts, seed):
    """Retain the tokens most like the image's first."""
    return (tokens.unit @ tokens.unit[:, :1].transpose(1, 2)).squeeze(2)


def read_inputs(run: EarlyRun):
    """The norm of each token where it enters the layer."""
    seen = []

    def note(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    run.up_to(run.layer.whole, note)
    return seen[0].norm(dim=-1)


def by_reading(tokens, counts, seed):
    return tokens.reading


def into_early(tokens, retained, skipped):
    """The first N_s of the rest survive; the others join the survivor that is most like them."""
    rest = tokens.valid & ~retained
    survives = rest & (rest.cumsum(dim=1) <= skipped[:, None])
    similarity = tokens.unit @ tokens.unit.transpose(1, 2)
    host = similarity.masked_fill(~survives[:, None], -torch.inf).argmax(dim=2)
    return torch.where(survives, torch.arange(rest.shape[1]), host)


sv.register_criterion("likeness", by_likeness, flops=lambda tokens, counts, width: 2 * tokens * width)
sv.register_criterion("deep_norm", by_reading, reads="decoder", probe=Probe(read_inputs))
sv.register_merge("early", into_early, flops=lambda tokens, counts, width: 2 * tokens**2 * width)
'''
CONFIG = {"retained": 4, "skipped": 3, "select": "likeness", "merge": "early"}
ROW = [["image", 5]]


@pytest.fixture
def forgotten():
    """Forget what a test registers."""
    yield
    for methods in (CRITERIA._methods, MERGES._methods):
        for name in [name for name in methods if methods[name].function.__module__ == MODULE]:
            del methods[name]
    sys.modules.pop(MODULE, None)
    registry._load.cache_clear()


@pytest.fixture
def outside(tmp_path, monkeypatch, forgotten):
    """The folder of a module that the environment names; nobody has imported it yet."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(registry.METHODS_VARIABLE, MODULE)
    assert MODULE not in sys.modules
    return tmp_path


@pytest.fixture(scope="module")
def model():
    model = tiny_llava(dtype=torch.float64)
    model.generation_config.eos_token_id = None
    return model


def test_attach_retains_and_merges_by_them(outside, model):
    inputs = tiny_inputs(ROW, dtype=torch.float64)
    with torch.no_grad(), sv.attach(model, sv.SkipConfig(**CONFIG)) as skip:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    features = naive.embed_rows(model, inputs)[0][:16].detach().tolist()
    likeness = {token: naive.cosine(features[token], features[0]) for token in range(16)}
    retained = sorted(sorted(likeness, key=likeness.__getitem__)[-4:])
    assert skip.plan.source[0, skip.plan.roles[0] == sv.TokenRole.RETAINED].tolist() == retained
    rest = [token for token in range(16) if token not in retained]
    assert skip.plan.source[0, skip.plan.roles[0] == sv.TokenRole.SKIPPED].tolist() == rest[:3]
    for token in rest[3:]:
        host = max(rest[:3], key=lambda one: naive.cosine(features[token], features[one]))
        assert int(skip.plan.source[0, skip.plan.merged_into[0, token]]) == host


@pytest.mark.parametrize("select", ["likeness", "deep_norm"])
def test_their_cost_is_predicted(select, outside, model):
    """The probe's cost by measuring it, the others' by their formulas; as measured on the model itself."""
    config = sv.SkipConfig(**CONFIG | {"select": select, "summary_tokens": 0, "probe_layer": 2})
    cost = sv.predict_cost(model.config, config, text_tokens=5)
    with torch.no_grad(), sv.attach(model, config):
        measured = sv.measure_flops(lambda: model(**tiny_inputs(ROW, dtype=torch.float64), logits_to_keep=1))
    assert cost.prefill_flops == pytest.approx(measured, rel=0.02)
    assert cost.ratio_to_full.prefill_flops == cost.prefill_flops / cost.full.prefill_flops
    merging = 2 * 16**2 * 32
    scoring = 2 * 16 * 32
    if select == "likeness":
        assert cost.planning_flops == merging + scoring
    else:
        assert cost.planning_flops > cost.full.prefill_flops / 4, "two of three layers run as a probe"


def test_the_engine_answers_requests_with_them(outside, model):
    config, inputs = sv.SkipConfig(**CONFIG), tiny_inputs(ROW, dtype=torch.float64)
    with sv.attach(model, config):
        alone = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    request = sv.Request(inputs=inputs, sampling=sv.Sampling(max_new_tokens=4), skip=config)
    with sv.Engine(model, None, sv.SkipConfig(retained=1.0, skipped=0.0)) as engine:
        (completion,) = engine.run([request])
    assert completion.error is None
    assert list(completion.choices[0].token_ids) == alone


def test_a_chat_request_may_name_them(applications, outside, model):
    """The endpoint's own schema validates `skip`, and lists the names in its OpenAPI document."""
    from serve.chat.schemas import ChatRequest

    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "skip": CONFIG}
    assert ChatRequest.model_validate(body).skip == sv.SkipConfig(**CONFIG)
    fields = ChatRequest.model_json_schema()["$defs"]["SkipConfig"]["properties"]
    assert fields["select"]["enum"] == list(CRITERIA)
    assert fields["merge"]["enum"] == list(MERGES)
    assert "deep_norm" in fields["select"]["enum"]


def test_a_job_may_name_them(applications, outside, capsys):
    from pipelines.finetune.config import FinetuneConfig
    from pipelines.shared.config import load_config

    given = ["--name", "x", "--model.path", "m", "--data.train", "t.json", "--skip.merge", "early"]
    assert load_config(FinetuneConfig, given, description=None).skip.merge == "early"
    with pytest.raises(SystemExit):
        load_config(FinetuneConfig, ["--help"], description=None)
    assert "| 'likeness' | 'deep_norm', default 'similarity'\n" in capsys.readouterr().out


def test_the_command_line_draws_an_overlay_with_them(outside, tiny_model):
    """In a process of its own, where only the environment names the module."""
    Image.effect_noise((120, 80), 90).save(outside / "in.png")
    options = [f"--{name}={value}" for name, value in CONFIG.items()]
    command = [sys.executable, "-m", "skipvision", "overlay", "--model", str(tiny_model), *options]
    done = subprocess.run(
        [*command, str(outside / "in.png"), "-o", str(outside / "out.png")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(outside)},
        capture_output=True,
        text=True,
    )
    assert "retained 4, skipped 3, merged 9, dropped 0" in done.stdout, done.stderr


def test_an_installed_package_may_name_its_module_by_an_entry_point(tmp_path, monkeypatch, forgotten):
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "outside-1.0.dist-info").mkdir()
    (tmp_path / "outside-1.0.dist-info" / "METADATA").write_text("Name: outside\nVersion: 1.0\n")
    (tmp_path / "outside-1.0.dist-info" / "entry_points.txt").write_text(
        f"[{registry.METHODS_GROUP}]\noutside = {MODULE}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert sv.SkipConfig(select="likeness").criterion.name == "likeness"


def test_a_module_that_cannot_be_imported(monkeypatch, forgotten):
    monkeypatch.setenv(registry.METHODS_VARIABLE, "there_is_none")
    with pytest.raises(sv.ConfigError, match="SKIPVISION_METHODS=there_is_none names there_is_none, which"):
        sv.SkipConfig(select="likeness")
    assert sv.SkipConfig(select="norm").select == "norm", "a known name needs no other module"


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        (
            "select",
            "simlarity",
            "'similarity', 'ffn_ratio', .* or 'relevance'; did you mean 'simi.* SKIPVISION_METHODS",
        ),
        ("merge", "pol", "'similarity', 'pool', 'drop', 'tome' or 'grid'; did you mean 'pool'"),
        ("merge", 3, r"'similarity', 'pool', 'drop', 'tome' or 'grid' \(methods of other packages need SKIP"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(field, value, names):
    with pytest.raises(sv.ConfigError, match=f"^SkipConfig: {field}={value!r}: should be {names}"):
        sv.SkipConfig(**{field: value})


def test_a_config_from_a_process_that_knew_more(model):
    """Unpickling validates nothing, so an unknown name shows only where the method is needed."""
    config = sv.SkipConfig().model_copy(update={"select": "likeness"})
    with pytest.raises(sv.ConfigError, match="there is no criterion 'likeness'; expected 'similarity', "):
        sv.attach(model, config)


def test_names_are_taken_once():
    with pytest.raises(
        sv.ConfigError, match=r"criterion 'norm' is registered already, by skipvision\.select"
    ):
        sv.register_criterion("norm", lambda tokens, counts, seed: tokens.redundancy)
    assert sv.register_criterion("norm", by_norm) == CRITERIA["norm"], "as when a module is reloaded"
    with pytest.raises(sv.ConfigError, match="merge 'pool' is registered already"):
        sv.register_merge("pool", into_nothing)


@pytest.mark.parametrize("wrong", [{"reads": "decoder"}, {"reads": "walls"}, {"probe": object()}])
def test_a_criterion_that_contradicts_itself(wrong):
    with pytest.raises(sv.ConfigError, match=r"criterion 'new' has reads="):
        sv.register_criterion("new", by_norm, **wrong)


# --------------------------------------------------------------------------------------- conflicts


def run_python(tmp_path, source, *command, **env):
    (tmp_path / "mymod.py").write_text(source)
    return subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}", **env},
        capture_output=True,
        text=True,
    )


MINE = """
import skipvision as sv

def score(tokens, counts, seed):
    return tokens.redundancy

sv.register_criterion("mine", score)
sv.register_criterion("lambda", lambda tokens, counts, seed: tokens.redundancy)
if __name__ == "__main__":
    from skipvision.select import CRITERIA
    print(len(list(CRITERIA)))  # imports the modules of the environment
    print(CRITERIA["mine"].name, CRITERIA["lambda"].name)
"""


@pytest.mark.parametrize("command", [pytest.param(["mymod.py"], marks=pytest.mark.slow), ["-m", "mymod"]])
def test_a_script_may_register_its_methods_and_be_named_in_the_environment(command, tmp_path):
    done = run_python(tmp_path, MINE, *command, SKIPVISION_METHODS="mymod")
    assert done.stdout.splitlines()[1:] == ["mine lambda"], done.stderr


def test_a_conflict_in_a_module_is_not_reported_as_a_failed_import(tmp_path):
    taken = "import skipvision as sv\nsv.register_criterion('norm', lambda *given: None)\n"
    done = run_python(tmp_path, taken, "-m", "skipvision", "overlay", "--help", SKIPVISION_METHODS="mymod")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "python -m skipvision: criterion 'norm' is registered already, by skipvision.select.by_norm: choose "
        "another name for mymod.<lambda> in line 2"
    )


def test_a_second_lambda_does_not_replace_the_first():
    first = sv.register_criterion("anonymous", lambda tokens, counts, seed: tokens.redundancy)
    with (
        scoped(first, CRITERIA),
        pytest.raises(sv.ConfigError, match=r"by .*<lambda> in line \d+: choose another name for .*<lambda>"),
    ):
        sv.register_criterion("anonymous", lambda tokens, counts, seed: -tokens.redundancy)


# ------------------------------------------------------------------------------------ documentation


def test_the_documentation_lists_exactly_the_built_in_methods():
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    for field, methods in (("select", CRITERIA), ("merge", MERGES)):
        table = page.split(f"| `{field}` |")[1].split("\n\n")[0]
        cells = [line.split("|")[1] for line in table.splitlines()[2:]]
        listed = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
        built_in = [name for name in methods if registry.is_built_in(methods[name])]
        assert sorted(listed) == sorted(built_in)


def test_the_help_of_the_overlay_lists_the_choices(capsys):
    with pytest.raises(SystemExit):
        main(["overlay", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for choices in (CRITERIA, MERGES, ["original", "contiguous"], ["raster", "grouped"]):
        assert f": {', '.join(choices)}" in words


# ------------------------------------------------------------------------------------ other processes


def test_a_ray_task_finds_the_methods_that_its_environment_names(outside, local_ray):
    import ray

    @ray.remote(num_cpus=0.1)
    def merging(config):
        from skipvision import SkipConfig

        config = SkipConfig(**config)
        return config.criterion.function.__module__, config.merging.name

    environment = {
        "env_vars": {
            registry.METHODS_VARIABLE: MODULE,
            "PYTHONPATH": f"{Path(__file__).parents[2]}:{outside}",
        }
    }
    task = merging.options(runtime_env=environment).remote(CONFIG)
    assert ray.get(task, timeout=120) == (MODULE, "early")
