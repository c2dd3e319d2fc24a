"""The args section of sampling: sizes, frame rate and precision, and what contradicts them."""

from typing import Any

import pytest

from sat.config import ConfigNode, load_config
from sat.errors import ConfigError
from sat.sampling.args import sample_args, sampling_fps, sampling_precision, sampling_sizes, size_warning, takes_image
from tests.tiny import ROOT, TINY, tiny_config

RELEASED_1_5 = [ROOT / "configs" / "cogvideox1.5_5b.yaml", ROOT / "configs" / "inference.yaml"]
RELEASED_5B = [ROOT / "configs" / "cogvideox_5b.yaml", ROOT / "configs" / "inference.yaml"]


def sizes_of(config: ConfigNode) -> tuple[int, ...]:
    sizes = sampling_sizes(config, sample_args(config))
    return sizes.num_frames, sizes.height, sizes.width, sizes.latent_frames, sizes.latent_height, sizes.latent_width


def test_sizes_of_a_released_model() -> None:
    config = load_config(RELEASED_5B)
    assert sizes_of(config) == (49, 480, 720, 13, 60, 90)
    assert sampling_sizes(config, sample_args(config)).video_tokens == 17_550


def test_sizes_are_the_models_own_by_default() -> None:
    assert sizes_of(load_config([TINY])) == (9, 64, 64, 3, 8, 8)
    assert sizes_of(load_config([TINY], ["data.params={video_size: [32, 48], max_num_frames: 5}"])) == (
        *(5, 32, 48),
        *(2, 4, 6),
    )


def test_sizes_may_be_others_than_the_models() -> None:
    config = tiny_config("args.sampling_image_size=[48, 32]", "args.sampling_num_frames=5")
    assert sizes_of(config) == (17, 48, 32, 5, 6, 4)


