"""Training on caches: the numbers of training on the clips, what is computed when, and what is refused."""

import functools
import gc
import shutil
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from sat.conditioning.text import FreedTextEncoder, FrozenT5Embedder
from sat.config import load_config
from sat.data.cache import Header
from sat.errors import CacheError, ConfigError
from sat.mpu.launch import read_launch
from sat.mpu.recorder import Recorder
from sat.training.args import train_args
from sat.training.caches import check_cache
from sat.training.run import Job, Run
from sat.vae.autoencoder import VideoAutoencoder
from tests.caches import data_words, model_words
from tests.image_to_video import IMAGE_TO_VIDEO, write_clips
from tests.ranks import run_ranks
from tests.tiny import ROOT, only_run, records, tiny_config, train_on_rank

BROKEN = b"no video"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The model, and five clips: one is shorter, one no video."""
    folder = tmp_path_factory.mktemp("model")
    words = (*model_words(folder), *data_words(folder / "clips"))
    short = write_clips(folder / "short", 1, num_frames=6)
    for part, suffix in (("videos", "mp4"), ("labels", "txt")):
        shutil.copy(short / part / f"0.{suffix}", folder / "clips" / part / f"4.{suffix}")
    (folder / "clips" / "videos" / "2.mp4").write_bytes(BROKEN)
    return words


def clips_of(words: tuple[str, ...]) -> Path:
    (found,) = (word for word in words if word.startswith("args.train_data="))
    return Path(found.split("=")[1].strip("[]"))


def losses(folder: Path, *words: str, world: int = 1) -> list[tuple[Any, ...]]:
    """What the records of a run say of its numbers."""
    run_ranks(train_on_rank, world, (f"args.save={folder}", *words))
    own = [
        (record["loss"], record["grad_norm"], record["padding_share"], record["replaced"])
        for record in records(only_run(folder))
    ]
    return [*own, *((record["loss"],) for record in records(only_run(folder), "valid"))]


# --- equal numbers ---------------------------------------------------------------------------------------------------

MIXED = ("data.params.short_clips=keep", "data.params.read_headers=true")
PACK = (*MIXED, "data.params.pack={max_tokens: 60}")
CUT = (*MIXED, "data.params.pack={max_tokens: 24}")
"""Rows of 24 tokens hold two of a clip's three latent frames, 4 tokens each, beside 16 of text."""
BUCKET = (*MIXED, "data.params.bucket={max_tokens: 60}")
_SET = "target: data_video.SFTDataset, params: {data_dir: CLIPS, video_size: [32, 32], fps: 8, skip_frms_num: 0, "
MIXTURE = (
    f"data={{target: sat.data.mixture.Mixture, params: {{weights: {{a: 1, b: 2}}, sets: {{"
    f"a: {{{_SET}max_num_frames: 9}}}}, b: {{{_SET}max_num_frames: 5, missing_caption: empty}}}}}}}}}}"
)
ONE = "deepspeed.train_micro_batch_size_per_gpu=1"
EMPTY_PROMPT = "model.conditioner_config.params.unconditional=empty_prompt"
VALID = ("args.eval_interval=3", "args.eval_timesteps=[500]")


