"""Whole fetches, from disk and from a hostile server: a clear error and nothing in the target, or the whole tree."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from sat.cogvideox.presets import Preset
from sat.compat.diffusers_names import dit_to_diffusers, vae_to_diffusers
from sat.conditioning.text import FrozenT5Embedder
from sat.errors import ConfigError, DownloadError, SatError
from sat.training.checkpoint import load_weights
from sat.weights import fetch as module
from sat.weights.download import Expected, Patience
from sat.weights.fetch import PARTS, fetch
from sat.weights.places import open_places
from sat.weights.sources import SOURCES, Source, read_sources, released_model
from tests.cogvideox.tiny import FORMS as TINY_FORMS
from tests.cogvideox.tiny import HEAD_DIM, HEADS, TEXT_LENGTH, TEXT_WIDTH
from tests.weights.server import HostileServer, Request, drops, fails, promises, web_page
from tests.weights.tiny import FORMS, contents, network, vae_state, write_text_encoder, write_transformer, write_tree
from tools import make_tiny_t5

ROOT = Path(__file__).parents[2]
HASTY = Patience(attempts=3, pause=0.001, timeout=5.0)
FIVE_B = released_model("cogvideox-5b")
MODEL = "transformer/1000/mp_rank_00_model_states.pt"
T5 = "t5-v1_1-xxl"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("released") / "tree")


def get(target: Path, *places: str | Path, preset: Preset = FIVE_B, parts: tuple[str, ...] = PARTS) -> None:
    fetch(preset, [Source(str(place)) for place in places], target, parts, HASTY)


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if "fetching" in path.name]


# --- from disk -------------------------------------------------------------------------------------------------------


def test_a_folder_is_copied_and_a_second_call_does_nothing(tree, tmp_path):
    get(tmp_path / "to", tree)
    assert contents(tmp_path / "to") == contents(tree) and not leftovers(tmp_path / "to")
    shutil.copytree(tree, tmp_path / "from")
    get(tmp_path / "to", tmp_path / "nowhere")  # asks no place for anything
    (tmp_path / "to" / "vae" / "3d-vae.pt").unlink()
    (tmp_path / "to" / "vae").rmdir()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*.pt")}
    get(tmp_path / "to", tmp_path / "from")
    assert contents(tmp_path / "to") == contents(tree)
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())


def zip_folder(file: Path, folder: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{inside}{path.relative_to(folder.parent)}")
    return file


def test_archives_and_single_files_come_together(tree, tmp_path):
    zip_folder(tmp_path / "transformer.zip", tree / "transformer", "some/")
    with tarfile.open(tmp_path / "t5.tar.gz", "w:gz") as tar:
        tar.add(tree / T5, "t5-v1_1-xxl")
    get(tmp_path / "to", tmp_path / "transformer.zip", tree / "vae" / "3d-vae.pt", tmp_path / "t5.tar.gz")
    assert contents(tmp_path / "to") == contents(tree)
    assert not (tmp_path / "to" / "vae" / "3d-vae.pt").samefile(tree / "vae" / "3d-vae.pt")


def test_a_bare_file_of_weights_is_laid_out(tree, tmp_path):
    for source in (tree / MODEL, (tree / MODEL).parent):
        get(tmp_path / "to", source, parts=("transformer",))
        assert contents(tmp_path / "to") == {
            "transformer/latest": b"1\n",
            "transformer/1/mp_rank_00_model_states.pt": (tree / MODEL).read_bytes(),
        }
        shutil.rmtree(tmp_path / "to")


def test_a_lost_latest_is_written_anew(tree, tmp_path):
    shutil.copytree(tree / "transformer", tmp_path / "transformer")
    (tmp_path / "transformer" / "latest").unlink()
    get(tmp_path / "to", tmp_path, parts=("transformer",))
    assert (tmp_path / "to" / "transformer" / "latest").read_text() == "1000\n"


def test_all_tensor_parallel_ranks_are_brought(tree, tmp_path):
    shutil.copytree(tree / "transformer", tmp_path / "transformer")
    shard = tmp_path / MODEL
    shutil.copy(shard, shard.with_name("mp_rank_01_model_states.pt"))
    get(tmp_path / "to", tmp_path, parts=("transformer",))
    assert contents(tmp_path / "to" / "transformer") == contents(tmp_path / "transformer")


def test_the_text_encoder_is_put_together_from_two_folders(tree, tmp_path):
    write_text_encoder(tmp_path / "hub" / "text_encoder", tmp_path / "hub" / "tokenizer")
    get(tmp_path / "to", tmp_path / "hub", parts=(T5,))
    assert contents(tmp_path / "to" / T5) == contents(tree / T5)
    shutil.rmtree(tmp_path / "hub" / "tokenizer")
    with pytest.raises(DownloadError, match=r"there is no tokenizer: spiece\.model, tokenizer_config\.json"):
        get(tmp_path / "other", tmp_path / "hub", parts=(T5,))


def test_a_text_encoder_that_was_put_together_encodes_as_before(tmp_path):
    make_tiny_t5.make(["a red square moves right", "a blue circle moves up"], tmp_path / "whole", 64, seed=0)
    for file in (tmp_path / "whole").iterdir():
        half = "text_encoder" if file.name.startswith(("config", "model")) else "tokenizer"
        (tmp_path / "hub" / half).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "hub" / half)
    get(tmp_path / "to", tmp_path / "hub", parts=(T5,))
    states = [
        FrozenT5Embedder(str(folder), 16)(["a red circle"]) for folder in (tmp_path / "whole", tmp_path / "to" / T5)
    ]
    assert torch.equal(*states)


# --- from diffusers' weights -----------------------------------------------------------------------------------------


def save_diffusers(folder: Path, form: str) -> None:
    """The pipeline's folders for a tiny form, written by diffusers itself, the transformer in shards."""
    options = TINY_FORMS[form]
    image = 16 if "I2V" in form else 0
    theirs = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=16 + image,
        out_channels=16,
        time_embed_dim=20,
        ofs_embed_dim=options.get("ofs_embed_dim"),
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=6,
        sample_frames=13,
        patch_size_t=None if options["patch_size"][0] == 1 else 2,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=options["positions"] != "sincos",
        use_learned_positional_embeddings="learned" in options["positions"],
    )
    state = dit_to_diffusers(network(form).state_dict(), options["patch_size"], "learned" in options["positions"])
    theirs.load_state_dict(state, strict=True)
    theirs.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )
    vae.load_state_dict(vae_to_diffusers(vae_state(), 4), strict=True)
    vae.save_pretrained(folder / "vae")
    write_text_encoder(folder / "text_encoder", folder / "tokenizer")


