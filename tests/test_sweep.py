"""Series over seeds and splits: runs, summary, resuming."""

import json
import shutil
import statistics

import pytest
from tiny import make_pretrained, settings

from tvit_cli import cli
from tvit_cli.engine.train import sweep as engine
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.engine.train.sweep import evaluate_series, summarise, train_series
from tvit_cli.engine.trained import series_models
from tvit_cli.errors import Interrupted, ModelError, SettingsError
from tvit_cli.model.folder import load_card
from tvit_cli.results import Note
from tvit_cli.settings.base import load
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings


@pytest.fixture(scope="module")
def facts(inputs):
    return {**inputs, "epochs": 1, "experiment_name": "people"}


def seeds(facts, folder, *numbers, **changes):
    own = {**facts, "working_directory": folder, **changes}
    return train_series([settings(seed=number, **own) for number in numbers])


def test_each_seed_has_a_run_of_its_own_and_the_summary_is_their_mean(facts, tmp_path):
    result = seeds(facts, tmp_path, 0, 1, test_at_end=True)
    assert result.folder == tmp_path / "people" and list(result.runs) == ["seed0-split1", "seed1-split1"]
    for name, metrics in result.runs.items():
        last = (result.folder / name / "metrics.jsonl").read_text().splitlines()[-1]
        assert metrics["val_loss"] == json.loads(last)["val_loss"]
        assert json.loads((result.folder / name / "settings.json").read_text())["seed"] == int(name[4])
    losses = [metrics["test_loss"] for metrics in result.runs.values()]
    assert losses[0] != losses[1]
    assert result.summary["test_loss"] == (statistics.fmean(losses), statistics.stdev(losses))
    written = json.loads((result.folder / "summary.json").read_text())
    assert written["mean"]["test_loss"] == statistics.fmean(losses) and written["runs"] == result.runs


def test_unnamed_series_that_start_at_once_take_names_of_their_own(facts, tmp_path, monkeypatch):
    first = engine.experiment_name(
        settings(**{**facts, "experiment_name": None, "working_directory": tmp_path})
    )

    def taken(own):  # by a series that starts just then
        (tmp_path / first).mkdir()
        return first

    def stops(own, report):
        raise Interrupted("Stopped by Ctrl-C.", exit_code=130)

    monkeypatch.setattr(engine, "experiment_name", taken)
    monkeypatch.setattr(engine, "train", stops)
    with pytest.raises(Interrupted, match=f"--experiment-name {first[:-1]}2"):
        seeds(facts, tmp_path, 0, 1, experiment_name=None)
    assert [path.name for path in tmp_path.iterdir()] == [first]


def test_stopped_sweep_keeps_finished_runs_and_does_the_rest(facts, tmp_path, monkeypatch):
    whole = seeds(facts, tmp_path / "whole", 0, 1, 2)
    real, trained = engine.train, []

    def stops(own, report):
        if own.seed == 1 and not trained.count(1):
            trained.append(1)
            raise Interrupted("Stopped by SIGTERM.", exit_code=143)
        trained.append(own.seed)
        return real(own, report)

    monkeypatch.setattr(engine, "train", stops)
    with pytest.raises(Interrupted, match=r"--experiment-name people. 1 of its 3 runs are finished") as stop:
        seeds(facts, tmp_path / "cut", 0, 1, 2)
    assert stop.value.exit_code == 143
    again = seeds(facts, tmp_path / "cut", 0, 1, 2)
    assert trained == [0, 1, 1, 2]
    assert again.runs == whole.runs


def test_sweep_run_without_a_checkpoint_starts_again(facts, tmp_path):
    before = seeds(facts, tmp_path, 0, 1)
    run = before.folder / "seed1-split1"
    for folder in ("model", "plots"):
        shutil.rmtree(run / folder)
    (run / "report.html").unlink()
    (run / "checkpoints").rename(run / "kept")
    with pytest.raises(SettingsError, match=r"seed1-split1.checkpoints holds no checkpoint"):
        seeds(facts, tmp_path, 0, 1)  # they lie elsewhere: --checkpoint-dir kept
    shutil.rmtree(run / "kept")
    assert seeds(facts, tmp_path, 0, 1).runs == before.runs


def test_a_test_score_that_is_missing_is_taken_of_a_finished_run(facts, tmp_path):
    assert "test_loss" not in seeds(facts, tmp_path, 0, 1).summary
    assert "test_loss" in seeds(facts, tmp_path, 0, 1, test_at_end=True).summary


def test_finished_runs_of_other_settings_are_not_mixed_in(facts, tmp_path):
    seeds(facts, tmp_path, 0, 1)
    with pytest.raises(SettingsError, match=r"--lora-rank: 8 -> 4"):
        seeds(facts, tmp_path, 0, 1, lora_rank=4)
    replaced = seeds(facts, tmp_path, 0, 1, lora_rank=4, overwrite=True)
    assert json.loads((replaced.folder / "seed0-split1/settings.json").read_text())["lora_rank"] == 4


