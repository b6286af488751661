"""The catalog of data sets, and UCF101's split lists."""

import os
from pathlib import Path, PurePosixPath

import pytest

from tvit_cli.data.archive_safety import Member
from tvit_cli.data.catalog import CATALOG, CanonicalNames, choose, find, take_clips, target_path, target_paths
from tvit_cli.data.dataset_folder import Selection
from tvit_cli.data.split_files import group_of, lists_from_groups, parse_split_lists, read_classes
from tvit_cli.errors import DataError, SettingsError

PUSHUPS = "videos/HandStandPushups/v_HandStandPushups_g01_c01.avi"


def test_known_sets_are_found_and_unknown_ones_get_near_names():
    assert [dataset.name for dataset in CATALOG] == ["ucf101", "ucf101-subset", "weizmann", "motions"]
    assert find("UCF101").clips == 13_320
    with pytest.raises(SettingsError, match=r"Did you mean ucf101"):
        find("ucf-101")
    with pytest.raises(SettingsError, match="Known: ucf101, ucf101-subset, weizmann, motions"):
        find("kinetics")


def test_catalog_holds_together():
    for dataset in CATALOG:
        for part in dataset.videos + dataset.splits:
            assert part.sources
            for source in part.sources:
                assert all(url.startswith("https://") for url in source.urls)
                assert source.sha256 is None or len(bytes.fromhex(source.sha256)) == 32
        names = [part.name for part in dataset.videos]
        assert len(set(names)) == len(names) and len(names) in (0, 1, dataset.classes)
    assert find("ucf101").bytes == 6_960_400_115 + 113_943
    assert find("weizmann").bytes is None


@pytest.mark.parametrize(
    ("member", "layout", "goes"),
    [
        ("UCF101/v_HandstandPushups_g01_c01.avi", "ucf101", PUSHUPS),
        ("UCF-101/handstandpushups/v_HandStandPushups_g01_c01.avi", "ucf101", PUSHUPS),
        ("UCF-101/Bowling/odd name.avi", "ucf101", "videos/Bowling/odd name.avi"),
        ("UCF-101/Bowling/Thumbs.db", "ucf101", None),
        ("__MACOSX/UCF-101/Bowling/v_Bowling_g01_c01.avi", "ucf101", None),
        ("UCF-101/Bowling/._v_Bowling_g01_c01.avi", "ucf101", None),
        ("S/val/Bowling/v_Bowling_g01_c01.avi", "subset folders", "videos/val/Bowling/v_Bowling_g01_c01.avi"),
        ("UCF101_subset/readme.avi", "subset folders", None),
        ("daria_bend.avi", "one class", "videos/part/daria_bend.avi"),
        ("a/Bowling/x.mp4", "class folders", "videos/Bowling/x.mp4"),
        ("x.mp4", "class folders", None),
        ("ucfTrainTestlist/classInd.txt", "lists", "splits/classInd.txt"),
    ],
)
def test_member_goes_to_its_class(member, layout, goes):
    names = CanonicalNames(["HandStandPushups"], ["v_HandStandPushups_g01_c01.avi"])
    placed = target_path(PurePosixPath(member), layout, part="part", names=names)
    assert placed == (PurePosixPath(goes) if goes else None)


def test_two_spellings_without_lists_make_one_class():
    names = ["UCF101/v_HandStandPushups_g01_c01.avi", "UCF101/v_HandstandPushups_g02_c01.avi"]
    members = [Member(index, name, 1) for index, name in enumerate(names)]
    placed = target_paths(members, "ucf101", part="p", names=CanonicalNames())
    assert {path.parent.name for path in placed.values()} == {"HandStandPushups"}


def test_members_that_would_become_one_file_are_refused():
    members = [Member(0, "x/A/a.avi", 1), Member(1, "y/A/a.avi", 1)]
    with pytest.raises(DataError, match=r"would both become videos/A/a\.avi"):
        target_paths(members, "class folders", part="p", names=CanonicalNames())
    with pytest.raises(DataError, match="nothing in the archive"):
        target_paths([Member(0, "readme.md", 1)], "ucf101", part="p", names=CanonicalNames())