@pytest.mark.parametrize("name", FORMS)
def test_a_tree_is_made_of_diffusers_weights_bit_for_bit(tree, tmp_path, name):
    form = FORMS[name]
    save_diffusers(tmp_path / "hub", form)
    get(tmp_path / "to", tmp_path / "hub", preset=released_model(name))
    made = {
        k.removeprefix("model.diffusion_model."): v for k, v in load_weights(tmp_path / "to" / "transformer").items()
    }
    expected = network(form).state_dict()
    assert set(made) == set(expected)
    for key, value in expected.items():
        if key == "transformer.position_embeddings.weight":
            assert made[key].shape == value.shape  # a table that nothing reads, and that diffusers does not have
        else:
            assert torch.equal(made[key], value), key
    vae = torch.load(tmp_path / "to" / "vae" / "3d-vae.pt", weights_only=True)["state_dict"]
    assert set(vae) == set(vae_state()) and all(torch.equal(vae[key], value) for key, value in vae_state().items())
    assert contents(tmp_path / "to" / T5) == contents(tree / T5)


def test_a_wrong_model_is_refused_by_name(tmp_path):
    save_diffusers(tmp_path / "hub", "5B-I2V")
    with pytest.raises(
        DownloadError, match=r"in the form of CogVideoX-5B-I2V .*, not CogVideoX-5B; fetch it as cogvideox-5b-i2v"
    ):
        get(tmp_path / "to", tmp_path / "hub")
    assert not (tmp_path / "to").exists()
    get(tmp_path / "to", tmp_path / "hub", preset=released_model("cogvideox-5b-i2v"))
    with pytest.raises(
        DownloadError, match=r"to/transformer is there, but it holds .*5B-I2V.*, not CogVideoX-5B; move it away"
    ):
        get(tmp_path / "to", tmp_path / "hub")


