"""Image to video from prompts that name an image: what is continued, at which size, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.cogvideox.engine import NETWORK_PREFIX, build_engine
from sat.cogvideox.output import to_frames
from sat.config import ConfigNode, dump_config, load_config
from sat.data.frames import size_of_short_side
from sat.data.synthetic import SyntheticImages
from sat.data.video import probe, read_metadata, write_png
from sat.errors import ConfigError, DataError
from sat.sampling import run as sampling_run
from sat.sampling.cli import main
from sat.sampling.inputs import read_image
from sat.sampling.prompts import Prompt, parse_prompt
from sat.sampling.run import sample
from sat.vae import save_vae_state
from tests.image_to_video import IMAGE_TO_VIDEO
from tests.tiny import VAE, tiny_config


class Model:
    """A run directory of an image-to-video model with random weights, and images for it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        torch.manual_seed(0)
        config = tiny_config(*IMAGE_TO_VIDEO, "model.latent_input=false", *overrides)
        config["model"]["first_stage_config"] = {
            **VAE,
            "params": {**VAE["params"], "ckpt_path": str(folder / "vae.pt")},
        }
        section = {**config["model"], "first_stage_config": VAE}
        engine = build_engine(section)
        save_vae_state(engine.first_stage_model.state_dict(), folder / "vae.pt")
        module = {
            f"{NETWORK_PREFIX}{name}": v + 0.1 * torch.randn_like(v) for name, v in engine.network.state_dict().items()
        }
        (folder / "1").mkdir()
        torch.save({"module": module}, folder / "1" / "mp_rank_00_model_states.pt")
        (folder / "latest").write_text("1")
        (folder / "training_config.yaml").write_text(dump_config(config))
        for index, (height, width) in enumerate([(32, 32), (64, 32), (96, 160)]):
            write_png(folder / f"{index}.png", to_frames(SyntheticImages(9, height, width)[index]["pixels"])[0])

    def config(self, *overrides: str) -> ConfigNode:
        words = ("args.output_dir=" + str(self.folder / "out"), f"args.load={self.folder}", *overrides)
        return load_config([self.folder / "training_config.yaml"], words)

    def latents(self, prompts: list[str], *overrides: str) -> list[Tensor]:
        paths = sample(self.config("args.only_save_latents=true", *overrides), 3, prompts)
        return [load_file(path)["latents"] for path in paths]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("i2v"))


def test_each_prompt_continues_its_image(model: Model) -> None:
    lines = [f"a shape@@{model.folder / f'{number}.png'}" for number in (0, 1)]
    first, second = model.latents(lines, "args.sampling_image_size=[32, 32]", "args.batch_size=2")
    (alone,) = model.latents(lines[:1], "args.sampling_image_size=[32, 32]")
    torch.testing.assert_close(first, alone, rtol=0.0, atol=5e-5)
    engine = build_engine(model.config()["model"]).eval()
    weights = torch.load(model.folder / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    engine.network.load_state_dict({name.removeprefix(NETWORK_PREFIX): value for name, value in weights.items()})
    image = read_image(model.folder / "1.png", (32, 32))
    expected = engine.sample(["a shape"], [1], 3, (3, 16, 4, 4), images=image[None])
    torch.testing.assert_close(second, expected[0], rtol=0.0, atol=5e-5)


def test_a_video_has_the_aspect_ratio_of_its_image(model: Model) -> None:
    """Rotary positions alone go with any size: the short side is the trained one, the long one at most as trained."""
    lines = [f"a shape@@{model.folder / f'{number}.png'}" for number in (0, 1, 2)]
    words = ("args.sampling_image_size=null", "data={params: {video_size: [32, 48], max_num_frames: 9}}")
    shapes = [tuple(latents.shape[2:]) for latents in model.latents(lines, *words, "args.batch_size=3")]
    assert shapes == [(4, 4), (6, 4), (4, 6)]
    fixed = model.latents(lines, "args.sampling_image_size=[32, 48]")
    assert {tuple(latents.shape[2:]) for latents in fixed} == {(4, 6)}


def test_noise_and_prefix_are_of_the_size_of_each_video(model: Model, tmp_path: Path) -> None:
    words = ("args.sampling_image_size=null", "data={params: {video_size: [32, 48], max_num_frames: 9}}")
    line = f"a shape@@{model.folder / '1.png'}"  # portrait
    noise = torch.randn(3, 16, 6, 4, generator=torch.Generator().manual_seed(1))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    first, again = (model.latents([line], *words, f"args.initial_noise={tmp_path / 'noise.safetensors'}") for _ in "ab")
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], model.latents([line], *words)[0])
    with pytest.raises(DataError, match=r"'noise' .* is \(3, 16, 6, 4\), the sample is \(3, 16, 4, 6\)"):
        model.latents(
            [f"a shape@@{model.folder / '2.png'}"], *words, f"args.initial_noise={tmp_path / 'noise.safetensors'}"
        )
    save_file({"latents": noise[:1]}, tmp_path / "prefix.safetensors")
    fixed = ("model.sampler_config.params.fixed_frames=1", f"args.prefix={tmp_path / 'prefix.safetensors'}")
    (continued,) = model.latents([line], *words, *fixed)
    assert torch.equal(continued[0], noise[0])


