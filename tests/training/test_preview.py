"""Numbers that follow from a configuration, and those in it that contradict each other."""

from pathlib import Path

import pytest

from sat.cogvideox.presets import video_sizes
from sat.config import load_config
from sat.errors import CheckpointError, ConfigError
from sat.sampling.args import size_warning
from sat.training.preview import check_numbers, clip_fps, clip_sizes, derived_lines
from sat.training.systems import check_files
from tests.tiny import ROOT, TINY

NETWORK = "model.network_config.params"
VAE = (
    "model.first_stage_config.target=vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
    "model.first_stage_config.params.encoder_config.params.z_channels=8",
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [f"{NETWORK}.num_frames=8"],
            r"NETWORK.num_frames \(the command line\): 8 frames are not 4k \+ 1, .* give 5 or 9",
        ),
        (
            ["data.params.max_num_frames=50"],
            r"data.params.max_num_frames \(the .* line\): 50 frames are not .* 49 or 53",
        ),
        (
            ["data.params.video_size=[64, 100]"],
            r"video_size \(the .* line\): width 100 is not a .* of 16 .* give 96 or 112",
        ),
        (
            [f"{NETWORK}.latent_height=7"],
            r"NETWORK.latent_height \(the command line\), .*: height 56 is not a multiple of 1",
        ),
        (
            [f"{NETWORK}.latent_width=0"],
            r"NETWORK.latent_width \(the command line\) is 0; give a whole number, 1 or more",
        ),
        (
            [f"{NETWORK}.num_attention_heads=5"],
            r"NETWORK.hidden_size \(\S+tiny.yaml line \d+\) is 96, .* NETWORK.num_attention_heads \(the com",
        ),
        (
            [f"{NETWORK}.modules.pos_embed_config.params.hidden_size_head=16"],
            r"hidden_size_head \(the command line\) is 16, and NETWORK.hidden_size \(.*\) 96 over .* 3 gives heads of",
        ),
        (
            ["model.conditioner_config.params.emb_models.0.params.max_length=8"],
            r"emb_models\[0\].params.max_length \(the command line\) is 8 and .*text_length \(\S+ line \d+\) is 16",
        ),
        (
            ["data.params.channels=8"],
            r"data.params.channels \(the .* line\) is 8 and NETWORK.out_channels \(\S+ line \d+\) is 16",
        ),
        (
            ["data.params.height=7"],
            r"data.params.height \(the command line\) is 7 latents, which do not .* patches of 2 ",
        ),
        (
            list(VAE),
            r"encoder_config.params.z_channels \(the command line\) is 8 and NETWORK.out_channels \(\S+ line \d+\) is",
        ),
    ],
)
def test_contradictions_name_both_numbers_and_who_set_them(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("NETWORK", NETWORK)):
        check_numbers(load_config([TINY], words))


MIXTURE = (
    "data={target: sat.data.mixture.Mixture, params: {sets: {"
    "images: {target: data_video.SFTDataset, params: {video_size: [64, 96], fps: 1, max_num_frames: 1}}, "
    "clips: {target: data_video.SFTDataset, params: {video_size: [32, 48], fps: 16, max_num_frames: 9, "
    "size_mode: keep}}}}}"
)


def test_a_mixture_has_the_sizes_of_its_largest_clips() -> None:
    config = load_config([TINY], [MIXTURE])
    sizes = clip_sizes(config)
    assert sizes is not None and (sizes.num_frames, sizes.height, sizes.width, clip_fps(config)) == (9, 32, 48, 16)
    assert derived_lines(config)[0].startswith("largest clip of the mixture: 9 frames of 32x48 pixels or, at each")
    assert size_warning(config, sizes) is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("clips.params.max_num_frames=10", r"sets.clips.params.max_num_frames \(the command line\): 10 frames are not"),
        ("images.params.video_size=[64, 90]", r"sets.images.params.video_size \(the command line\): width 90 is not"),
        ("images.params.height=7", r"sets.images.params.height \(the command line\) is 7 latents, which do not"),
    ],
)
def test_each_set_of_a_mixture_is_checked(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_numbers(load_config([TINY], [MIXTURE, f"data.params.sets.{word}"]))


def test_an_image_is_a_clip_of_one_frame() -> None:
    config = load_config([ROOT / "configs" / "cogview3plus_3b.yaml"])
    sizes = clip_sizes(config)
    assert sizes is not None
    assert (sizes.num_frames, sizes.height, sizes.width, sizes.grid) == (1, 1024, 1024, (1, 64, 64))
    assert "4,096 + 224 tokens" in derived_lines(config)


def test_a_network_without_a_size_needs_one() -> None:
    overrides = ["model.network_config.params={num_frames: 1, latent_height: 8}"]
    with pytest.raises(ConfigError, match="network_config has no latent_width; give the size"):
        clip_sizes(load_config([], overrides))


def test_another_size_than_the_networks_is_no_contradiction() -> None:
    """Rotary positions take any grid."""
    config = load_config([TINY], ["data.params.video_size=[96, 48]", "data.params.max_num_frames=17"])
    check_numbers(config)
    sizes = clip_sizes(config)
    assert sizes is not None and sizes.grid == (5, 6, 3)


def test_a_users_network_need_not_have_these_numbers() -> None:
    config = load_config([], ["model.network_config={target: a.B, params: {width: 7, num_attention_heads: 3}}"])
    check_numbers(config)
    assert derived_lines(config) == []
    assert derived_lines(load_config([ROOT / "configs" / "demo_vae.yaml"])) == []


def test_a_model_named_by_target_is_looked_into() -> None:
    plain = load_config([TINY])
    named = load_config([TINY])
    named["model"].clear()
    named["model"].update(target="diffusion_video.SATVideoDiffusionEngine", params=plain["model"])
    assert derived_lines(named) == derived_lines(plain) != []


@pytest.mark.parametrize(
    ("frames", "height", "width", "patch", "grid", "tokens"),
    [
        (49, 480, 720, [1, 2, 2], (13, 30, 45), 17_550),
        (81, 768, 1360, [2, 2, 2], (11, 48, 85), 44_880),
        (1, 480, 720, 2, (1, 30, 45), 1350),
    ],
)
def test_released_sizes(frames: int, height: int, width: int, patch: list[int], grid: tuple, tokens: int) -> None:
    sizes = video_sizes(frames, height, width, patch, 226)
    assert (sizes.grid, sizes.video_tokens, sizes.text_length) == (grid, tokens, 226)


def test_missing_files_of_parts_are_found_before_the_build(tmp_path: Path) -> None:
    base = [ROOT / "configs" / "cogvideox_5b.yaml"]
    with pytest.raises(
        CheckpointError, match=r"there is no T5 folder t5-v1_1-xxl; set model_dir of the FrozenT5Embedder"
    ):
        check_files(load_config(base))
    words = ["model.conditioner_config=null"]
    with pytest.raises(CheckpointError, match=r"there is no file or folder vae/3d-vae\.pt; check ckpt_path"):
        check_files(load_config(base, words))
    check_files(load_config(base, [*words, "model.first_stage_config=null"]))
    check_files(load_config([TINY]))


def test_a_vae_that_nobody_will_have_again_is_warned_of(fresh_log: None, caplog: pytest.LogCaptureFixture) -> None:
    words = ["model.conditioner_config=null", "model.first_stage_config.params.ckpt_path=null"]
    check_files(load_config([ROOT / "configs" / "cogvideox_5b.yaml"], words))
    assert caplog.messages[0].startswith("model.first_stage_config has no ckpt_path: the VAE's weights are random and ")