# --- from the hostile server -----------------------------------------------------------------------------------------


def serve(server: HostileServer, folder: Path, at: str = "hub/") -> str:
    """Put a folder's files on the server; returns its address."""
    server.files |= {f"{at}{name}": data for name, data in contents(folder).items()}
    return server.url(at)


def test_a_web_folder_is_fetched_and_a_second_call_asks_for_nothing(server, tree, tmp_path):
    address = serve(server, tree)
    get(tmp_path / "to", address)
    assert contents(tmp_path / "to") == contents(tree) and not leftovers(tmp_path / "to")
    server.requests.clear()
    get(tmp_path / "to", address)
    assert server.requests == []


def test_a_hub_with_both_1_5_models_gives_the_one_that_is_asked_for(server, tmp_path):
    for task, form in (("t2v", "1.5-5B"), ("i2v", "1.5-5B-I2V")):
        write_transformer(tmp_path / "hub" / f"transformer_{task}", form)
    address = serve(server, tmp_path / "hub")
    for name, task in (("cogvideox1.5-5b", "t2v"), ("cogvideox1.5-5b-i2v", "i2v")):
        get(tmp_path / name, address, preset=released_model(name), parts=("transformer",))
        expected = contents(tmp_path / "hub" / f"transformer_{task}")
        assert contents(tmp_path / name / "transformer") == expected


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox1.5-5b-i2v"])
def test_diffusers_weights_on_a_server_make_a_tree(server, tmp_path, name):
    save_diffusers(tmp_path / "hub", FORMS[name])
    address = serve(server, tmp_path / "hub")
    shard = next(path for path in server.files if "-00002-of" in path and "transformer" in path)
    server.answers[shard] = [drops(1000), fails(503)]
    get(tmp_path / "to", address, preset=released_model(name))
    get(tmp_path / "disk", tmp_path / "hub", preset=released_model(name))
    assert contents(tmp_path / "to") == contents(tmp_path / "disk")


def test_the_first_place_that_has_a_part_gives_it(server, tree, tmp_path):
    here = serve(server, tree / "vae", "vae-only/vae/")
    there = serve(server, tree)
    server.always("pages/latest", web_page)
    get(tmp_path / "to", "http://127.0.0.1:9/dead/", server.url("pages/"), here.removesuffix("vae/"), there)
    assert contents(tmp_path / "to") == contents(tree)
    assert "hub/vae/3d-vae.pt" not in [path for path, _ in server.requests]


def test_what_no_place_has_is_told_with_all_reasons(server, tree, tmp_path):
    shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns(T5))
    address = serve(server, tmp_path / "tree")
    with pytest.raises(DownloadError) as error:
        get(tmp_path / "to", address, tmp_path / "tree")
    message = str(error.value)
    assert message.startswith(f"no place has the {T5} of CogVideoX-5B:\n")
    assert f"{address}text_encoder/config.json is not there (HTTP 404 Not Found)" in message
    assert f"{tmp_path / 'tree'} has none, two folders deep" in message
    assert message.endswith("or leave this part out with --parts transformer vae")
    assert not (tmp_path / "to").exists()
    server.requests.clear()
    get(tmp_path / "to", address, tree)  # a second call with a place for what was missing fetches nothing twice
    assert contents(tmp_path / "to") == contents(tree)
    assert not [path for path, _ in server.requests if path.endswith(".pt")]