@pytest.mark.parametrize(
    ("kind", "more", "world"),
    [
        ("all", (*VALID,), 1),
        pytest.param(*("text", (ONE, EMPTY_PROMPT), 1), marks=pytest.mark.slow),
        pytest.param(*("latents", (), 2), marks=pytest.mark.slow),
        pytest.param(*("all", (ONE, EMPTY_PROMPT), 2), marks=pytest.mark.slow),
        pytest.param(*("all", (ONE, *IMAGE_TO_VIDEO), 1), marks=pytest.mark.slow),
        ("all", (ONE, *PACK), 1),
        pytest.param(*("all", (ONE, *CUT), 1), marks=pytest.mark.slow),
        pytest.param(*("all", (ONE, *BUCKET), 1), marks=pytest.mark.slow),
        pytest.param(*("all", (ONE, "args.context_parallel_size=2"), 2), marks=pytest.mark.slow),
        pytest.param(*("all", (ONE, MIXTURE), 1), marks=pytest.mark.slow),
    ],
)
def test_a_cached_step_is_an_uncached_one(
    words: tuple[str, ...], tmp_path: Path, kind: str, more: tuple[str, ...], world: int
) -> None:
    """Bit for bit: clips and captions are encoded alone there, and here too (en_and_decode_n_samples_a_time, and a
    micro batch of 1 for a T5)."""
    words = (*words, *(word.replace("CLIPS", str(clips_of(words))) for word in more), ONE)
    if any(word.startswith(MIXTURE[:10]) for word in more):
        words = (*words, "args.train_data=null", "args.valid_data=null")
    cached = (f"args.cache={kind}", f"args.cache_dir={tmp_path / 'cache'}")
    expected = losses(tmp_path / "uncached", *words, world=world)
    assert losses(tmp_path / "filled", *words, *cached, world=world) == expected
    assert losses(tmp_path / "read", *words, *cached, "args.cache_read_only=true", world=world) == expected
    assert len(expected) == 3 + ("args.eval_interval=3" in more) and expected[0][0] > 0.5


# --- what is computed when -------------------------------------------------------------------------------------------


def one_rank(rank: int, words: tuple[str, ...], seed: int) -> Any:
    """What a run has built before its first step, in numbers that can be sent."""
    kept: list[weakref.ref[Any]] = []
    for kind in (VideoAutoencoder, FrozenT5Embedder):
        note(kind, kept)
    config, launch = tiny_config(*words), read_launch()
    with ExitStack() as resources:
        job = Job(config, seed, launch, Recorder(launch), resources)
        start, stages = job.begin()
        run = Run(job, stages[0], start, resources)
        gc.collect()
        engine = run.system.engine  # type: ignore[attr-defined]
        parts = (engine.first_stage_model, engine.conditioner.embedders[0])
        return [type(part).__name__ for part in parts], sum(one() is not None for one in kept)


def note(kind: type, kept: list[Any]) -> None:
    """Keep a weak reference to each object of a class that is made."""
    build = kind.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        kept.append(weakref.ref(self))

    kind.__init__ = __init__  # type: ignore[misc]  # in a process of the test's own


@pytest.mark.parametrize(
    ("more", "left"),
    [
        (("args.cache=all",), ["NoneType", "FreedTextEncoder"]),
        (("args.cache=text",), ["VideoAutoencoder", "FreedTextEncoder"]),
        (("args.cache=latents",), ["NoneType", "FrozenT5Embedder"]),
        (("args.cache=all", *IMAGE_TO_VIDEO), ["VideoAutoencoder", "FreedTextEncoder"]),
        (("args.cache=none",), ["VideoAutoencoder", "FrozenT5Embedder"]),
    ],
)
def test_the_encoders_are_freed(words: tuple[str, ...], tmp_path: Path, more: tuple[str, ...], left: list[str]) -> None:
    (found,) = run_ranks(one_rank, 1, (*words, f"args.cache_dir={tmp_path}", *more), 7)
    assert found == (left, sum(name in ("VideoAutoencoder", "FrozenT5Embedder") for name in left))


