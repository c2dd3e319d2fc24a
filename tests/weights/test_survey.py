"""What files and trees are, and the first thing wrong with each of the damaged ones."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat.compat.comfy_names import comfy_from_diffusers
from sat.compat.diffusers_names import dit_to_diffusers, vae_to_diffusers
from sat.errors import CheckpointError
from sat.weights.survey import survey
from tests.golden_files import CARRIED, golden_root
from tests.weights.released import NETWORKS, PRESET_OF, write_released
from tests.weights.tiny import network, vae_state, write_text_encoder, write_transformer, write_tree, write_vae

ROOT = Path(__file__).parents[2]
MODEL = "transformer/1000/mp_rank_00_model_states.pt"
T5 = "t5-v1_1-xxl"


# --- what things are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_release_1", [False, True])
@pytest.mark.parametrize("form", PRESET_OF)
def test_a_released_transformer_is_named_with_its_yaml(tmp_path, form, is_release_1):
    if is_release_1 and form.startswith("1.5"):
        return
    write_released(tmp_path / "transformer", form, is_release_1)
    started = time.perf_counter()
    for path in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / "1000", tmp_path / MODEL):
        finding = survey(path)
        assert finding.what.startswith(PRESET_OF[form].name)
        assert ("in the layout of release 1.0" in finding.what) == is_release_1
        assert finding.config == f"configs/{PRESET_OF[form].config}" and (ROOT / finding.config).is_file()
        assert not finding.problems()
    assert time.perf_counter() - started < 2.0
    tables = 2 * 17550 * 64 if is_release_1 and form != "2B" else 0
    assert (
        f"{NETWORKS[form]['state_dict_elements'] + tables:,} numbers" in finding.facts[0]
        and "bfloat16" in finding.facts
    )


@pytest.mark.parametrize("form", PRESET_OF)
def test_small_models_are_named_by_their_form_in_both_layouts(tmp_path, form):
    state = write_transformer(tmp_path / "transformer", form)
    finding = survey(tmp_path / "transformer")
    assert finding.what == f"a transformer in the form of {PRESET_OF[form].name} of hidden_size 48, 2 layers"
    assert finding.config is None and finding.preset == PRESET_OF[form] and not finding.problems()
    theirs = dit_to_diffusers(state, PRESET_OF[form].patch_size, form == "5B-I2V")
    (tmp_path / "theirs").mkdir()
    save_file({name: value.contiguous() for name, value in theirs.items()}, tmp_path / "theirs" / "model.safetensors")
    config = {
        "_class_name": "CogVideoXTransformer3DModel",
        "use_rotary_positional_embeddings": form != "2B",
        "num_layers": 2,
    }
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    finding = survey(tmp_path / "theirs")
    assert finding.what == f"a transformer in the form of {PRESET_OF[form].name} under diffusers' names"
    assert finding.preset == PRESET_OF[form] and not finding.problems()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    assert survey(tmp_path / "theirs").problem == "it lacks 1 of 3 layers"


def test_carried_golden_weights_are_named():
    names = {
        "epsilon_probe/weights": "a transformer in the form of CogVideoX-5B of hidden_size 32, 2 layers",
        "epsilon_probe/weights_v1_0_layout": "CogVideoX-5B of hidden_size 32, 2 layers in the layout of release 1.0",
        "i2v_1_5_style/weights": "a transformer in the form of CogVideoX1.5-5B-I2V of hidden_size 64, 2 layers",
    }
    for name, what in names.items():
        finding = survey(CARRIED / "dit" / "forward" / f"{name}.safetensors")
        assert what in finding.what and not finding.problems()


GOLDEN = [file for file in sorted(golden_root().rglob("*")) if file.suffix == ".pt" or file.name.startswith("weights")]


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: str(file.relative_to(golden_root())))
def test_golden_weights_name_their_family(file):
    finding = survey(file)
    place = str(file.relative_to(golden_root()))
    if "_merged" in file.name or place.startswith("core"):
        assert finding.what == "SAT transformer without video mixins"
    elif place.startswith("vae"):
        assert finding.what == "CogVideoX VAE: ch 32, ch_mult [1, 1], num_res_blocks 1, z_channels 4"
    else:
        styles = {
            "2b": "CogVideoX-2B",
            "1_5": "CogVideoX1.5-5B",
            "i2v_5b": "CogVideoX-5B-I2V",
            "i2v_1_5": "CogVideoX1.5-5B-I2V",
        }
        name = next((name for style, name in reversed(styles.items()) if style in place), "CogVideoX-5B")
        assert f"in the form of {name} of" in finding.what
        assert ("with LoRA" in finding.what) == ("lora" in place)
    assert not finding.problems()


def test_a_golden_run_is_named_with_its_shards():
    if not (golden_root() / "dit" / "checkpoints").is_dir():
        pytest.skip("the full set of recorded numbers does not lie beside the project")
    finding = survey(golden_root() / "dit" / "checkpoints" / "model_parallel_2")
    assert "in the form of CogVideoX-5B" in finding.what and "2 tensor-parallel shards" in finding.parts[0].facts
    finding = survey(golden_root() / "dit" / "checkpoints" / "training_run")
    assert any("a training checkpoint: also" in fact for fact in finding.facts) and not finding.problems()


def test_a_vae_a_text_encoder_and_adapters_are_named(tmp_path):
    write_vae(tmp_path / "vae")
    assert survey(tmp_path / "vae").what == "CogVideoX VAE: ch 8, ch_mult [1, 1, 1, 1], num_res_blocks 1, z_channels 4"
    theirs = {name: value.contiguous() for name, value in vae_to_diffusers(vae_state(), 4).items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert survey(tmp_path / "theirs.safetensors").what == "diffusers CogVideoX VAE"
    write_text_encoder(tmp_path / T5, tmp_path / T5)
    finding = survey(tmp_path / T5)
    assert finding.what == "T5 text encoder" and "2 shards" in finding.facts and not finding.problems()
    lora = {"transformer.layers.0.attention.dense.matrix_A.0": torch.zeros(4, 8)}
    save_file(lora, tmp_path / "lora.safetensors")
    assert survey(tmp_path / "lora.safetensors").facts[-1] == "LoRA of rank 4 on 1 modules"
    lora["transformer.layers.0.attention.dense.matrix_B.0"] = torch.zeros(8, 4)
    save_file(lora, tmp_path / "lora.safetensors", metadata={"alpha": "2.5", "base_model": "CogVideoX-5B"})
    finding = survey(tmp_path / "lora.safetensors")
    assert finding.facts[-2:] == ["LoRA of rank 4 on 1 modules, alpha 2.5, base_model CogVideoX-5B", "for CogVideoX-5B"]
    assert finding.config == "configs/cogvideox_5b.yaml" and not finding.problems()
    peft = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(16, 8)}
    save_file(peft, tmp_path / "peft.safetensors")
    finding = survey(tmp_path / "peft.safetensors")
    assert (
        finding.what == "LoRA adapters under diffusers' names" and finding.facts[-1] == "LoRA of rank 16 on 1 modules"
    )


def test_the_released_vae_is_named(tmp_path):
    names = golden_root() / "vae" / "released_state_dict_keys.json"
    if not names.is_file():
        pytest.skip("the full set of recorded numbers does not lie beside the project")
    listed = json.loads(names.read_text())
    shapes = listed.get("keys", listed)
    number = torch.zeros(1)
    state = {name: number.expand(torch.Size(shape).numel()).view(shape) for name, shape in shapes.items()}
    torch.save({"state_dict": state}, tmp_path / "3d-vae.pt")
    finding = survey(tmp_path / "3d-vae.pt")
    assert finding.what == "CogVideoX VAE, the released one" and "215,583,907 numbers" in finding.facts[0]
    assert finding.config == "first_stage_config of every configs/cogvideox*.yaml"


def test_a_run_directory_and_averaged_weights_are_named(tmp_path):
    write_transformer(tmp_path, "5B", "20")
    shutil.copytree(tmp_path / "20", tmp_path / "20-ema")
    shutil.copytree(tmp_path / "20", tmp_path / "10")
    (tmp_path / "training_config.yaml").write_text("args: {}\n")
    finding = survey(tmp_path)
    assert finding.facts[:2] == ["iterations 10, 20, 20-ema", "latest 20"] and "a run directory" in finding.facts
    assert finding.config == str(tmp_path / "training_config.yaml") and not finding.problems()
    assert "averaged weights (EMA)" in survey(tmp_path / "20-ema").facts


def test_a_tree_with_two_transformers_names_both(tmp_path):
    for task, form in (("t2v", "1.5-5B"), ("i2v", "1.5-5B-I2V")):
        write_released(tmp_path / f"transformer_{task}", form)
    finding = survey(tmp_path)
    assert finding.what == "a released tree" and finding.facts == ["without vae, t5-v1_1-xxl"]
    assert [part.what for part in finding.parts] == ["CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V"]


def test_a_zip_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "transformer.zip", "w") as archive:
        archive.writestr(MODEL, b"1")
        archive.writestr("transformer/latest", b"1000")
    finding = survey(tmp_path / "transformer.zip")
    assert finding.what.startswith("an archive; tools/fetch_weights.py NAME --from")
    assert finding.facts == ["2 files, 5 bytes unpacked", f"weights: {MODEL}"]


def test_a_diffusers_pipeline_is_named(tmp_path):
    make_pipeline(tmp_path)
    finding = survey(tmp_path)
    assert finding.what == ("a transformer in the form of CogVideoX-5B under diffusers' names, in a diffusers pipeline")
    assert [part.path.name for part in finding.parts] == ["transformer", "vae", "text_encoder", "tokenizer"]
    assert not finding.problems()
    shutil.rmtree(tmp_path / "vae")
    assert survey(tmp_path).problem == "it lacks vae, which its model_index.json lists"


def make_pipeline(folder: Path, form: str = "5B") -> None:
    """A pipeline's folders with the weights of tiny models."""
    theirs = dit_to_diffusers(network(form).state_dict(), PRESET_OF[form].patch_size, form == "5B-I2V")
    components = ("transformer", "vae", "scheduler")
    for name in components:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    save_file({k: v.contiguous() for k, v in theirs.items()}, folder / "transformer" / "m.safetensors")
    save_file(
        {k: v.contiguous() for k, v in vae_to_diffusers(vae_state(), 4).items()}, folder / "vae" / "m.safetensors"
    )
    write_text_encoder(folder / "text_encoder", folder / "tokenizer")
    index = {"_class_name": "CogVideoXPipeline", **{name: ["diffusers", "X"] for name in components}}
    index |= {name: ["transformers", "X"] for name in ("text_encoder", "tokenizer")}
    (folder / "model_index.json").write_text(json.dumps(index))