FAULTS = [
    (MODEL, drops(1000), r"ended after 1,000 of .* bytes"),
    (MODEL, promises(1000), r"did not give what it should: .*mp_rank_00_model_states\.pt\.part is half a file"),
    (MODEL, web_page, r"gives a web page, .*\('Link expired'\), not mp_rank_00_model_states\.pt"),
    (MODEL, fails(503), r"HTTP 503"),
    ("vae/3d-vae.pt", drops(1000), r"ended after 1,000"),
    ("vae/3d-vae.pt", promises(100_000), r"3d-vae\.pt\.part is half a file"),
    (f"{T5}/model-00002-of-00002.safetensors", promises(50), r"is half a file"),
    (f"{T5}/model-00002-of-00002.safetensors", drops(50), r"ended after 50"),
    (f"{T5}/model.safetensors.index.json", web_page, r"gives a web page"),
    (f"{T5}/model.safetensors.index.json", promises(20), r"has a damaged model\.safetensors\.index\.json"),
    (f"{T5}/spiece.model", fails(500), r"does not answer"),
]


@pytest.mark.parametrize(("path", "fault", "message"), FAULTS)
def test_each_fault_ends_in_a_clear_error_and_a_second_call_completes(server, tree, tmp_path, path, fault, message):
    address = serve(server, tree)
    server.knows_ranges = "drops" not in fault.__qualname__  # else a second answer heals the first
    server.always(f"hub/{path}", fault)
    with pytest.raises(SatError, match=message):
        get(tmp_path / "to", address)
    assert not (tmp_path / "to").exists()
    server.answers.clear()
    server.requests.clear()
    get(tmp_path / "to", address)
    assert contents(tmp_path / "to") == contents(tree) and not leftovers(tmp_path / "to")
    asked = [path for path, _ in server.requests]
    assert len(asked) == len(set(asked))
    if not path.startswith("transformer"):  # the part that was whole already
        assert not [name for name in asked if "transformer" in name]


ARCHIVE_FAULTS = [
    (drops(1000), r"ended after 1,000"),
    (promises(1000), r"is half an archive: its end is missing"),
    (web_page, r"gives a web page, .*\('Link expired'\), not transformer\.zip"),
]


@pytest.mark.parametrize(("fault", "message"), ARCHIVE_FAULTS)
def test_archives_on_a_server_stand_the_same_faults(server, tree, tmp_path, fault, message):
    server.files["f/transformer.zip"] = zip_folder(tmp_path / "t.zip", tree / "transformer").read_bytes()
    server.knows_ranges = False
    server.always("f/transformer.zip", fault)
    with pytest.raises(SatError, match=message):
        get(tmp_path / "to", server.url("f/transformer.zip"), parts=("transformer",))
    assert not (tmp_path / "to").exists()
    server.answers.clear()
    get(tmp_path / "to", server.url("f/transformer.zip"), parts=("transformer",))
    assert contents(tmp_path / "to" / "transformer") == contents(tree / "transformer")


def test_a_cloud_drives_link_without_a_name_is_told_by_its_content(server, tree, tmp_path):
    server.files["f/556a3e/?dl=1"] = zip_folder(tmp_path / "t.zip", tree / "transformer").read_bytes()
    get(tmp_path / "to", server.url("f/556a3e/?dl=1"), parts=("transformer",))
    assert contents(tmp_path / "to" / "transformer") == contents(tree / "transformer")


