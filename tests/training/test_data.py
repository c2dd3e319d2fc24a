"""The datasets of a run: from the data section and the paths of the args section."""

import json
from pathlib import Path

import pytest
from torch.utils.data import ConcatDataset

from sat.config import load_config
from sat.data.dataset import SFTDataset
from sat.errors import ConfigError, DataError
from sat.training.args import train_args
from sat.training.data import TrainingData, ValidationData, build_dataset, check_sources
from sat.training.plan import take_plan
from tests.tiny import tiny_config
from tests.training.test_loop import clip_set

FILES = "data={target: data_video.SFTDataset, params: {video_size: [16, 16], fps: 8, max_num_frames: 5}}"


def test_one_folder_several_or_none(tmp_path: Path) -> None:
    folders = [str(clip_set(tmp_path / name, 2, {})) for name in "ab"]
    section = load_config([], [FILES])["data"]
    for one in (folders[0], folders[:1]):
        dataset = build_dataset(section, one)
        assert isinstance(dataset, SFTDataset) and len(dataset) == 2
    both = build_dataset(section, folders)
    assert isinstance(both, ConcatDataset) and [both[index]["key"] for index in (0, 2)] == [
        "a/videos/0.mp4",
        "b/videos/0.mp4",
    ]
    assert len(build_dataset(tiny_config()["data"], None)) == 1000  # type: ignore[arg-type]
    section = load_config([], [FILES, f"data.params.data_dir={folders[1]}"])["data"]
    assert len(build_dataset(section, None)) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "paths", "message"),
    [
        ([], ["a"], "the data section has no target; give one, e.g. data_video.SFTDataset"),
        ([FILES], None, "args.train_data is not set, and data_video.SFTDataset reads files; give a list of"),
        ([FILES], [], "args.train_data is an empty list; give folders or manifests"),
        (
            ["data={target: sat.data.synthetic.SyntheticLatents, params: {num_samples: 1}}"],
            ["clips"],
            r"args.train_data is \['clips'\], and data.target \(.*\) is sat.data.synthetic.SyntheticLatents, .* no fi",
        ),
    ],
)
def test_paths_and_targets_that_do_not_go_together(words: list[str], paths: list[str] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_dataset(load_config([], words)["data"], paths)


def test_places_that_hold_nothing_are_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "0.tar").touch()
    here = f"data_dir: {tmp_path}/a.jsonl"
    theirs = "target: collections.Counter, params: {data_dir: x}"
    sets = f"{{a: {{target: data_video.SFTDataset, params: {{{here}}}}}, b: {{{theirs}}}}}"
    mixture = f"data={{target: sat.data.mixture.Mixture, params: {{sets: {sets}, valid_sets: {sets}}}}}"

    def check(*words: str) -> None:
        config = load_config([], words)
        check_sources(config, train_args(config))

    check(FILES, f"args.train_data={tmp_path}", f"args.valid_data=['{tmp_path}/{{0..0}}.tar', 'https://host/1.tar']")
    check(mixture)
    check(f"data={{{theirs}}}", "args.train_data=[s3://theirs]")
    for words in (
        (FILES, "args.train_data=[nowhere]"),
        (FILES, f"args.train_data={tmp_path}", "args.valid_data=nowhere"),
        (FILES, "data.params.data_dir=nowhere"),
        (mixture, "data.params.valid_sets.a.params.data_dir=nowhere"),
    ):
        with pytest.raises(DataError, match=r"no data at .*/nowhere: give a folder with clips"):
            check(*words)
    with pytest.raises(DataError, match=r"there is no shard .*/1.tar"):
        check(FILES, f"args.train_data={tmp_path}/{{0..1}}.tar")


