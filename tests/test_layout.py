"""Folders and manifests as labelled videos in subsets, and the record of checked videos."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tvit_cli.data import layout as layout_module
from tvit_cli.data.layout import match_labels, read_layout
from tvit_cli.engine import dataset
from tvit_cli.engine.dataset import CHECKED, check_videos, find_data, unreadable_videos
from tvit_cli.errors import DataError

UCF101 = r"_g(\d+)_"


def place(root, classes):
    """Files that look like videos from outside, which is all that a layout looks at."""
    for folder, names in classes.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).write_bytes(b"x")
    return root


def read(root, *, pattern=UCF101, val="none", test="none", need_test=False):
    return read_layout(root, group_pattern=pattern, val_groups=val, test_groups=test, need_test=need_test)


def ucf101(root, *, groups=25, clips=2, classes=("Archery", "Bowling")):
    return place(
        root,
        {
            name: [f"v_{name}_g{g:02}_c{c:02}.avi" for g in range(1, groups + 1) for c in range(1, clips + 1)]
            for name in classes
        },
    )


def groups_of(layout, subset):
    return sorted({str(video.group) for video in layout.subset(subset)})


def test_group_pattern_that_would_never_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(layout_module, "MOST_SECONDS", 1.0)
    place(tmp_path, {"walk": ["a" * 60 + "!.avi"], "run": ["b.avi"]})
    with pytest.raises(DataError, match=r'--group-pattern "\(a\+\)\+\$": matching 2 file names takes more'):
        read(tmp_path, pattern="(a+)+$")


# Folders


def test_class_folders_give_labels_names_and_groups(tmp_path):
    layout = read(place(tmp_path, {"walk": ["v_g01_c01.avi", "v_g02_c01.MP4"], "run": ["v_g01_c02.avi"]}))
    assert layout.labels == ("run", "walk")
    assert [(v.name, v.label, v.subset, v.group) for v in layout.videos] == [
        ("run/v_g01_c02.avi", "run", "train", "01"),
        ("walk/v_g01_c01.avi", "walk", "train", "01"),
        ("walk/v_g02_c01.MP4", "walk", "train", "02"),
    ]
    assert all(video.path == tmp_path / video.name for video in layout.videos)
    assert layout.counts() == {"train": 3, "val": 0, "test": 0}
    assert layout.notes == ()


@pytest.mark.parametrize("folder", ["videos", "UCF-101"])
def test_class_folders_are_found_one_folder_down(folder, tmp_path):
    ucf101(tmp_path / folder, groups=3)
    if folder == "videos":  # beside it lie other things
        place(tmp_path, {"ucfTrainTestlist": ["classInd.txt"]})
    layout = read(tmp_path)
    assert layout.labels == ("Archery", "Bowling")
    assert layout.root == tmp_path
    assert layout.videos[0].name == f"{folder}/Archery/v_Archery_g01_c01.avi"


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("training", "validation", "testing"), ("Train", "valid", "Test")]
)
def test_subset_folders_are_taken_as_they_are(names, tmp_path):
    for group, name in enumerate(names, start=1):
        place(tmp_path / name, {c: [f"v_{c}_g0{group}_c01.avi"] for c in ("run", "walk")})
    layout = read(tmp_path, val="auto", test="auto", need_test=True)
    assert layout.counts() == {"train": 2, "val": 2, "test": 2}
    assert groups_of(layout, "test") == ["03"]
    assert layout.notes == ()


def test_without_a_val_folder_groups_of_train_become_val_and_test_stays(tmp_path):
    ucf101(tmp_path / "train", groups=18)
    place(tmp_path / "test", {c: [f"v_{c}_g19_c01.avi"] for c in ("Archery", "Bowling")})
    layout = read(tmp_path, val="auto", test="auto")
    assert len(groups_of(layout, "val")) == 3  # 15 % of 18
    assert groups_of(layout, "test") == ["19"]


def test_a_class_called_train_is_a_class(tmp_path):
    layout = read(place(tmp_path, {"train": ["a_g01_.avi"], "car": ["b_g01_.avi"], "test": ["c_g01_.avi"]}))
    assert layout.labels == ("car", "test", "train")


def test_folders_beside_subset_folders_are_noted(tmp_path):
    ucf101(tmp_path / "train", groups=2)
    place(tmp_path, {"annotations": ["a.txt"]})
    assert "not read: annotations" in read(tmp_path).notes[0]


def test_hidden_files_are_passed_over_and_odd_ones_counted(tmp_path):
    place(
        tmp_path,
        {"run": ["a_g01_.avi", "._a_g01_.avi", ".DS_Store"], "walk": ["b_g01_.avi", "notes.txt", "b.srt"]},
    )
    place(tmp_path, {".cache": ["x.avi"], "__MACOSX": ["y.avi"]})
    layout = read(tmp_path)
    assert len(layout.videos) == 2
    assert "2 entries are not read" in layout.notes[0] and "walk/b.srt, walk/notes.txt" in layout.notes[0]
    (tmp_path / "walk" / "b.srt").unlink()
    assert "1 entry is not read" in read(tmp_path).notes[0]


def test_classes_that_differ_in_case_only_are_one(tmp_path):
    place(tmp_path / "train", {"HandStandPushups": ["v_g01_.avi", "v_g02_.avi"], "Archery": ["v_g03_.avi"]})
    place(tmp_path / "test", {"HandstandPushups": ["v_g04_.avi"], "Archery": ["v_g05_.avi"]})
    layout = read(tmp_path)
    assert layout.labels == ("Archery", "HandStandPushups")
    assert {video.label for video in layout.subset("test")} == set(layout.labels)
    assert "HandStandPushups and HandstandPushups are read as one class, HandStandPushups" in layout.notes[0]


# Groups


@pytest.mark.parametrize(
    ("pattern", "file", "group"),
    [
        (UCF101, "v_Archery_g07_c01.avi", "07"),
        (r"^([a-z]+)_", "daria_bend.avi", "daria"),
        (r"(take|scene)(?P<group>\d+)", "scene12.avi", "12"),
        (r"g\d+", "v_g07_c01.avi", "g07"),
    ],
    ids=["first group", "person", "named group", "whole match"],
)
def test_a_group_is_read_off_the_file_name(pattern, file, group, tmp_path):
    layout = read(place(tmp_path, {"run": [file], "walk": [file]}), pattern=pattern)
    assert {video.group for video in layout.videos} == {group}


def test_no_group_is_ever_in_two_subsets(tmp_path):
    layout = read(ucf101(tmp_path), val="auto", test="auto")
    homes = {}
    for video in layout.videos:
        homes.setdefault(video.group, set()).add(video.subset)
    assert len(homes) == 25
    assert all(len(subsets) == 1 for subsets in homes.values())
    # 20 % of 25, 15 % of 20
    assert [len(groups_of(layout, name)) for name in ("test", "val", "train")] == [5, 3, 17]


def test_groups_are_spread_evenly_and_the_same_each_time(tmp_path):
    first = read(ucf101(tmp_path), test="5")
    assert groups_of(first, "test") == ["03", "08", "13", "18", "23"]
    assert read(tmp_path, test="5").videos == first.videos
    assert "5 of 25 groups (20 videos) held out of train as test: 03, 08, 13, 18, 23" in first.notes[0]


def test_groups_are_held_out_by_name(tmp_path):
    files = [f"{person}_x.avi" for person in ("daria", "denis", "eli", "moshe")]
    root = place(tmp_path, {"run": files, "walk": files})
    layout = read(root, pattern="^([a-z]+)_", test="daria, moshe", val="eli")
    assert groups_of(layout, "test") == ["daria", "moshe"]
    assert groups_of(layout, "val") == ["eli"]
    assert groups_of(layout, "train") == ["denis"]


def test_a_number_with_a_leading_zero_is_a_name(tmp_path):
    assert groups_of(read(ucf101(tmp_path), test="04"), "test") == ["04"]
    assert len(groups_of(read(tmp_path, test="4"), "test")) == 4


def test_groups_whose_names_hold_commas_are_held_out_by_a_tuple_of_names(tmp_path):
    files = ["a, b.avi", "none.avi", "3.avi", "d.avi"]  # no pattern matches: each is a group of its own
    root = place(tmp_path, {"run": files, "walk": files})
    first = read_layout(
        root, group_pattern="$^", test_groups=("run/a, b.avi",), val_groups=("walk/none.avi",)
    )
    assert first.held_out == {"test": ("run/a, b.avi",), "val": ("walk/none.avi",)}
    assert first.counts() == {"train": 6, "val": 1, "test": 1}
    nothing = read_layout(root, group_pattern="$^", test_groups=(), val_groups=())
    assert nothing.counts() == {"train": 8, "val": 0, "test": 0}
    (root / "run" / "a, b.avi").unlink()
    before = ("run/a, b.avi", "run/d.avi")
    left = read_layout(root, group_pattern="$^", test_groups=before, val_groups=())
    assert left.held_out["test"] == ("run/d.avi",)
    assert "1 of 2 groups held out as test are gone: run/a, b.avi." in left.notes


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        *(
            ({"val": typed}, r'--val-groups ".*": names no group\. To hold none out, give none')
            for typed in (",", " , ", "")
        ),
        ({"test": "03", "val": "03"}, '--val-groups: no group "03" in train'),
        ({"test": "3"}, r"--test-groups 3: train has 3 groups, of which 2"),
    ],
)
def test_impossible_choices_of_groups_are_refused(tmp_path, choice, sentence):
    with pytest.raises(DataError, match=sentence):
        read(ucf101(tmp_path, groups=3), **choice)


def test_an_unknown_group_is_refused_with_the_known_ones(tmp_path):
    root = place(tmp_path, {"run": ["daria_x.avi", "eli_x.avi"], "walk": ["daria_y.avi", "eli_y.avi"]})
    with pytest.raises(DataError, match=r'--test-groups: no group "dariya".*mean daria\?.*daria, eli'):
        read(root, pattern="^([a-z]+)_", test="dariya")


def test_holding_out_leaves_each_class_a_video_to_train_on(tmp_path):
    # Group 3, the middle one, has all videos of `rare`: an even spread would take it.
    place(
        tmp_path, {"common": [f"v_g{g:02}_.avi" for g in range(1, 6)], "rare": ["w_g03_a.avi", "w_g03_b.avi"]}
    )
    layout = read(tmp_path, test="auto")
    assert groups_of(layout, "test") == ["04"]


def test_nothing_is_held_out_where_nothing_can_be_spared(tmp_path):
    layout = read(place(tmp_path, {"run": ["a_g01_.avi"], "walk": ["b_g01_.avi"]}), val="auto", test="auto")
    assert layout.counts() == {"train": 2, "val": 0, "test": 0}
    assert sum("no group can be spared" in note for note in layout.notes) == 2


def test_split_without_group_pattern_warns_of_data_leakage(tmp_path):
    names = [f"{number}.avi" for number in range(10)]
    layout = read(place(tmp_path, {"run": names, "walk": names}), val="auto", test="auto")
    assert layout.counts() == {"train": 14, "val": 2, "test": 4}
    assert {video.group for video in layout.videos} == {None}
    assert "No video matches the group pattern" in layout.notes[0]
    assert "leak" in layout.notes[0]
    for subset in ("val", "test"):
        assert {video.label for video in layout.subset(subset)} == {"run", "walk"}


PEOPLE, ACTIONS = ("anna", "ben", "cleo"), ("jump", "run", "walk")


@pytest.mark.parametrize(
    ("name", "pattern", "groups"),
    [
        ("{person}_{action}.avi", "'^([a-z]+)_'", "3 groups: anna, ben, cleo"),
        ("{action}_{person}.avi", "'[-_ ]([A-Za-z]+)\\.\\w+$'", "3 groups: anna, ben, cleo"),
        ("person{i:02}_{action}_d1.avi", "'^([A-Za-z]+\\d+)_'", "3 groups: person00, person01, person02"),
        ("S001C001P{i:03}R001A001.avi", "'P\\d+'", "3 groups: P000, P001, P002"),
        ("{action}_{i}.avi", None, ""),  # a number is no recording, the class no group
    ],
)
def test_group_patterns_that_fit_the_names_are_proposed(name, pattern, groups, tmp_path):
    classes = {a: [name.format(person=p, action=a, i=i) for i, p in enumerate(PEOPLE)] for a in ACTIONS}
    notes = read(place(tmp_path, classes)).notes
    assert notes[0].count("--group-pattern") == 1
    assert "Give --group-pattern." in notes[0] if pattern is None else f"{pattern}  {groups}" in notes[0]


def test_a_group_pattern_that_divides_nothing_gets_proposals(tmp_path):
    root = place(tmp_path, {action: [f"{person}_{action}.avi" for person in PEOPLE] for action in ACTIONS})
    (note,) = read(root, pattern="a(v)i").notes
    assert "puts all videos into one group, v." in note and "'^([a-z]+)_'" in note


def test_videos_held_out_one_by_one_are_called_videos(tmp_path):
    root = place(tmp_path, {"run": [f"{n}.avi" for n in range(9)], "walk": ["9.avi", "10.avi"]})
    assert read(root, test="5").notes[1].startswith("5 of 11 videos held out of train as test: run/")
    assert read(root, test="5").notes[1].endswith(" and 2 more.")


def test_videos_that_do_not_match_are_counted(tmp_path):
    root = place(tmp_path, {"run": ["v_g01_.avi", "odd.avi"], "walk": ["v_g01_.avi", "v_g02_.avi"]})
    assert "1 of 4 videos do not match the group pattern" in read(root).notes[0]


# What cannot be used


def test_a_missing_folder_is_named_with_its_likeliest_neighbour(tmp_path):
    ucf101(tmp_path / "ucf101", groups=1)
    with pytest.raises(DataError, match=r"ucf11: no such folder\. Did you mean ucf101\?"):
        read(tmp_path / "ucf11")
    with pytest.raises(DataError, match="no such folder"):
        read(tmp_path / "nowhere" / "deep")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "no videos found"),
        ({"a/b/c": ["x.avi"]}, "no videos found in class folders, but deeper, as a/b/c/x.avi"),
        (
            {"walk/clip1": ["1.jpg", "2.jpg"]},
            "pictures, but no videos. Join the frames of a clip to a video (ffmpeg",
        ),
        ({".": ["x.avi", "y.avi"]}, "videos, but no class folders"),
        ({"train": ["x.avi"], "test": ["y.avi"]}, "videos, but no class folders"),
        ({"run": ["x.avi"], "walk": []}, "walk: a class folder without videos; it contains nothing"),
        (
            {"run": ["x.avi"], "walk": ["y.txt"]},
            "walk: a class folder without videos; it contains only y.txt",
        ),
        ({"train/run": ["x.avi"], "train/walk": []}, "walk: a class folder without videos"),
        ({"run": ["x.avi", "y.avi"]}, 'one class only ("run")'),
        (
            {"train/run": ["x.avi"], "train/walk": ["y.avi"], "val/jump": ["z.avi"]},
            "jump in val, but no video",
        ),
    ],
)
def test_what_cannot_be_used_is_named(classes, message, tmp_path):
    with pytest.raises(DataError) as caught:
        read(place(tmp_path, classes))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_needed_test_subset_is_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"no test subset\. Add a folder test/.*--test-groups"):
        read(ucf101(tmp_path), need_test=True)
    assert read(tmp_path, test="auto", need_test=True).counts()["test"] > 0


# Manifests


def manifest(folder, text, *, encoding="utf-8"):
    place(folder, {"clips": ["a_g01_.avi", "b_g02_.avi", "c_g03_.avi", "d, e.avi"]})
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_manifest_gives_labels_subsets_and_groups(delimiter, encoding, newline, tmp_path):
    rows = [
        ["path", "Label", "subset", "group", "remark"],
        ["clips/a_g01_.avi", "run", "training", "", "x"],
        ["clips/b_g02_.avi", "walk", "train", "ann", ""],
        [str(tmp_path / "clips" / "c_g03_.avi"), "walk", "test"],
        [],
    ]
    path = manifest(tmp_path, newline.join(delimiter.join(row) for row in rows), encoding=encoding)
    layout = read(path)
    assert layout.root == tmp_path
    assert [(v.name, v.label, v.subset, v.group) for v in layout.videos] == [
        (str(tmp_path / "clips" / "c_g03_.avi"), "walk", "test", "03"),
        ("clips/a_g01_.avi", "run", "train", "01"),
        ("clips/b_g02_.avi", "walk", "train", "ann"),
    ]
    assert all(video.path.is_file() for video in layout.videos)


def test_a_manifest_without_subsets_is_split_like_folders(tmp_path):
    rows = ['"clips/d, e.avi",run', "clips/a_g01_.avi,run", "clips/b_g02_.avi,walk", "clips/c_g03_.avi,walk"]
    path = manifest(tmp_path, "\n".join(["path,label", *rows]))
    layout = read(path, test="03")
    assert layout.counts() == {"train": 3, "val": 0, "test": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'line 1: no column "path". The header has nothing'),
        ("clip_path,label\nx,y\n", 'line 1: no column "path". The header has clip_path, label'),
        ("path,class\nx,y\n", 'no column "label"'),
        ("path,label\n", "no rows below the header"),
        ("path,label\nclips/a_g01_.avi,run\nclips/none.avi,run\n", "line 3 names"),
        ("path,label\nclips/a_g01_.avi,\n", "line 2 has no label"),
        ("path,label\n,run\n", "line 2 has no path"),
        (
            "path,label\nclips/a_g01_.avi,run\nclips/b_g02_.avi,run\n./clips/a_g01_.avi,walk\n",
            "as line 2 does",
        ),
        ("path,label,subset\nclips/a_g01_.avi,run,tran\n", 'line 2 has subset "tran"'),
        ("path,label,subset\nclips/a_g01_.avi,run,train\nclips/b_g02_.avi,run,\n", 'line 3 has subset ""'),
        ("path,label\n" + "x.avi,run\ny.avi,run\n" * 5, "and 5 more"),
        ('path,label\n"clips/a_g01_.avi,run\n', "no CSV manifest"),
    ],
)
def test_a_faulty_manifest_is_refused_by_line(text, message, tmp_path):
    path = manifest(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_video_is_no_manifest(tmp_path):
    path = tmp_path / "video.avi"
    path.write_bytes(b"RIFF\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="no CSV manifest"):
        read(path)


# Readable or not


def test_unreadable_videos_are_named_with_their_reasons(tmp_path, make_classes):
    root = make_classes(tmp_path, {"run": ["a.avi", "b.avi"], "walk": ["c.avi", "d.avi"]})
    (root / "run" / "b.avi").write_bytes(b"")
    (root / "walk" / "d.avi").write_text("text")
    seen = []
    reasons = check_videos(
        read(root).videos, workers=2, progress=lambda done, total: seen.append((done, total))
    )
    assert list(reasons) == ["run/b.avi", "walk/d.avi"]
    assert reasons["run/b.avi"].startswith("the file is empty")
    assert str(tmp_path) not in "".join(reasons.values())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.real
def test_weizmann_is_split_by_people(real_data):
    layout = read(real_data / "weizmann", pattern="^([a-z]+)_", test="daria,eli,moshe")
    assert layout.counts() == {"train": 60, "val": 0, "test": 30}
    assert len(layout.labels) == 10
    assert check_videos(layout.videos, workers=2) == {}


# Official splits


def read_split(root, split):
    return read_layout(root, group_pattern=UCF101, val_groups="none", test_groups="auto", split=split)


def test_the_official_split_lists_are_followed(tmp_path):
    names = [f"v_HandStandPushups_g{g:02d}_c01.avi" for g in (1, 2, 8, 9)]
    place(
        tmp_path / "videos",
        {"HandstandPushups": names, "Run": [n.replace("HandStandPushups", "Run") for n in names]},
    )
    lists = tmp_path / "splits"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"1 HandstandPushups\r\n2 Run\n")
    for split, tested in ((1, (1, 2)), (2, (8,)), (3, (9,))):
        for side in ("train", "test"):
            rows = [
                f"{c}/v_{'HandStandPushups' if c != 'Run' else c}_g{g:02d}_c01.avi"
                for c in ("HandstandPushups", "Run")
                for g in (1, 2, 8)
                if (g in tested) == (side == "test")
            ]
            (lists / f"{side}list{split:02d}.txt").write_text(
                "\n".join(rows or ["Run/v_Run_g99_c01.avi"]) + "\n"
            )
    one = read_split(tmp_path, 1)
    assert {v.group for v in one.subset("test")} == {"01", "02"} and one.counts()["train"] == 2
    two = read_split(tmp_path, 2)
    assert {v.group for v in two.subset("test")} == {"08"} and two.counts() == {
        "train": 4,
        "val": 0,
        "test": 2,
    }
    assert any("2 videos are in no list" in note for note in two.notes)
    assert any("Official split 2" in note for note in two.notes)


def test_one_class_in_two_ways_to_write_its_accent_is_one_class(tmp_path):
    composed, apart = "Caf\u00e9", "Cafe\u0301"  # as macOS writes it
    files = ["daria_1.avi", "eli_1.avi"]
    place(tmp_path / "data" / "train", {composed: files, "Run": files})
    root = place(tmp_path / "data" / "test", {apart: files, "Run": files}).parent
    layout = read(root, test="none", val="none")
    assert layout.labels in ((composed, "Run"), (apart, "Run"))
    assert {video.label for video in layout.subset("test")} == set(layout.labels)
    again = match_labels(layout, ["CAFE\u0301", "run", "Walk"])
    assert again.labels == ("CAFE\u0301", "run") and {video.label for video in again.videos} == set(
        again.labels
    )


def test_default_data_set_is_the_only_one_or_ucf101(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(tmp_path / "data" / "mine", {"run": ["a.avi"]})
    assert find_data(None) == Path("data/mine")
    place(tmp_path / "data" / "yours", {"run": ["a.avi"]})
    with pytest.raises(DataError, match="No data set chosen: data/ holds mine, yours"):
        find_data(None)
    place(tmp_path / "data" / "ucf101", {"run": ["a.avi"]})
    assert find_data(None) == Path("data/ucf101")


def test_without_data_own_videos_and_the_quickstart_are_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data/ is empty or missing") as error:
        find_data(None)
    own, quickstart, ucf101 = "--path-to-data my_videos", "--preset quickstart", "ucf101  (6.96 GB)"
    assert 0 < str(error.value).find(own) < str(error.value).find(quickstart) < str(error.value).find(ucf101)


def test_failed_download_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = tmp_path / "data" / "weizmann"
    (failed / "archives").mkdir(parents=True)
    (failed / "archives" / ".bend.zip.lock").touch()
    (failed / ".incoming").mkdir()
    (failed / ".incoming" / "a.avi").touch()
    place(tmp_path / "data" / "mine", {"run": ["a.avi"]})
    assert find_data(None) == Path("data/mine")
    for name, fault in (
        ("weizmann", "no such folder or file"),
        ("data/weizmann", "no videos in this folder"),
    ):
        with pytest.raises(DataError, match=f"{fault}.*Fetch it: tvit download weizmann"):
            find_data(name)
    place(tmp_path / "my_videos", {"run": ["a.avi"]})
    with pytest.raises(DataError, match=r"my_vids: no such folder or file\. Did you mean my_videos\?"):
        find_data("my_vids")


Make = Callable[..., Path]


@pytest.fixture
def videos(make_video, tmp_path):
    for name in ("a", "b", "c"):
        make_video(tmp_path / "run" / f"{name}_g01_.avi", frames=2)
    make_video(tmp_path / "walk" / "d_g01_.avi", frames=2)
    (tmp_path / "run" / "bad_g01_.avi").write_text("text")
    return list(read_layout(tmp_path, group_pattern="_g(..)_", val_groups="none", test_groups="none").videos)


@pytest.fixture
def tried(monkeypatch):
    """Names of the files that were opened since it was last cleared."""
    names = []
    real = dataset.decode_first
    monkeypatch.setattr(dataset, "decode_first", lambda path: names.append(path.name[0]) or real(path))
    yield names


def check(videos, folder):
    return unreadable_videos(videos, folder, workers=2)


def test_only_what_could_not_be_read_is_tried_again(videos, tried, tmp_path):
    first = check(videos, tmp_path)
    assert list(first) == ["run/bad_g01_.avi"]
    assert sorted(tried) == ["a", "b", "b", "c", "d"]
    tried.clear()
    assert check(videos, tmp_path) == first
    assert tried == ["b"]
    assert {path.name for path in tmp_path.iterdir()} == {CHECKED, "run", "walk"}
    again = read_layout(tmp_path, group_pattern="_g(..)_", val_groups="none", test_groups="none")
    assert list(again.videos) == videos


def test_a_changed_video_is_tried_again(videos, tried, make_video, tmp_path):
    check(videos, tmp_path)
    paths = {video.path.name[0]: video.path for video in videos if "bad" not in video.name}
    times = paths["a"].stat()
    make_video(paths["a"], frames=9)
    os.utime(paths["a"], ns=(times.st_atime_ns, times.st_mtime_ns))  # another size at the same time
    paths["b"].write_bytes(bytes(paths["b"].stat().st_size))  # another time at the same size
    tried.clear()
    assert sorted(check(videos, tmp_path)) == ["run/b_g01_.avi", "run/bad_g01_.avi"]
    assert sorted(tried) == ["a", "b", "b"]
    tried.clear()
    away = paths["c"].rename(tmp_path / "c.avi")
    assert "no such file" in check(videos, tmp_path)["run/c_g01_.avi"]
    assert sorted(tried) == ["b", "b", "c"]
    tried.clear()
    away.rename(paths["c"])
    assert sorted(check(videos, tmp_path)) == ["run/b_g01_.avi", "run/bad_g01_.avi"]
    assert sorted(tried) == ["b", "b"]  # what comes back as it was is still known


def test_another_decoder_tries_all_again(videos, tried, tmp_path, monkeypatch):
    check(videos, tmp_path)
    monkeypatch.setattr("av.__version__", "0.0")
    tried.clear()
    check(videos, tmp_path)
    assert len(tried) == 5


@pytest.mark.parametrize("text", ["", "{", "[]", '{"decoder": 1}', '{"videos": {}}'])
def test_spoilt_notes_are_made_anew(text, videos, tried, tmp_path):
    (tmp_path / CHECKED).write_text(text)
    check(videos, tmp_path)
    assert len(tried) == 5
    assert len(json.loads((tmp_path / CHECKED).read_text())["videos"]) == 4


def test_a_folder_that_may_not_be_written_to_is_no_fault_and_left_alone(videos, tmp_path, monkeypatch):
    tmp_path.chmod(0o555)
    try:
        assert list(check(videos, tmp_path)) == ["run/bad_g01_.avi"]
    finally:
        tmp_path.chmod(0o755)
    assert not (tmp_path / CHECKED).exists()

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert list(check(videos, tmp_path)) == ["run/bad_g01_.avi"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "walk"}


def test_new_clips_of_the_demo_set_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "make_motions", lambda root, **_: 1600)
    assert dataset.make_demo_data(tmp_path / "motions", lambda event: None) == 1600