def test_a_bomb_on_a_server_is_refused_and_fetched_anew(server, tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("transformer/latest", bytes(10_000_000))
    server.files["t.zip"] = (tmp_path / "bomb.zip").read_bytes()
    with pytest.raises(DownloadError, match="no archive of weights does, it is not unpacked"):
        get(tmp_path / "to", server.url("t.zip"), parts=("transformer",))
    assert not (tmp_path / "to").exists()
    server.files["t.zip"] = zip_folder(tmp_path / "t.zip", tree / "transformer").read_bytes()
    get(tmp_path / "to", server.url("t.zip"), parts=("transformer",))
    assert contents(tmp_path / "to" / "transformer") == contents(tree / "transformer")


def test_a_latest_from_a_server_leads_nowhere_else(server, tree, tmp_path):
    address = serve(server, tree)
    server.files["hub/transformer/latest"] = b"../../evil"
    with pytest.raises(DownloadError, match=r"'latest' holds '\.\./\.\./evil', not the number of a folder"):
        get(tmp_path / "to", address, parts=("transformer",))
    server.files[f"hub/{T5}/model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "../../evil"}}).encode()
    with pytest.raises(DownloadError, match=r"names the file '\.\./\.\./evil'; it is not fetched"):
        get(tmp_path / "to", address, parts=(T5,))
    assert not [path for path, _ in server.requests if "evil" in path]


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        ("https://huggingface.co/zai-org/CogVideoX-2b", "https://huggingface.co/zai-org/CogVideoX-2b/resolve/main/"),
        ("https://huggingface.co/a/b/tree/v2", "https://huggingface.co/a/b/resolve/v2/"),
        ("https://modelscope.cn/models/a/b/files", "https://modelscope.cn/models/a/b/resolve/master/"),
        ("https://mirror/5b", "https://mirror/5b/"),
        ("https://huggingface.co/a/b/resolve/main/sub/", "https://huggingface.co/a/b/resolve/main/sub/"),
    ],
)
def test_a_hubs_page_is_turned_into_its_folder_of_files(tmp_path, page, folder):
    (place,) = open_places(Source(page), tmp_path, HASTY)
    assert place.address == folder


def test_known_checksums_of_a_place_are_held(server, tree, tmp_path):
    address = serve(server, tree)
    wrong = {MODEL: Expected(sha256="0" * 64)}
    with pytest.raises(DownloadError, match="instead of 0000"):
        fetch(FIVE_B, [Source(address, wrong)], tmp_path / "to", PARTS, HASTY)
    right = {MODEL: Expected((tree / MODEL).stat().st_size, hashlib.sha256((tree / MODEL).read_bytes()).hexdigest())}
    fetch(FIVE_B, [Source(address, right)], tmp_path / "to", PARTS, HASTY)
    assert contents(tmp_path / "to") == contents(tree)


# --- the target ------------------------------------------------------------------------------------------------------


def test_a_damaged_part_in_the_target_is_left_and_told(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "to")
    (tmp_path / "to" / "vae" / "3d-vae.pt").write_bytes(b"<html>")
    with pytest.raises(DownloadError, match=r"to/vae is there, but .* is a web page, .*; move it away and run"):
        get(tmp_path / "to", tree)
    assert (tmp_path / "to" / "vae" / "3d-vae.pt").read_bytes() == b"<html>"