def test_a_series_is_not_overwritten_with_weights_that_lie_in_it(facts, tmp_path):
    """Nothing is trained first: the run that holds them is the last of the series."""
    seeds(facts, tmp_path, 0, 1)
    models = [tmp_path / "people" / f"seed{seed}-split1" / "model" / "card.json" for seed in (0, 1)]
    before = [path.read_bytes() for path in models]
    with pytest.raises(SettingsError, match=r"--overwrite: .*seed1-split1 holds the weights"):
        seeds(facts, tmp_path, 0, 1, overwrite=True, hf_model_name=str(models[1].parent))
    assert [path.read_bytes() for path in models] == before


def test_a_series_goes_on_with_the_weights_that_it_began_with(facts, tmp_path):
    seeds(facts, tmp_path, 0)
    other = make_pretrained(tmp_path / "other")
    with pytest.raises(SettingsError, match="--hf-model-name: "):
        seeds(facts, tmp_path, 0, 1, hf_model_name=str(other))


def test_a_single_runs_folder_is_not_taken_for_a_series(facts, tmp_path):
    (tmp_path / "people").mkdir()
    (tmp_path / "people" / "settings.json").write_text("{}")
    with pytest.raises(SettingsError, match="the folder of a single run"):
        seeds(facts, tmp_path, 0, 1)
    with pytest.raises(SettingsError, match="each run of a series has its own"):
        seeds({**facts, "experiment_name": "other"}, tmp_path, 0, 1, resume_from_checkpoint="latest")


def test_values_become_settings_in_order_with_mean_and_deviation():
    loaded = load(TrainSettings, flags={"seed": "3, 1", "split": "2,1"}, environ={})
    assert [(s.seed, s.split) for s in loaded.series] == [(3, 2), (3, 1), (1, 2), (1, 1)]
    assert load(TrainSettings, flags={"seed": "3"}, environ={}).series[0].seed == 3
    runs = [{"a": 1.0, "b": 5.0}, {"a": 2.0}, {"a": 3.0, "b": 0.0}]
    assert summarise(runs) == {"a": (2.0, 1.0)}


@pytest.mark.parametrize(
    ("verb", "given", "sentence"),
    [
        (TrainSettings, {"seed": "0,0"}, "--seed: 0 is given twice"),
        (TrainSettings, {"split": "1,4"}, "--split: 4: it should be less than or equal to 3"),
        (TrainSettings, {"seed": "0,x"}, "--seed: x: it should be a valid integer"),
        (TrainSettings, {"epochs": "1,2"}, "--epochs: 1,2: it should be a valid integer"),
        (EvalSettings, {"seed": "0,1"}, "--seed: 0,1: it should be a valid integer"),
    ],
)
def test_a_series_that_makes_no_sense_is_refused(verb, given, sentence):
    with pytest.raises(SettingsError, match=sentence):
        load(verb, flags=given, environ={})


def test_the_command_prints_every_run_and_the_mean(facts, tmp_path, capsys):
    arguments = ["train", "--seed", "0,1", "--working-directory", str(tmp_path)]
    for key, value in settings(**facts).model_dump(mode="json", exclude_defaults=True).items():
        if key not in ("working_directory", "seed"):
            arguments += [f"--{key.replace('_', '-')}", str(value)]
    with pytest.raises(SystemExit) as end:
        cli.run(arguments)
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert len(set(err.splitlines())) == len(err.splitlines()) > 10  # nothing is printed twice
    assert "seed0-split1" in out and "seed1-split1" in out and "\nmean " in out and "\nsd " in out
    assert len(list_checkpoints(tmp_path / "people" / "seed1-split1" / "checkpoints")) == 1


def test_runs_are_counted_while_they_are_trained(facts, tmp_path):
    said = []
    own = {**facts, "working_directory": tmp_path}
    train_series([settings(seed=number, **own) for number in (0, 1)], said.append)
    starts = [e.text for e in said if isinstance(e, Note) and e.text.startswith("Run ")]
    assert [text.split(":")[0] for text in starts if " of " in text] == ["Run 1 of 2", "Run 2 of 2"]


def test_a_series_is_scored_as_a_whole(facts, tmp_path, capsys):
    trained = seeds(facts, tmp_path, 0, 1, test_at_end=True)
    models = series_models(trained.folder)
    assert list(models) == ["seed0-split1", "seed1-split1"]
    assert not series_models(models["seed0-split1"]) and not series_models(models["seed0-split1"].parent)
    settings = EvalSettings(model=trained.folder, num_workers=0, device="cpu", top_k=2)
    scored = evaluate_series(settings, models)
    assert scored.summary["loss"] == trained.summary["test_loss"]
    written = json.loads((trained.folder / "eval" / "test" / "summary.json").read_text())
    assert written["sd"]["loss"] == scored.summary["loss"][1]
    with pytest.raises(SystemExit) as end:
        cli.run(["eval", "--model", str(trained.folder), "--device", "cpu"])
    assert end.value.code == 0 and "\nmean " in capsys.readouterr().out


def test_a_folder_of_unlike_runs_is_no_series(tmp_path):
    for name in ("ucf101-1", "ucf101-2", "seed0-split1"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "card.json").touch()
    assert list(series_models(tmp_path)) == ["seed0-split1"]
    with pytest.raises(ModelError, match=r"a folder of runs \(.*\)\. Name one, such as .*ucf101-2"):
        load_card(tmp_path)