# --- what is wrong with them -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tree(tmp_path_factory.mktemp("whole") / "tree")
    assert not survey(folder).problems()
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop_layer_weight(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    del content["module"]["model.diffusion_model.transformer.layers.1.mlp.dense_h_to_4h.weight"]
    torch.save(content, file)


def drop_time_embedding(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    del content["module"]["model.diffusion_model.time_embed.2.weight"]
    torch.save(content, file)


def page(file: Path) -> None:
    file.write_text("<html>expired</html>")


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def evil(file: Path) -> None:
    torch.save({"module": torch.load(file, weights_only=True)["module"], "run": Run()}, file)


class Run:
    """Asks to run a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("true",)


def drop_key(file: Path) -> None:
    save_file(dict(list(load_file(file).items())[1:]), file)


DAMAGE = [
    (MODEL, cut, r"is half a file: its end is missing"),
    (MODEL, page, r"is a web page"),
    (MODEL, pointer, r"is a Git LFS pointer"),
    (MODEL, evil, r"it asks to load (posix|nt)\.system, neither a tensor nor known"),
    (MODEL, drop_layer_weight, r"it lacks model\.diffusion_model\.transformer\.layers\.1\.mlp\.dense_h_to_4h\.weight"),
    (MODEL, drop_time_embedding, r"it lacks time_embed\.2\.weight"),
    ("transformer/latest", Path.unlink, r"it has no file 'latest'; write one that holds 1000"),
    (
        "transformer/latest",
        lambda file: file.write_text("2000"),
        r"'latest' names 2000, .* no weights; write 1000 into it",
    ),
    (
        "transformer/latest",
        lambda file: file.write_text("1000-ema"),
        r"'latest' holds '1000-ema'; it must hold the number",
    ),
    (MODEL, Path.unlink, r"'latest' names 1000, but .* has no weights"),
    (MODEL, lambda file: file.rename(file.with_name("mp_rank_01_model_states.pt")), r"'latest' names 1000"),
    (
        MODEL,
        lambda file: shutil.copy(file, file.with_name("mp_rank_02_model_states.pt")),
        r"tensor-parallel rank 1 is missing",
    ),
    ("vae/3d-vae.pt", cut, r"3d-vae\.pt is half a file"),
    (f"{T5}/spiece.model", Path.unlink, r"the tokenizer is missing: there is no spiece\.model"),
    (f"{T5}/spiece.model", pointer, r"spiece\.model is a Git LFS pointer"),
    (f"{T5}/tokenizer_config.json", Path.unlink, r"there is no tokenizer_config\.json"),
    (f"{T5}/config.json", Path.unlink, r"config\.json is missing"),
    (
        f"{T5}/model-00002-of-00002.safetensors",
        Path.unlink,
        r"the shard model-00002-of-00002\.safetensors is missing, one of",
    ),
    (f"{T5}/model-00002-of-00002.safetensors", cut, r"model-00002-of-00002\.safetensors is half a file: it has"),
    (f"{T5}/model-00001-of-00002.safetensors", drop_key, r"00001-of-00002\.safetensors lacks "),
    (f"{T5}/model.safetensors.index.json", Path.unlink, r"the index of its 2 shards is missing"),
    (f"{T5}/model.safetensors.index.json", page, r"index\.json lists no files"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_the_first_thing_wrong_is_told(tree, tmp_path, name, damage, message):
    shutil.copytree(tree, tmp_path / "tree")
    damage(tmp_path / "tree" / name)
    problems = [problem for _, problem in survey(tmp_path / "tree").problems()]
    assert problems and re.search(message, problems[0]), problems


def test_a_checkpoint_that_is_not_as_its_manifest_says_is_told(tmp_path):
    write_transformer(tmp_path, "5B", "20")
    size = (tmp_path / "20" / "mp_rank_00_model_states.pt").stat().st_size
    files = {"mp_rank_00_model_states.pt": {"bytes": size}, "optimizer_rank_00000.safetensors": {"bytes": 3}}
    (tmp_path / "20" / "manifest.json").write_text(json.dumps({"files": files}))
    assert survey(tmp_path).problem == "optimizer_rank_00000.safetensors is missing, which its manifest.json lists"
    (tmp_path / "20" / "optimizer_rank_00000.safetensors").write_bytes(b"12")
    assert survey(tmp_path).problem == "optimizer_rank_00000.safetensors has 2 bytes; its manifest.json says 3"


def comfy_file(folder: Path, form: str, without: str = " ") -> Path:
    theirs = dit_to_diffusers(network(form).state_dict(), PRESET_OF[form].patch_size, form == "5B-I2V")
    state = {name: value.contiguous() for name, value in comfy_from_diffusers(theirs).items() if without not in name}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / f"{form}.safetensors")
    return folder / f"{form}.safetensors"


def test_a_folder_for_comfyui_is_named_by_its_transformer(tmp_path):
    comfy_file(tmp_path / "diffusion_models", "1.5-5B")
    theirs = {name: value.contiguous() for name, value in vae_to_diffusers(vae_state(), 4).items()}
    (tmp_path / "vae").mkdir()
    save_file(theirs, tmp_path / "vae" / "v.safetensors")
    finding = survey(tmp_path)
    form = "a transformer in the form of CogVideoX1.5-5B under ComfyUI's names"
    assert finding.what == f"{form}, in a folder for ComfyUI" and not finding.problems()
    assert [part.what for part in finding.parts] == [form, "diffusers CogVideoX VAE"]


@pytest.mark.parametrize("without", ["blocks.1.q.", "proj_out.", "patch_embed.text_proj."])
def test_a_transformer_for_comfyui_that_lacks_weights_is_told(tmp_path, without):
    problem = survey(comfy_file(tmp_path, "1.5-5B", without)).problem
    assert problem is not None and problem.startswith("it lacks ") and "under diffusers' names" in problem


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_diffusers_vae_is_told(tmp_path, half):
    theirs = {k: v.contiguous() for k, v in vae_to_diffusers(vae_state(), 4).items() if not k.startswith(half)}
    save_file(theirs, tmp_path / "v.safetensors")
    assert survey(tmp_path / "v.safetensors").problem.startswith(
        f"it lacks {half}.conv_in.conv.weight, {half}.conv_out"
    )


DENSE = "transformer.layers.0.attention.dense"
TO_Q = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("names", "metadata", "message"),
    [
        ((f"{DENSE}.matrix_A.0",), {"alpha": "1"}, rf"it lacks {DENSE}\.matrix_B\.0: an adapter has two matrices"),
        ((f"{DENSE}.matrix_A.0", f"{DENSE}.matrix_B.0"), {}, r"does not say its alpha.*--lora-alpha X writes it in"),
        ((f"{DENSE}.matrix_A.0", f"{DENSE}.matrix_B.0"), {"alpha": "1"}, None),
        ((f"{TO_Q}.lora_B.weight",), {}, rf"it lacks {TO_Q}\.lora_A\.weight"),
        ((f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"), {}, None),
        (("lora_unet_blocks_0_q.lora_down.weight", "lora_unet_blocks_0_q.lora_up.weight"), {}, None),
    ],
)
def test_adapters_that_cannot_be_used_are_told_and_what_they_are_for(tmp_path, names, metadata, message):
    """For CogVideoX-2B by their width, where the file does not say it."""
    down = [re.search("_A|down", name) for name in names]
    state = {name: torch.zeros(4, 1920) if is_down else torch.zeros(1920, 4) for name, is_down in zip(names, down)}
    save_file(state, tmp_path / "lora.safetensors", metadata)
    finding = survey(tmp_path / "lora.safetensors")
    assert finding.problem is None if message is None else re.search(message, finding.problem)
    if len(names) == 2:
        assert finding.config == "configs/cogvideox_2b.yaml" and finding.facts[-1] == "for CogVideoX-2B"


def test_adapters_of_the_5b_models_may_be_for_each_of_them(tmp_path):
    halves = {f"{DENSE}.matrix_A.0": torch.zeros(4, 3072), f"{DENSE}.matrix_B.0": torch.zeros(3072, 4)}
    save_file(halves, tmp_path / "lora.safetensors", {"alpha": "1"})
    finding = survey(tmp_path / "lora.safetensors")
    assert "CogVideoX-5B or CogVideoX-5B-I2V or CogVideoX1.5-5B" in finding.facts[-1] and finding.preset is None


def test_folders_without_weights_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        survey(tmp_path / "nowhere")
    assert survey(tmp_path).problem == "there is nothing in it"
    (tmp_path / "notes.txt").write_text("hello")
    assert survey(tmp_path).problem == "it holds notes.txt"
    assert "is no file of weights" in str(survey(tmp_path / "notes.txt").problem)


# --- the tool --------------------------------------------------------------------------------------------------------


def run_tool(*words: str) -> subprocess.CompletedProcess[str]:
    tool = str(ROOT / "tools" / "inspect.py")
    return subprocess.run([sys.executable, tool, *words], capture_output=True, text=True, cwd=ROOT.parent)


def test_the_tool_prints_and_its_exit_code_tells(tmp_path):
    write_tree(tmp_path / "tree")
    done = run_tool(str(tmp_path / "tree"))
    assert done.returncode == 0 and "in the form of CogVideoX-5B" in done.stdout
    assert "nothing wrong found (the numbers themselves were not read)" in done.stdout
    cut(tmp_path / "tree" / "vae" / "3d-vae.pt")
    done = run_tool(str(tmp_path / "tree"))
    assert done.returncode == 1 and "the first thing wrong: " in done.stdout and "half a file" in done.stdout
    done = run_tool(str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "error: there is no file or folder" in done.stderr


def test_the_tool_needs_no_torch():
    code = "import sys; import sat.weights.survey; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_other_tools_still_get_the_standard_librarys_module():
    code = (
        "import sys; sys.path.insert(0, 'tools'); import dataclasses, inspect; "
        "assert inspect.signature(print) and dataclasses.inspect is inspect and sys.path[0] == 'tools', inspect"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
