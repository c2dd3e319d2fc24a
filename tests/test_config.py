"""Files and words of the command line become one configuration; every message says what, where and how to mend it."""

import inspect
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.cogvideox.engine import build_engine
from sat.compat.sat_names import INEFFECTIVE, TARGETS
from sat.config import (
    SECTIONS,
    ConfigNode,
    annotate_config,
    build_dataclass,
    dump_config,
    instantiate_from_config,
    load_config,
    load_yaml,
    resolve_target,
    split_overrides,
)
from sat.errors import ConfigError
from sat.sampling.args import sample_args
from sat.training.args import deepspeed_config, train_args
from sat.training.preview import check_numbers, derived_lines
from tests.golden_files import released_configs

ROOT = Path(__file__).parents[1]
OURS = sorted((ROOT / "configs").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def plain(*paths: Path, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """The merged configuration without its empty sections."""
    return {key: value for key, value in load_config(paths, words).plain().items() if value}


# --- reading and merging ---------------------------------------------------------------------------------------------


def test_files_merge_key_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    one = write(tmp_path, "args: {train_iters: 1, train_data: [a, b], save: runs}\nmodel: {scale_factor: 1}", "1.yaml")
    two = write(tmp_path, "args: {train_iters: 2, train_data: [c]}\ndeepspeed: {bf16: {enabled: true}}", "2.yaml")
    assert plain(one, two) == {
        "args": {"train_iters": 2, "train_data": ["c"], "save": "runs"},
        "model": {"scale_factor": 1},
        "deepspeed": {"bf16": {"enabled": True}},
    }
    assert plain(two, one)["args"]["train_iters"] == 1


@pytest.mark.parametrize(
    ("overlay", "merged"),
    [
        ("{target: a.B, params: {y: 3}}", {"target": "a.B", "params": {"x": 1, "y": 3}}),
        ("{target: c.D, params: {y: 3}}", {"target": "c.D", "params": {"y": 3}}),
        ("{target: c.D}", {"target": "c.D"}),
        ("{params: {y: 3}}", {"target": "a.B", "params": {"x": 1, "y": 3}}),
    ],
)
def test_another_target_brings_its_own_params(tmp_path: Path, overlay: str, merged: dict[str, Any]) -> None:
    base = write(tmp_path, "data: {target: a.B, params: {x: 1, y: 2}}", "1.yaml")
    assert plain(base, write(tmp_path, f"data: {overlay}", "2.yaml"))["data"] == merged


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        ("-2.5e-4", -2.5e-4),
        ("1.e2", 100.0),
        ("1e+6", 1e6),
        ("0.00001", 1e-5),
        ("e5", "e5"),
        ("1e-5x", "1e-5x"),
        ("'1e-5'", "1e-5"),
        ("3.", 3.0),
        ("12", 12),
        ("True", True),
        ("null", None),
    ],
)
def test_numbers_as_users_write_them(tmp_path: Path, text: str, value: Any) -> None:
    path = write(tmp_path, f"args: {{x: {text}}}")
    got = load_config([path])["args"]["x"]
    assert got == value and type(got) is type(value)
    assert plain(words=(f"args.x={text}",)) == {"args": {"x": value}}


def test_words_win_over_files_and_reach_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {parts: [{rate: 1, more: {deep: 2}}, 7]}\nargs: {save: runs}")
    words = (
        "model.parts.0.rate=0.5",
        "model.parts.0.more.deep=x",
        "model.parts.1=8",
        "args.save=",
        "args.train_data=[a, b]",
        "deepspeed.fp16.enabled=true",
        "args.save=again",
    )
    assert plain(path, words=words) == {
        "model": {"parts": [{"rate": 0.5, "more": {"deep": "x"}}, 8]},
        "args": {"save": "again", "train_data": ["a", "b"]},
        "deepspeed": {"fp16": {"enabled": True}},
    }