def test_a_model_with_a_table_of_positions_keeps_its_size(tmp_path: Path) -> None:
    model = Model(tmp_path, "model.network_config.params.modules.pos_embed_config.params.learnable_pos_embed=true")
    (latents,) = model.latents([f"a shape@@{tmp_path / '1.png'}"])
    assert latents.shape[2:] == (4, 4)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((768, 1360), (768, 1360)),
        ((1080, 1920), (768, 1360)),
        ((1920, 1080), (1360, 768)),
        ((512, 512), (768, 768)),
        ((600, 800), (768, 1024)),
        ((400, 4000), (768, 1360)),
    ],
)
def test_sizes_that_follow_an_image(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_of_short_side(*size, (768, 1360)) == expected


def test_the_script_writes_a_video_that_names_its_image(model: Model, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"a red disc @@ {model.folder / '0.png'}\n")
    main(["--load", str(model.folder), f"args.output_dir={tmp_path}", f"args.input_file={tmp_path / 'prompts.txt'}"])
    (video,) = tmp_path.glob("*.mp4")
    assert video.name == "00000-a-red-disc-seed42.mp4" and probe(video, count=True).num_frames == 9
    metadata = read_metadata(video)
    assert (metadata["prompt"], metadata["image"]) == ("a red disc", str(model.folder / "0.png"))


def test_an_image_is_cut_to_cover_the_video(tmp_path: Path) -> None:
    picture = torch.linspace(-1, 1, 96).expand(1, 3, 32, 96)
    write_png(tmp_path / "wide.png", to_frames(picture)[0])
    pixels = read_image(tmp_path / "wide.png", (32, 32))
    torch.testing.assert_close(pixels, picture[..., 32:64], rtol=0.0, atol=0.005)  # a picture has 256 levels


# --- refusals --------------------------------------------------------------------------------------------------------


def test_prompts_are_read_with_their_image(tmp_path: Path) -> None:
    (tmp_path / "a b.png").touch()
    assert parse_prompt("text", False) == Prompt("text")
    assert parse_prompt(f"two words @@ {tmp_path / 'a b.png'} ", True) == Prompt("two words", tmp_path / "a b.png")
    for line, takes_image, message in (
        ("text", True, r"the model continues an image, and 'text' names none; write PROMPT@@IMAGE"),
        ("text@@", True, "names none"),
        ("text@@a.png", False, r"'text@@a.png' names an image, and the model takes none; leave @@a.png out"),
        ("text@@none.png", True, "there is no image none.png, which 'text@@none.png' names"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_prompt(line, takes_image)


def test_they_are_found_before_the_model_is_built(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model is built before the mistake is found")

    monkeypatch.setattr(sampling_run, "build_engine", refuse)
    with pytest.raises(ConfigError, match="names none; write PROMPT@@IMAGE"):
        model.latents(["a shape"])
    with pytest.raises(ConfigError, match=r"there is no image nowhere\.png"):
        model.latents(["a shape@@nowhere.png"])


def test_a_file_that_is_no_picture_is_named(model: Model) -> None:
    (model.folder / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text.png cannot be read"):
        model.latents([f"a shape@@{model.folder / 'text.png'}"])