def test_a_run_needs_an_end() -> None:
    config = tiny_config("args.train_iters=null")
    with pytest.raises(ConfigError, match="args says neither train_iters nor epochs; give one"):
        TrainingData(config, train_args(config), 0, 4, 2, 0, 1)
    with pytest.raises(ConfigError, match=r"args: train_iters 40 and epochs 2.0 contradict; give one"):
        train_args(tiny_config("args.epochs=2"))
    config = tiny_config("args.train_iters=null", "args.epochs=0.5")
    assert TrainingData(config, train_args(config), 0, 4, 2, 0, 1).total_steps == 125


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_validation_reads_the_first_samples_once(dp_size: int, micro: int) -> None:
    config = tiny_config("args.eval_interval=1", "args.eval_iters=2", "data.params.num_samples=7")
    found = []
    for rank in range(dp_size):
        data = ValidationData.build(config, train_args(config), 0, 5, micro, rank, dp_size)
        assert data is not None
        for batch, num_counted in data.batches():
            found += batch["counters"].tolist()[:num_counted]
    assert sorted(found) == list(range(7))  # 2 x 5, but there are no more


def test_validation_without_data_warns(fresh_log: None, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = load_config([], [FILES, "args.eval_interval=10", "args.train_data=[a]"])
    assert ValidationData.build(config, train_args(config), 0, 4, 2, 0, 1) is None
    assert caplog.messages == ["args.eval_interval is 10 without effect: args.valid_data is not set"]


def test_bad_validation_clips_are_replaced_and_named_once(
    fresh_log: None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = clip_set(tmp_path / "set", 4, {1: b""})
    words = ("args.eval_interval=1", f"args.train_data=[{folder}]", f"args.valid_data=[{folder}]", "args.num_workers=0")
    config = load_config([], [FILES, "data.params.skip_frms_num=0", *words])
    data = ValidationData.build(config, train_args(config), 0, 4, 2, 0, 1)
    assert data is not None
    first, again = ([key for batch, _ in data.batches() for key in batch["key"]] for _ in range(2))
    assert first == again and "set/videos/1.mp4" not in first
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(
        "bad validation clip set/videos/1.mp4 replaced: "
    )


def planned_sizes(*words: str) -> list[int]:
    """Latent frames of each clip of a training set whose rows are planned."""
    config = tiny_config("data={target: data_video.SFTDataset, params: {fps: 8}}", "args.train_iters=1", *words)
    data = TrainingData(config, train_args(config), 7, 1, 1, dp_rank=0, dp_size=1)
    assert data.plan is not None
    return [size[0] for size in data.plan.sizes]


@pytest.mark.parametrize("kind", ["pack", "bucket"])
def test_images_are_one_frame_where_rows_are_planned(tmp_path: Path, kind: str) -> None:
    """And a short clip is as long as it is; nothing is opened to plan."""
    rows = [
        {"video": "a.png", "num_frames": 1},
        {"video": "b.mp4", "num_frames": 5},
        {"video": "c.mp4", "num_frames": 40},
    ]
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("\n".join(json.dumps({**row, "fps": 8, "caption": "a clip"}) for row in rows))
    params = f"video_size: [32, 32], max_num_frames: 9, fps: 8, skip_frms_num: 0, data_dir: {manifest}"
    rule = f"{kind}: {{max_tokens: 60}}"
    assert planned_sizes(f"data.params={{{params}, {rule}}}") == [1, 2, 3]
    assert planned_sizes(f"data.params={{{params}, {rule}, short_clips: pad}}") == [3, 3, 3]
    target = "target: data_video.SFTDataset, params:"
    sets = f"a: {{{target} {{{params}}}}}, b: {{{target} {{{params}, short_clips: pad}}}}"
    mixture = f"data={{target: sat.data.mixture.Mixture, params: {{sets: {{{sets}}}, {rule}}}}}"
    assert planned_sizes(mixture) == [1, 2, 3, 3, 3, 3]
    plain, *_ = take_plan(load_config([], [f"data={{{target} {{{params}}}}}"])["data"])
    assert "short_clips" not in plain["params"]  # batches of clips need one length