def test_a_word_may_replace_a_whole_mapping(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {target: a.B, params: {x: 1, y: 2}}")
    assert plain(path, words=("data.params={z: 3}",))["data"]["params"] == {"z": 3}


def test_every_value_knows_who_set_it(tmp_path: Path) -> None:
    one = write(tmp_path, "args:\n  save: runs\n  train_iters: 1\nmodel:\n  parts:\n    - rate: 1\n", "1.yaml")
    two = write(tmp_path, "args:\n\n  train_iters: 2\n", "2.yaml")
    config = load_config([one, two], ["args.seed=3", "model.parts.0.rate=2"])
    assert config["args"].where("save") == f"args.save ({one} line 2)"
    assert config["args"].where("train_iters") == f"args.train_iters ({two} line 3)"
    assert config["args"].where("seed") == "args.seed (the command line)"
    assert config["model"]["parts"][0].where("rate") == "model.parts[0].rate (the command line)"


def test_sections_are_always_there(tmp_path: Path) -> None:
    config = load_config([write(tmp_path, "args:\n")])
    assert set(config) == set(SECTIONS) and all(config[section].plain() == {} for section in SECTIONS)
    assert load_config([]).plain() == {section: {} for section in SECTIONS}


def test_words_and_files_may_be_mixed(tmp_path: Path) -> None:
    odd = write(tmp_path, "", "lr=1.yaml")
    assert split_overrides(["a.yaml", "args.x=1", str(odd), "b.yaml"]) == (["a.yaml", str(odd), "b.yaml"], ["args.x=1"])
    long = f"stages=[{'x' * 300}]"  # longer than the name of a file can be
    assert split_overrides(["a.yaml", long]) == (["a.yaml"], [long])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "arg: {x: 1}",
            r"unknown section arg \(.*a.yaml line 1\); did you mean 'args'\?; sections: args, model, data, ",
        ),
        ("args: 3", r"args \(.*a.yaml line 1\) is a number \(3\); give a mapping of keys"),
        (
            "args:\n  x: 1\n  y: 2\n  x: 3",
            r"a.yaml line 4: key 'args.x' is given twice \(first on line 2\); delete one",
        ),
        ("- 1", "a.yaml holds a list; a configuration is a mapping with args, model, data, deepspeed"),
        ("args: {x: [1", "a.yaml is not valid YAML: .*line 1"),
        ("args: {x: !!python/object:os.system 1}", "a.yaml is not valid YAML: could not determine a constructor"),
    ],
)
def test_wrong_files_are_named_with_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config([write(tmp_path, text)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.yaml: No such file"):
        load_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ConfigError, match=r"weights\.pt is not a text file; --base takes YAML files"):
        load_yaml(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "train_iters",
            "cannot read 'train_iters' on the command line; write section.key=value, e.g. args.train_iters=20",
        ),
        ("args..x=1", r"cannot read 'args\.\.x=1'"),
        ("=1", "cannot read '=1'"),
        ("model.parts.2=1", "'model.parts.2=1': model.parts is a list of 2; name one of its places, 0 up"),
        ("model.parts.x.y=1", "model.parts is a list of 2"),
        ("arg.x=1", r"unknown section arg \(the command line\); did you mean 'args'\?"),
        ("args.x=[1", "the command line is not valid YAML"),
    ],
)
def test_wrong_words_are_named(tmp_path: Path, word: str, message: str) -> None:
    path = write(tmp_path, "model: {parts: [1, 2]}")
    with pytest.raises(ConfigError, match=message):
        load_config([path], [word])


