"""Folders and manifests become an index; what is wrong is told with its place."""

import json
import pickle
import time

import pytest

from sat.data.manifest import scan
from sat.data.quarantine import BadClip
from sat.data.video import write_mp4
from sat.errors import DataError
from tests.data.numbered import numbered_frames


def touch(folder, *names):
    """Files without content: enough where no header is read."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a caption\n" if path.suffix == ".txt" else "")


def listing(index):
    """(key, caption) of each clip."""
    return [(index[number].key, index[number].caption()) for number in range(len(index))]


def look(folder, **options):
    return scan(folder, **{"read_headers": False, **options})


def test_the_released_layout_is_found_at_any_depth(make_set):
    folder = make_set(2)
    touch(folder, "b/videos/x/9.MP4", "b/labels/x/9.txt")
    assert listing(look(folder)) == [
        ("set/b/videos/x/9.MP4", "a caption"),
        ("set/videos/0.mp4", "clip number 0"),
        ("set/videos/1.mp4", "clip number 1"),
    ]


@pytest.mark.parametrize(
    ("video", "caption"),
    [
        ("videos/1.mp4", "labels/1.txt"),
        ("videos_480p/1.mp4", "labels_480p/1.txt"),
        ("videos/my videos 1.mp4", "labels/my videos 1.txt"),
        ("videos/1.mp4", "videos/1.txt"),
        ("1.mp4", "1.txt"),
        ("a.b/1.v2.webm", "a.b/1.v2.txt"),
        ("photo.PNG", "photo.txt"),
    ],
)
def test_where_a_caption_may_stand(tmp_path, video, caption):
    touch(tmp_path, video, caption)
    assert listing(look(tmp_path)) == [(f"{tmp_path.name}/{video}", "a caption")]


def test_the_folder_given_may_be_the_one_called_videos(make_set):
    assert [caption for _, caption in listing(look(make_set(2) / "videos"))] == ["clip number 0", "clip number 1"]


def test_hidden_files_other_files_and_circles_are_passed_over(tmp_path):
    touch(tmp_path, "1.mp4", "1.txt", "._1.mp4", ".cache/2.mp4", "notes.md", "3.json")
    (tmp_path / "again").symlink_to(tmp_path)
    assert [key for key, _ in listing(look(tmp_path))] == [f"{tmp_path.name}/1.mp4"]


def test_linked_folders_are_followed(tmp_path):
    touch(tmp_path / "disk", "1.mp4", "1.txt")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "videos").symlink_to(tmp_path / "disk")
    assert [key for key, _ in listing(look(tmp_path / "set"))] == ["set/videos/1.mp4"]


def write_manifest(folder, *rows):
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_manifest_gives_paths_captions_and_keys_of_its_own(tmp_path):
    rows = (
        {"video": "a/1.mp4", "caption": " a ünïcode text ", "source": {"licence": "CC0"}},
        "",
        {"video": str(tmp_path / "b" / "2.mp4"), "caption": "b", "num_frames": 9, "fps": 8},
    )
    index = look(write_manifest(tmp_path, *rows))
    assert listing(index) == [(f"{tmp_path.name}/a/1.mp4", "a ünïcode text"), (f"{tmp_path.name}/b/2.mp4", "b")]
    assert index[0].path == tmp_path / "a/1.mp4" and index[0].row["source"] == {"licence": "CC0"}


def test_a_folder_and_its_manifest_name_clips_alike(make_set):
    folder = make_set(1)
    manifest = write_manifest(folder, {"video": "videos/0.mp4", "caption": "clip number 0"})
    assert listing(look(manifest)) == listing(look(folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "1.mp4", "caption": "a"}, "line 3: no 'video' among its keys: path, caption"),
        ({"video": "1.mp4", "text": "a"}, "line 3: no 'caption' among its keys: video, text"),
        ({"video": "", "caption": "a"}, "line 3: 'video' is ''; give a path"),
        ({"video": 7, "caption": "a"}, "line 3: 'video' is 7; give a path"),
        (
            {"video": "../1.mp4", "caption": "a"},
            r"line 3: 'video' is '../1.mp4', which is not below .*; move the manifest to where all clips are below it, "
            "or set data.params.root to such a folder",
        ),
        ({"video": "a/../../1.mp4", "caption": "a"}, "line 3: 'video' is 'a/../../1.mp4', which is not below"),
        ({"video": "/etc/1.mp4", "caption": "a"}, "line 3: 'video' is '/etc/1.mp4', which is not below"),
        ({"video": "1.mp4", "caption": ["a"]}, r"line 3: 'caption' is \['a'\]; give a text"),
        ({"video": "1.mp4", "caption": "a", "fps": "8"}, "line 3: 'fps' is '8'; give a number above 0"),
        ({"video": "1.mp4", "caption": "a", "num_frames": 0}, "line 3: 'num_frames' is 0; give a number above 0"),
        ("{'video': '1.mp4'}", "line 3: not JSON"),
        ('"1.mp4"', "line 3: not a JSON object"),
    ],
)
def test_wrong_rows_are_named_by_file_and_line(tmp_path, row, message):
    path = write_manifest(tmp_path, {"video": "0.mp4", "caption": "a"}, "", row)
    with pytest.raises(DataError, match=f"{path} {message}"):
        look(path)
    index = look(path, strict=False)
    (dropped,) = index.dropped
    assert len(index) == 1 and dropped.key == f"{path} line 3" and dropped.reason == "wrong row"


def test_a_root_says_where_the_clips_of_a_manifest_lie(tmp_path):
    (tmp_path / "lists").mkdir()
    rows = ({"video": "a..b/1.mp4", "caption": "a"}, {"video": str(tmp_path / "c/../2.mp4"), "caption": "b"})
    index = look(write_manifest(tmp_path / "lists", *rows), root=tmp_path)
    assert listing(index) == [(f"{tmp_path.name}/a..b/1.mp4", "a"), (f"{tmp_path.name}/2.mp4", "b")]
    assert index[1].path == tmp_path / "2.mp4"


def test_another_key_may_be_the_caption(tmp_path):
    path = write_manifest(tmp_path, {"video": "1.mp4", "caption": "short", "long": "a long text"})
    assert listing(look(path, caption_key="long")) == [(f"{tmp_path.name}/1.mp4", "a long text")]
    with pytest.raises(DataError, match="line 1: no 'dense' among its keys: video, caption, long"):
        look(path, caption_key="dense")


def test_what_is_not_strict_may_drop_every_clip(tmp_path):
    touch(tmp_path, "1.mp4")
    index = look(tmp_path, strict=False)
    assert len(index) == 0 and index.dropped[0].reason == "no caption"


def test_captions_may_be_left_out_on_request(tmp_path):
    touch(tmp_path, "1.mp4")
    assert listing(look(tmp_path, require_caption=False)) == [(f"{tmp_path.name}/1.mp4", "")]
    path = write_manifest(tmp_path, {"video": "1.mp4"})
    assert listing(look(path, require_caption=False)) == [(f"{tmp_path.name}/1.mp4", "")]


@pytest.mark.parametrize(
    ("names", "where", "message"),
    [
        ([], "nowhere", "no data at .*nowhere: give a folder with clips, or a manifest that ends in .jsonl"),
        (["list.csv"], "list.csv", "no data at .*list.csv: give a folder"),
        (["a.txt"], "", r"no clips in .*: looked for files that end in .mp4 .avi .mkv .webm .mov .m4v .png"),
        (["m.jsonl"], "m.jsonl", r'no clips in .*: looked for lines like {"video": '),
        (
            ["1.mp4"],
            "",
            "no clip can be used\n.*0 of 1 clips kept\n +1 dropped, no caption: e.g. .*1.mp4 .looked for 1",
        ),
    ],
)
def test_nothing_found_says_what_was_looked_for(tmp_path, names, where, message):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        look(tmp_path / where)


def test_the_table_counts_clips_by_reason(make_set):
    folder = make_set(6)
    (folder / "labels" / "1.txt").unlink()
    (folder / "labels" / "2.txt").write_text("\n")
    (folder / "labels" / "3.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "videos" / "4.mp4").write_bytes(b"not a video")
    write_mp4(folder / "videos" / "5.mp4", numbered_frames(3), 8)

    def check(clip, num_frames, fps):
        if num_frames < 10:
            raise BadClip(f"{num_frames} frames at {fps}", reason="too short")

    index = scan(folder, check=check, num_workers=2)
    assert index.summary().splitlines() == [
        f"{folder}: 1 of 6 clips kept",
        "        2 dropped, no caption: e.g. set/videos/1.mp4 (looked for labels/1.txt and videos/1.txt)",
        index.summary().splitlines()[2],
        "        1 dropped, unreadable: e.g. set/videos/4.mp4 "
        f"({folder}/videos/4.mp4 cannot be read: Invalid data found when processing input)",
        "        1 dropped, too short: e.g. set/videos/5.mp4 (3 frames at 8.0)",
    ]
    assert "1 dropped, unreadable caption: e.g. set/videos/3.mp4" in index.summary()
    row = index[0].row
    assert [row[key] for key in ("num_frames", "fps", "height", "width", "duration")] == [20, 8, 32, 40, 2.5]


def test_a_manifest_can_be_checked_without_opening_files(tmp_path):
    path = write_manifest(
        tmp_path,
        {"video": "1.mp4", "caption": "a", "num_frames": 3, "fps": 8},
        {"video": "2.mp4", "caption": "a"},
    )

    def check(clip, num_frames, fps):
        raise BadClip("no", reason="too short")

    assert [clip.key for clip in look(path, check=check).dropped] == [f"{tmp_path.name}/1.mp4"]


def test_a_large_manifest_opens_quickly_and_stays_small(tmp_path):
    path = tmp_path / "manifest.jsonl"
    row = '{"video": "videos/part-%d/%d.mp4", "caption": "a caption of about the usual length, in one line of text"}\n'
    num_rows = 50_000
    with path.open("w") as file:
        file.writelines(row % (number % 100, number) for number in range(num_rows))
    start = time.perf_counter()
    index = look(path)
    assert time.perf_counter() - start < 10  # measured 0.6 s
    assert len(index) == num_rows and index[num_rows - 1].key.endswith("/videos/part-99/49999.mp4")
    assert len(pickle.dumps(index)) < path.stat().st_size + 9 * num_rows + 10_000