def test_two_processes_do_not_fetch_to_one_target(tree, tmp_path):
    staging = tmp_path / ".to.CogVideoX-5B.fetching"
    staging.mkdir()
    with (staging / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is fetching CogVideoX-5B to"):
            get(tmp_path / "to", tree)
    get(tmp_path / "to", tree)


def test_a_target_that_cannot_be_made_is_told(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write to .*: Not a directory"):
        get(tmp_path / "file" / "to", tree)


def test_a_target_that_is_a_disk_of_its_own_is_staged_inside(tree, tmp_path, monkeypatch):
    (tmp_path / "to").mkdir()
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    with pytest.raises(DownloadError):
        get(tmp_path / "to", tmp_path / "nowhere")
    assert [path.name for path in (tmp_path / "to").iterdir()] == [".CogVideoX-5B.fetching"]
    get(tmp_path / "to", tree)
    assert contents(tmp_path / "to") == contents(tree) and not leftovers(tmp_path / "to")


# --- the table and the tool ------------------------------------------------------------------------------------------


def test_the_table_knows_all_released_models():
    assert set(SOURCES) == set(FORMS)
    for name in SOURCES:
        assert released_model(name).name.lower() == name
    with pytest.raises(ConfigError, match=r"no released model 'cogvideox-5'; did you mean 'cogvideox-5b'\?; released"):
        released_model("cogvideox-5")


def test_a_users_table_takes_the_place_of_entries(tmp_path):
    file = tmp_path / "sources.yaml"
    file.write_text(
        "cogvideox-5b:\n- /mnt/models/5b\n- {address: 'https://mirror/5b/', files: {a/b.pt: {size: 3, sha256: ab}}}\n"
    )
    table = read_sources(file)
    assert table["cogvideox-5b"] == [
        Source("/mnt/models/5b"),
        Source("https://mirror/5b/", {"a/b.pt": Expected(3, "ab")}),
    ]
    assert table["cogvideox-2b"] == SOURCES["cogvideox-2b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cogvideox-5: [a]", r"cogvideox-5 \(.*line 1\) is no released model; did you mean"),
        ("cogvideox-5b: a", "must be a list of places"),
        ("cogvideox-5b: []", "must be a list of places"),
        ("cogvideox-5b: [{adress: a}]", "a place is an address, or a mapping of 'address' and 'files'"),
        ("cogvideox-5b: [{address: a, files: {b: 3}}]", "b takes a size .* and a sha256"),
        ("cogvideox-5b: [{address: a, files: {b: {size: x}}}]", "b takes a size .* and a sha256"),
    ],
)
def test_a_wrong_table_is_told(tmp_path, text, message):
    (tmp_path / "sources.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sources(tmp_path / "sources.yaml")


def run_tool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "fetch_weights.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)


def test_the_tool_fetches_and_says_what_it_fetched(tree, tmp_path):
    done = run_tool("cogvideox-5b", "--to", tmp_path / "to", "--from", tree / "transformer", "--parts", "transformer")
    assert done.returncode == 0 and "in the form of CogVideoX-5B" in done.stdout, done.stderr
    done = run_tool("cogvideox-5b", "--to", tmp_path / "other", "--from", tmp_path / "nowhere")
    assert done.returncode == 2 and "error: there is no file or folder" in done.stderr
    assert "https://huggingface.co/zai-org/CogVideoX-2b/resolve/main/" in run_tool("--list").stdout
    assert run_tool("cogvideox-5b").returncode == 2


def test_a_fetch_that_is_killed_leaves_nothing_in_the_target_and_goes_on(server, tree, tmp_path):
    address = serve(server, tree)
    got_there = threading.Event()

    def stalls(request: Request) -> None:
        request.send(200, request.data[:1000], Content_Length=len(request.data), ETag=request.tag)
        got_there.set()
        request.handler.connection.recv(1)  # until the client is gone

    server.answers[f"hub/{MODEL}"] = [stalls]
    command = [
        sys.executable,
        ROOT / "tools" / "fetch_weights.py",
        "cogvideox-5b",
        "--to",
        tmp_path / "to",
        "--from",
        address,
    ]
    process = subprocess.Popen(command, env={**os.environ, "no_proxy": "*"}, stderr=subprocess.DEVNULL)
    part = tmp_path / ".to.CogVideoX-5B.fetching"
    assert got_there.wait(30)
    while not any(file.stat().st_size == 1000 for file in part.rglob("*.part")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "to").exists()
    get(tmp_path / "to", address)
    assert contents(tmp_path / "to") == contents(tree)
    assert (f"hub/{MODEL}", "bytes=1000-") in server.requests