# --- writing ---------------------------------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
leaves |= st.sampled_from(
    ["1e-5", "1e5", "yes", "null", "a: b", "# no", "12:30", "2026-01-01", "a\nb", "'", "{}", " x"]
)
keys = st.from_regex(r"[a-z_]{1,6}", fullmatch=True) | st.sampled_from(["yes", "on", "null", "1e3", "a b", "a: b"])
trees = st.dictionaries(
    st.sampled_from(SECTIONS),
    st.dictionaries(
        keys,
        st.recursive(
            leaves,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    ),
)


def filled(tree: dict[str, Any]) -> dict[str, Any]:
    return {section: tree.get(section, {}) for section in SECTIONS}


@settings(deadline=None, max_examples=200)
@given(tree=trees)
def test_what_is_written_reads_back(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("written")
    path = write(folder, dump_config(filled(tree)))
    assert load_config([path]).plain() == filled(tree)
    annotated = write(folder, annotate_config(load_config([path])), "annotated.yaml")
    assert load_config([annotated]).plain() == filled(tree)


def test_annotations_name_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "args:\n  lr: 1e-5\nmodel:\n  parts:\n  - rate: 1\n  - 2\n")
    lines = annotate_config(load_config([path], ["args.save=runs"])).splitlines()
    assert [re.split(r"\s+#\s", line) for line in lines] == [
        ["args:"],
        ["  lr: 1.0e-05", f"{path} line 2"],
        ["  save: runs", "the command line"],
        ["model:"],
        ["  parts:", f"{path} line 4"],
        ["    -"],
        ["      rate: 1", f"{path} line 5"],
        ["    - 2"],
        ["data: {}"],
        ["deepspeed: {}"],
    ]


# --- typed sections --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 1
    rate: float = 0.5
    name: str = "a"
    flag: bool = False
    kind: Literal["one", "two"] = "one"
    paths: list[str] | str | None = None
    betas: tuple[float, ...] = (0.9, 0.99)
    anything: Any = None


def section(tmp_path: Path, text: str) -> ConfigNode:
    return load_config([write(tmp_path, f"args:\n  {text}\n")])["args"]


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("steps: 2", "steps", 2),
        ("steps: 3.", "steps", 3),  # released files write `skip_frms_num: 3.`
        ("rate: 2", "rate", 2.0),
        ("name: 5", "name", "5"),
        ("flag: yes", "flag", True),
        ("kind: two", "kind", "two"),
        ("paths: x", "paths", "x"),
        ("paths: [x, y]", "paths", ["x", "y"]),
        ("paths: null", "paths", None),
        ("betas: [1, 2]", "betas", (1.0, 2.0)),
        ("anything: {a: 1}", "anything", {"a": 1}),
    ],
)
def test_values_become_what_the_field_is(tmp_path: Path, text: str, field: str, value: Any) -> None:
    got = getattr(build_dataclass(Settings, section(tmp_path, text)), field)
    assert got == value and type(got) in (type(value), ConfigNode)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 2", r"unknown key args.step \(.*a.yaml line 2\); did you mean 'steps'\?"),
        ("zzzz: 2", r"unknown key args.zzzz \(.*a.yaml line 2\)$"),
        ("other_reader: 2", r"unknown key args.other_reader \(.*line 2\); did you mean 'other_readers'\?"),
        ("steps: two", r"args.steps \(.*a.yaml line 2\) is a text \('two'\); give a whole number"),
        ("steps: 2.5", r"args.steps \(.*\) is 2.5; give a whole number"),
        ("steps: true", r"args.steps \(.*\) is a yes/no value \(True\); give a whole number"),
        ("rate: fast", r"args.rate \(.*\) is a text \('fast'\); give a number"),
        ("name: [a]", r"args.name \(.*\) is a list; give a text"),
        ("flag: 1", r"args.flag \(.*\) is a number \(1\); give true or false"),
        ("flag: null", r"args.flag \(.*\) is None; give true or false"),
        ("kind: three", r"args.kind \(.*\) is 'three'; give one of one, two"),
        ("paths: {a: 1}", r"args.paths \(.*\) is a mapping; give a list"),
        ("betas: 0.9", r"args.betas \(.*\) is 0.9; give a list"),
        ("betas: [0.9, x]", r"args.betas \(.*\)\[1\] is a text \('x'\); give a number"),
    ],
)
def test_wrong_values_are_named_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_dataclass(Settings, section(tmp_path, text), also_known=["other_readers"])


def test_keys_without_effect_warn_once_with_the_reason(
    tmp_path: Path, fresh_log: None, caplog: pytest.LogCaptureFixture
) -> None:
    node = section(tmp_path, "split: 1")
    for _ in range(3):
        assert build_dataclass(Settings, node, {"split": "name the sets instead"}) == Settings()
        assert build_dataclass(Settings, node, also_known=["split"]) == Settings()
    assert [record.getMessage() for record in caplog.records] == [
        f"args.split ({tmp_path}/a.yaml line 2) has no effect here: name the sets instead"
    ]