def clips(action, groups=25, each=3):
    return [
        PurePosixPath(f"videos/{action}/v_{action}_g{group:02}_c{clip:02}.avi")
        for group in range(1, groups + 1)
        for clip in range(1, each + 1)
    ]


def test_few_clips_come_from_groups_far_apart():
    taken = take_clips(clips("A") + clips("B"), 5)
    assert sorted(path.name for path in taken if path.parent.name == "A") == [
        f"v_A_g{group:02}_c01.avi" for group in (1, 6, 11, 16, 21)
    ]
    assert len(taken) == 10
    assert len(take_clips(clips("A"), 30)) == 30
    assert len({group_of(path.name) for path in take_clips(clips("A"), 30)}) == 25
    assert take_clips(clips("A", 2), 100) == set(clips("A", 2))
    assert len(take_clips([PurePosixPath(f"videos/run/{name}_run.avi") for name in "abcde"], 2)) == 2


def test_class_selection_ignores_case_and_names_unknown_classes():
    paths = clips("Archery", 2) + clips("Bowling", 2)
    assert choose(paths, Selection(classes=("archery",))) == set(clips("Archery", 2))
    with pytest.raises(SettingsError, match=r"--classes archry: no such class\. Did you mean Archery"):
        choose(paths, Selection(classes=("archry",)))


def write_lists(folder, *, train, test, classes="1 A\r\n2 B\n"):
    folder.mkdir(exist_ok=True)
    for name, text in (("classInd", classes), ("trainlist01", train), ("testlist01", test)):
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def test_lists_are_read_with_any_line_ends_labels_and_case(tmp_path):
    folder = write_lists(
        tmp_path,
        train="A/v_A_g08_c01.avi 1\r\nb/v_B_g08_c01.avi 2\n\n",
        test="A/v_A_g01_c01.avi\r\nB/v_B_g01_c01.avi 2\r",
    )
    assert parse_split_lists(folder, 1) == {
        "train": [("A", "v_A_g08_c01.avi"), ("B", "v_B_g08_c01.avi")],
        "test": [("A", "v_A_g01_c01.avi"), ("B", "v_B_g01_c01.avi")],
    }


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        ("C/v_C_g08_c01.avi 1\n", "", r"line 1: .* names a class"),
        ("A/v_A_g08_c01.avi 2\n", "", "wrong label: A is 1"),
        ("A/x.avi 1\n", "A/x.avi\n", r"is in trainlist01\.txt too"),
    ],
)
def test_list_that_contradicts_is_named_by_its_line(tmp_path, train, test, says):
    with pytest.raises(DataError, match=says):
        parse_split_lists(write_lists(tmp_path, train=train, test=test), 1)


def test_missing_list_and_split_are_named(tmp_path):
    with pytest.raises(DataError, match=r"classInd\.txt: cannot be read"):
        parse_split_lists(tmp_path, 1)
    with pytest.raises(DataError, match="splits 1 to 3"):
        parse_split_lists(tmp_path, 4)
    write_lists(tmp_path, train="", test="", classes="Archery\n")
    with pytest.raises(DataError, match="line 1"):
        read_classes(tmp_path)


@pytest.mark.real
@pytest.mark.parametrize(("split", "train", "test"), [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_official_lists_are_read_and_follow_from_the_groups(split, train, test, tmp_path):
    root = os.environ.get("TVIT_TEST_DATA")
    if not root:
        pytest.skip("TVIT_TEST_DATA is not set")
    folder = Path(root) / "ucfTrainTestlist"
    subsets = parse_split_lists(folder, split)
    assert (len(subsets["train"]), len(subsets["test"])) == (train, test)
    assert len(read_classes(folder)) == len({action for action, _ in subsets["train"]}) == 101
    groups = {name: {(action, group_of(file)) for action, file in side} for name, side in subsets.items()}
    assert not groups["train"] & groups["test"]
    for name, text in lists_from_groups(
        subsets["train"] + subsets["test"], find("ucf101").test_groups
    ).items():
        (tmp_path / name).write_text(text)
    made = parse_split_lists(tmp_path, split)
    assert {name: set(side) for name, side in made.items()} == {
        name: set(side) for name, side in subsets.items()
    }
    assert read_classes(tmp_path) == read_classes(folder)