@pytest.mark.parametrize(
    ("words", "frames", "latent_frames"),
    [
        (["args.sampling_num_frames=22"], 81, 21),  # SAT's count, one of them padding
        (["args.sampling_num_frames=42"], 161, 41),
        (["args.sampling_num_frames=2"], 1, 1),
        (["args.num_frames=81"], 81, 21),
        (["args.num_frames=85"], 85, 22),  # an even number needs none
        (["args.sampling_num_frames=null"], 81, 21),
    ],
)
def test_frames_of_a_model_with_patches_in_time(words: list[str], frames: int, latent_frames: int) -> None:
    config = load_config(
        RELEASED_1_5, ["args.sampling_image_size=[768, 1360]", "args.sampling_num_frames=null", *words]
    )
    sizes = sampling_sizes(config, sample_args(config))
    assert (sizes.num_frames, sizes.latent_frames) == (frames, latent_frames)
    assert sizes.grid == ((latent_frames + 1) // 2, 48, 85)


def test_released_files_of_1_5_are_not_sampled_at_the_size_of_their_tables() -> None:
    words = [f"model.network_config.params.latent_{side}=300" for side in ("height", "width")]
    assert sizes_of(load_config(RELEASED_1_5[:1], words))[:3] == (81, 768, 1360)


@pytest.mark.parametrize(
    ("files", "words", "is_warned"),
    [
        (RELEASED_5B, [], False),
        (RELEASED_5B, ["args.sampling_num_frames=9"], False),
        (RELEASED_5B, ["args.sampling_num_frames=15"], True),
        (RELEASED_5B, ["args.sampling_image_size=[720, 480]"], True),
        (
            RELEASED_5B,
            ["data={params: {video_size: [480, 720], size_mode: keep}}", "args.sampling_image_size=[720, 480]"],
            False,
        ),
        (RELEASED_1_5, ["args.sampling_image_size=[1360, 768]", "args.sampling_num_frames=22"], False),
        (RELEASED_1_5, ["args.sampling_image_size=[768, 768]", "args.sampling_num_frames=22"], False),
        (RELEASED_1_5, ["args.sampling_image_size=[256, 256]", "args.num_frames=81"], True),
        (RELEASED_1_5, ["args.sampling_image_size=[768, 1360]", "args.num_frames=5"], True),
        (RELEASED_1_5, ["args.sampling_image_size=[768, 1360]", "args.num_frames=21"], False),
        (RELEASED_5B, ["args.num_frames=9"], True),
        (RELEASED_1_5, ["args.sampling_image_size=[768, 1376]", "args.sampling_num_frames=22"], True),
        (RELEASED_1_5, ["args.sampling_image_size=[768, 1360]", "args.num_frames=85"], True),
    ],
)
def test_sizes_that_were_not_trained_are_warned_of(files: list[Any], words: list[str], is_warned: bool) -> None:
    config = load_config(files, words)
    args = sample_args(config)
    assert (size_warning(config, sampling_sizes(config, args)) is not None) == is_warned


def test_the_warning_says_both_sizes() -> None:
    config = load_config(RELEASED_5B, ["args.sampling_image_size=[720, 480]"])
    assert size_warning(config, sampling_sizes(config, sample_args(config))) == (
        "49 frames of 720x480 are asked for, and the model was trained on 49 of 480x720: they may look worse"
    )
    config = load_config(RELEASED_1_5, ["args.sampling_image_size=[256, 256]"])
    assert size_warning(config, sampling_sizes(config, sample_args(config))) == (
        "81 frames of 256x256 are asked for, and the model was trained on 81 of 768x1360, or of other aspect ratios "
        "with that short side: they may look worse"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["args.sampling_image_size=[480, 725]"], "width 725 is not a multiple of 16 .* give 720 or 736"),
        (["args.sampling_image_size=[480]"], r"sampling_image_size is \[480\]; give \[height, width\]"),
        (["args.latent_channels=4"], "latent_channels is 4, the network's out_channels is 16; leave"),
        (["args.sampling_num_frames=0"], "args.sampling_num_frames is 0; give 1 or more"),
        (["args.batch_size=0"], "args.batch_size is 0; give 1 or more"),
        (["args.reuse_threshold=-1"], r"args.reuse_threshold is -1; give 0 \(nothing is reused\) or more, such as 0.1"),
        (["args.reuse_threshold=.inf"], "args.reuse_threshold is inf; give 0"),
        (
            ["model.network_config.params.patch_size=[2, 2, 2]", "args.sampling_num_frames=13"],
            "13 latent frames are not a multiple of the 2 frames of a patch; set args.sampling_num_frames to 14, or "
            "give args.num_frames=49",
        ),
        (["args.bf16=true", "args.fp16=true"], "args.bf16 and args.fp16 are both on; choose one"),
        (["args.image2video=true"], "args.image2video is on, and the model takes no image"),
        (["args.num_frames=48"], r"48 frames are not 4k \+ 1, as the VAE needs; give 45 or 49"),
        (
            ["args.num_frames=49", "args.sampling_num_frames=13"],
            "args.num_frames is 49 and args.sampling_num_frames is",
        ),
        (["args.lora=[a, b]", "args.lora_scale=[0.5]"], "there are 1 LoRA scales and 2 LoRAs; give one for each"),
        (["args.input_typ=cli"], "unknown key args.input_typ .the command line.; did you mean 'input_type'?"),
        (["args.input_type=keyboard"], "args.input_type .* is 'keyboard'; give one of cli, txt"),
        (["model.network_config=null"], "no network_config: this is no video model that could be sampled"),
    ],
)
def test_what_contradicts_is_refused(words: list[str], message: str) -> None:
    config = load_config(RELEASED_5B, words)
    with pytest.raises(ConfigError, match=message):
        args = sample_args(config)
        sampling_sizes(config, args)
        takes_image(config, args)


def test_keys_of_a_training_run_are_passed_over() -> None:
    config = tiny_config("args.train_iters=20", "args.mode=pretrain", "args.save=runs")
    assert sample_args(config).output_dir == "outputs"


@pytest.mark.parametrize(
    ("words", "fps"),
    [
        ([], 8),
        (["data={target: data_video.SFTDataset, params: {fps: 16}}"], 16),
        (["data={target: data_video.SFTDataset, params: {fps: 16}}", "args.sampling_fps=24"], 24),
    ],
)
def test_frame_rate_is_that_of_the_training_clips(words: list[str], fps: float) -> None:
    config = tiny_config(*words)
    assert sampling_fps(config, sample_args(config)) == fps


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        ([], "fp32"),
        (["deepspeed.bf16.enabled=true"], "bf16"),
        (["deepspeed.fp16.enabled=true"], "fp16"),
        (["deepspeed.bf16.enabled=true", "args.bf16=false"], "fp32"),
        (["deepspeed.bf16.enabled=true", "args.fp16=true"], "fp16"),
        (["args.bf16=true"], "bf16"),
    ],
)
def test_precision_is_that_of_training(words: list[str], precision: Any) -> None:
    config = tiny_config(*words)
    assert sampling_precision(config, sample_args(config)) == precision