# --- targets ---------------------------------------------------------------------------------------------------------


class Inner:
    def __init__(self, size: int = 1) -> None:
        self.size = size


class Outer:
    def __init__(self, inner: Inner, width: int, plain_config: Any = None, *, depth: int = 1) -> None:
        self.inner, self.width, self.plain_config, self.depth = inner, width, plain_config, depth


class TakesAny:
    def __init__(self, **params: Any) -> None:
        self.params = params


HERE = __name__


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file as a user's module: pytest imports it under a name that is not on the path."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def test_every_target_of_the_table_is_a_class_of_ours() -> None:
    for released, path in TARGETS.items():
        assert inspect.isclass(resolve_target(released)), released
        assert path.startswith("sat."), path
    assert resolve_target("sat.ops.FusedEmaAdam") is resolve_target("sat.ops.adam.FusedEmaAdam")


def test_what_is_called_ineffective_is_not_a_parameter() -> None:
    for path, keys_and_reasons in INEFFECTIVE.items():
        taken = inspect.signature(resolve_target(path)).parameters
        assert not set(keys_and_reasons) & set(taken), path


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "dit_video_concat.DifusionTransformer",
            "released name that this project does not have; did you mean 'dit_v.*D",
        ),
        ("sgm.util.default", "target 'sgm.util.default' is a released name that this project does not have"),
        ("Transformer", "target 'Transformer' is not a dotted path"),
        ("no_such_package.Thing", "there is no module 'no_such_package' on the Python path"),
        ("sat.no_such.Thing", "there is no module 'sat.no_such' on the Python path"),
        ("sat.ops.adam.FusedEmaAdan", "module 'sat.ops.adam' has no 'FusedEmaAdan'; did you mean 'FusedEmaAdam'"),
    ],
)
def test_wrong_targets_are_named(tmp_path: Path, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_target(target)
    node = load_config([write(tmp_path, f"data:\n  target: {target}")])["data"]
    with pytest.raises(ConfigError, match=rf"data.target \(.*a.yaml line 2\): .*{message}"):
        instantiate_from_config(node)


def test_an_import_that_fails_inside_a_users_module_is_not_blamed_on_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "import no_such_dependency", "users_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve_target("users_module.Thing")


def test_parts_are_built_first_and_handed_over() -> None:
    params = {"inner_config": {"target": f"{HERE}.Inner", "params": {"size": 3}}, "plain_config": {"a": 1}}
    built = instantiate_from_config({"target": f"{HERE}.Outer", "params": params}, width=5, depth=2, unused=1)
    assert (built.inner.size, built.width, built.plain_config, built.depth) == (3, 5, {"a": 1}, 2)
    assert instantiate_from_config({"target": f"{HERE}.Inner"}).size == 1


def test_what_is_configured_wins_over_what_is_supplied() -> None:
    assert instantiate_from_config({"target": f"{HERE}.Inner", "params": {"size": 3}}, size=5).size == 3
    assert instantiate_from_config({"target": f"{HERE}.Inner", "params": None}, size=5).size == 5
    assert instantiate_from_config({"target": f"{HERE}.TakesAny", "params": {"a": 1}}, b=2).params == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{params: {size: 1}}", "data has no 'target'; it holds params"),
        (
            "{target: HERE.Inner, params: {sise: 1}}",
            r"unknown key data.params.sise \(.*line 1\); did you mean 'size'\?; ",
        ),
        ("{target: HERE.Inner, params: {sise: 1}}", r"HERE.Inner takes size$"),
        ("{target: HERE.Outer, params: {inmer_config: {}}}", r"did you mean 'inner_config'\?"),
        ("{target: HERE.Outer, params: {width: 1}}", "data.params: HERE.Outer also needs inner"),
        ("{target: HERE.Inner, parms: {size: 1}}", r"unknown key data.parms \(.*line 1\); did you mean 'params'\?"),
        (
            "{target: HERE.Outer, params: {width: 1, inner_config: {}}}",
            "data.params.inner_config has no 'target'; .*nothing",
        ),
    ],
)
def test_wrong_params_are_named(tmp_path: Path, data: str, message: str) -> None:
    node = load_config([write(tmp_path, f"data: {data.replace('HERE', HERE)}")])["data"]
    with pytest.raises(ConfigError, match=message.replace("HERE", HERE)):
        instantiate_from_config(node)


