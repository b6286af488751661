"""The first hour, item by item: defects once found, and promises, each with the tests that hold it.

    python tests/walk.py [WORD …]

runs the tests of all items, or of those whose names contain a word, and prints each item with its result.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent

ITEMS = {
    # Defects
    "memory of extreme shapes": "a_video_of_8000x1_pixels_is_refused_by_name the_fault_file_of_8000x1_pixels_is_refused",
    "mirrored and turned pictures": "a_mirrored_or_turned_picture_is_shown_as_by_players the_fault_files_with_mirrors_"
    "and_nan_are_shown_right avif_pictures_that_are_turned_or_mirrored_are_shown_upright "
    "a_matrix_that_is_no_quarter_turn_is_upright_and_said a_left_crop_of_h264_is_exact",
    "URLs without an end or an answer": "an_endless_url_is_an_error_and_no_full_memory a_url_that_stalls_is_an_error_and_"
    "gives_no_label a_url_that_breaks_off_is_an_error_and_gives_no_label",
    "changed weights": "one_flipped_bit_in_the_weights_is_refused",
    "control characters and formulas": "escape_sequences_in_names_never_reach_the_terminal names_in_csv_are_no_formulas_"
    "and_numbers_stay class_names_in_result_files_are_no_formulas",
    "malformed mirrors": "malformed_header_leads_to_the_next_mirror cut_file_is_not_whole_after_a_416_of_its_length "
    "server_of_a_few_bytes_a_second_is_too_slow given_archive_does_not_wait_for_the_lists",
    "scores that are no numbers": "scores_that_overflow_are_an_error_and_never_nan",
    "hostile model folders": "hostile_sizes_are_refused_before_a_network_is_built",
    "a decoder that dies": "a_video_that_crashes_its_decoder_is_unreadable_alone one_crash_of_a_decoder_loses_no_other_result",
    "archives": "unsafe_or_damaged_archive_is_refused_with_the_reason without_a_reader_the_error_says_what_to_install",
    "configs and patterns without an end": "config_files_that_are_no_table_too_deep_or_too_large_are_refused "
    "group_pattern_that_would_never_end_is_an_error",
    "one pixel": "a_video_of_one_pixel_is_annotated",
    "two at once": "unnamed_trainings_at_once_take_the_next_free_names unnamed_series_that_start_at_once_take_names_of_"
    "their_own",
    "forged checkpoints": "a_forged_state_is_an_error_that_names_the_file a_forged_optimizer_state_is_an_error_that_names_it",
    "full disks and time limits": "a_full_disk_keeps_the_videos_of_an_unfinished_shard a_report_that_cannot_be_written_"
    "costs_no_numbers a_stopped_worker_is_ended_at_the_time_limit a_video_too_slow_to_decode_is_named_and_others_go_on",
    # A user's walk
    "Python arguments": "python_arguments_are_checked_as_on_the_command_line frames_of_another_form_are_refused_by_name",
    "display of a series": "the_second_run_of_a_series_has_a_display_of_its_own",
    "evaluations of their own": "eval_names_the_results_that_it_replaces eval_refuses_to_replace_files_that_are_no_results "
    "models_on_partly_other_data_are_compared_on_what_they_share",
    "failed downloads": "retries_are_shown_and_back_off_doubles_up_to_its_bound a_download_that_failed_is_no_data_set "
    "new_clips_of_the_demo_set_are_counted",
    "presets and run folders": "values_of_a_preset_yield_to_those_that_contradict_them a_run_folder_is_resumed_with_its_"
    "settings_from_its_latest",
    "W&B": "wandb_project_entity_group_and_tags_are_respected",
    "explanations": "a_true_map_beats_every_random_order_and_a_false_one_does_not",
    "examples without arguments": "an_example_without_arguments_shows_its_usage",
    # Answers as they come
    "answers as they come": "answers_are_printed_and_flushed_after_each_batch a_stop_keeps_the_answers_and_says_how_far_"
    "it_came segments_are_printed_and_flushed_once_certain",
    "streams": "first_answer_comes_within_two_windows_and_a_second a_stream_that_is_cut_is_resumed_and_then_given_up "
    "ten_minutes_of_a_stream_take_bounded_memory windows_that_the_model_cannot_follow_are_dropped_if_live "
    "a_stream_has_the_windows_and_scores_of_a_timeline bytes_on_stdin_give_a_line_per_window",
    "subtitles": "subtitles_of_a_stream_follow_its_labels subtitles_have_valid_times_and_no_markup_of_labels output_of_one_video_may_be_a_subtitle_file",
    "Ctrl-C": "ctrl_c_is_acknowledged_and_named ctrl_c_of_a_terminal_ends_a_training_with_workers_cleanly",
    # Help and words
    "help at 80 columns": "no_option_name_is_cut_at_80_columns names_of_other_programs_are_suggested_by_meaning "
    "a_model_is_an_option_or_an_argument epoch_lines_fit_80_columns",
    "going on": "classifier_rows_of_known_classes_are_kept_by_name continuation_validates_as_its_source_before_a_step "
    "train_from_takes_over_settings_and_typed_ones_win finished_run_asked_for_more_epochs_names_the_command",
    # Own data
    "own data": "classes_and_their_doubts_are_reported_before_a_training group_patterns_that_fit_the_names_are_proposed "
    "without_data_own_videos_and_the_quickstart_are_suggested a_check_ends_with_what_it_found "
    "two_manifests_in_one_folder_have_stores_of_their_own the_documented_search_lists_the_lowest_own_scores_first",
    # Python
    "Python": "python_trains_evaluates_predicts_and_exports frames_in_memory_are_answered_as_the_same_frames_in_a_file "
    "ctrl_c_in_python_keeps_the_run_and_resumes the_notebook_trains_evaluates_explains_and_exports "
    "examples_use_public_names_of_tvit_only",
    # Pages
    "pages": "training_and_evaluation_pages_link_to_each_other clips_play_as_loops_of_the_frames_of_the_model "
    "confusion_cells_open_lists_of_their_videos a_page_of_100_classes_sorts_filters_and_opens_cells "
    "names_with_numbers_are_in_natural_order the_demo_calls_one_of_many_actions_mostly",
}


def names_of(item: str) -> list[str]:
    """Names of an item's tests."""
    return [f"test_{name}" for name in ITEMS[item].split()]


def existing_tests() -> dict[str, Path]:
    """Test functions and their files."""
    pattern = re.compile(r"^def (test_\w+)", re.MULTILINE)
    files = sorted(TESTS.glob("test_*.py"))
    return {name: file for file in files for name in pattern.findall(file.read_text(encoding="utf-8"))}


def main() -> None:
    words = sys.argv[1:]
    items = [item for item in ITEMS if not words or any(word.lower() in item.lower() for word in words)]
    where = existing_tests()
    ids = [f"{where[test]}::{test}" for item in items for test in names_of(item)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", *ids, f"--junitxml={report}"], check=False)
        outcomes: dict[str, list[str]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = next(
                (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
            )
            outcomes.setdefault(case.attrib["name"].partition("[")[0], []).append(outcome)
    failed = False
    for item in items:
        found = [outcome for test in names_of(item) for outcome in outcomes.get(test, ["error"])]
        is_bad = {"failure", "error"} & {*found}
        failed |= bool(is_bad)
        skipped = f", {found.count('skipped')} skipped" if "skipped" in found else ""
        print(f"{'FAILED' if is_bad else 'holds ':7} {item} ({len(found)} cases{skipped})")
    sys.exit(failed)


if __name__ == "__main__":
    main()