def test_a_damaged_entry_stops_the_run(words: tuple[str, ...], tmp_path: Path) -> None:
    """It is told, not replaced as a bad clip would be."""
    options = (*words, "args.cache=latents", f"args.cache_dir={tmp_path}")
    run_ranks(train_on_rank, 1, options)
    (shard,) = tmp_path.glob("latents-*/*.safetensors")
    content = bytearray(shard.read_bytes())
    start = Header.read(shard).start
    content[start : start + len(content[start:]) // 2] = bytes(len(content[start:]) // 2)
    shard.write_bytes(content)
    with pytest.raises(
        AssertionError, match=r"CacheError: .*safetensors is damaged: the moments of entry .*; delete it"
    ):
        run_ranks(train_on_rank, 1, options)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "all",
            ("model.latent_input=true",),
            "args.cache is all, and model.latent_input says that clips come as latents",
        ),
        ("latents", ("model.first_stage_config=null",), "keeps latents, and the model has no first_stage_config"),
        (
            "latents",
            ("model.first_stage_config={target: sat.vae.block_dct.BlockDCT}",),
            "keeps latents, and BlockDCT gives no posterior to keep; set args.cache to text or none",
        ),
        (
            "text",
            ("model.conditioner_config.params.emb_models.0.is_trainable=true",),
            r"keeps text states, and the text encoder is trained \(is_trainable\), so that they change",
        ),
        (
            "latents",
            (
                "data={target: sat.data.synthetic.SyntheticImages, params: {num_samples: 4, height: 32, width: 32}}",
                "args.train_data=null",
            ),
            "args.cache is latents, and SyntheticImages does not say of which files its clips are made: it needs the",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(
    words: tuple[str, ...], tmp_path: Path, kind: str, more: tuple[str, ...], message: str
) -> None:
    options = (*words, "args.num_workers=0", f"args.cache={kind}", f"args.cache_dir={tmp_path}", *more)
    with pytest.raises(AssertionError, match=f"ConfigError: .*{message}"):
        run_ranks(train_on_rank, 1, options)


def test_a_cache_needs_a_folder_and_a_video_model() -> None:
    with pytest.raises(ConfigError, match=r"args.cache is text, and args.cache_dir is not set; give a folder"):
        train_args(tiny_config("args.cache=text"))
    with pytest.raises(
        ConfigError, match=r"args.cache \(the command line\) is 'both'; give one of none, text, latents, all"
    ):
        train_args(tiny_config("args.cache=both"))
    config = load_config([ROOT / "configs" / "tiny_vae.yaml"], ["args.cache=latents", "args.cache_dir=here"])
    with pytest.raises(ConfigError, match=r"args.cache is latents, and the model section is no video model"):
        check_cache(config, train_args(config))


def test_captions_of_any_dataset_are_cached(tmp_path: Path) -> None:
    """Synthetic latents, as configs/tiny.yaml has them: the ones that latent_input reads as they are."""
    words = ("args.train_iters=3", "args.global_batch_size=4", ONE)
    expected = losses(tmp_path / "uncached", *words)
    cached = ("args.cache=text", f"args.cache_dir={tmp_path / 'cache'}")
    assert losses(tmp_path / "cached", *words, *cached) == expected
    (about,) = tmp_path.glob("cache/text-*/about.json")
    assert '"encoder 0 max_length": 16' in about.read_text()


def sampled(rank: int, words: tuple[str, ...]) -> list[str]:
    return one_rank(rank, words, 7)[0]


def test_a_run_that_samples_keeps_its_encoders(words: tuple[str, ...], tmp_path: Path) -> None:
    more = (
        "args.log_sample=1",
        *VALID,
        "args.cache=all",
        f"args.cache_dir={tmp_path}",
        f"args.save={tmp_path / 'run'}",
    )
    assert run_ranks(sampled, 1, (*words, *more)) == [["VideoAutoencoder", "FrozenT5Embedder"]]


def test_a_vae_that_takes_the_mean_does_so_from_a_cache(words: tuple[str, ...], tmp_path: Path) -> None:
    more = (*words, ONE, "model.first_stage_config.params.regularizer_config.params={sample: false}")
    cached = ("args.cache=latents", f"args.cache_dir={tmp_path / 'cache'}")
    assert losses(tmp_path / "cached", *more, *cached) == losses(tmp_path / "uncached", *more)


# --- the freed encoder -----------------------------------------------------------------------------------------------


def test_a_freed_text_encoder_says_so() -> None:
    freed = FreedTextEncoder(width=2, max_length=3, empty=torch.ones(1, 3, 2))
    assert torch.equal(freed(["", ""]), torch.ones(2, 3, 2))
    with pytest.raises(
        CacheError, match=r"the text encoder was freed, and is asked for 'a red disc'; set args.cache=none"
    ):
        freed(["", "a red disc"])
    with pytest.raises(CacheError, match="the text encoder was freed"):
        FreedTextEncoder(width=2, max_length=3, empty=None)([""])