# --- whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*released_configs(), *OURS], ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_released_and_our_files_load_unmodified(file: Path, fresh_log: None) -> None:
    """Every section is read whole; what has no effect says why."""
    config = load_config([file])
    (sample_args if config["args"].get("mode") == "inference" else train_args)(config)
    deepspeed_config(config, train_args(load_config([])), dp_size=1, device_type="cuda")
    check_numbers(config)
    if "target" not in (config["model"].get("network_config") or {}):  # no model, or an overlay of one
        return
    with torch.device("meta"):
        build_engine(config["model"], with_encoders=False)
        if "first_stage_config" in config["model"]:
            first_stage = config["model"]["first_stage_config"]
            (first_stage.get("params") or {}).pop("ckpt_path", None)  # the file is not at hand
            instantiate_from_config(first_stage)


def test_a_released_run_says_what_has_no_effect(fresh_log: None, caplog: pytest.LogCaptureFixture) -> None:
    file = next(path for path in released_configs() if path.stem == "sft")
    for _ in range(2):
        config = load_config([file])
        deepspeed_config(config, train_args(config), dp_size=1, device_type="cuda")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == len(set(told)) and all(f"({file} line " in message for message in told)
    assert {message.split()[0] for message in told} == {
        "args.no_load_rng",
        "args.split",
        "args.only_log_video_latents",
        "deepspeed.loss_scale",
        "deepspeed.loss_scale_window",
        "deepspeed.hysteresis",
        "deepspeed.min_loss_scale",
        "deepspeed.activation_checkpointing",
        "deepspeed.zero_optimization.cpu_offload",
        "deepspeed.zero_optimization.load_from_fp32_weights",
    }


PRINT_CONFIG = """
import sys
from sat.training.cli import main

main(["--base", "configs/cogvideox_5b.yaml", "configs/sft.yaml", "--print-config"])
heavy = {"torch", "deepspeed", "transformers", "av"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_configuration_is_printed_without_its_parts(tmp_path: Path) -> None:
    """No DeepSpeed, T5 or VAE is looked for: nothing of this size is even imported."""
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_CONFIG], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for line in (
        "# clip: 49 frames of 480x720 pixels",
        "# 13 latent frames of 60x90, grid 13x30x45",
        "# 17,550 + 226 tokens",
        "# 48 heads of 64 channels",
    ):
        assert line in printed.splitlines()
    assert re.search(r"^    stage: 2 +# configs/sft.yaml line \d+$", printed, re.MULTILINE)
    read_back = load_config([write(tmp_path, printed)])
    assert read_back.plain() == load_config([ROOT / "configs/cogvideox_5b.yaml", ROOT / "configs/sft.yaml"]).plain()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.params.max_num_frames=9"], "3 latent frames of 60x90, grid 3x30x45"),
        (["data.params.video_size=[64, 96]"], "13 latent frames of 8x12, grid 13x4x6"),
        (
            ["data.params.size_mode=keep"],
            "clip: 49 frames of 480x720 pixels or, at each clip's own aspect ratio, of about ",
        ),
        (["model.network_config.params.patch_size=[2,2,2]"], "13 latent frames of 60x90, grid 7x30x45"),
    ],
)
def test_derived_numbers_follow_the_data(words: list[str], line: str) -> None:
    config = load_config([ROOT / "configs/cogvideox_5b.yaml", ROOT / "configs/sft.yaml"], words)
    assert any(derived.startswith(line) for derived in derived_lines(config))
