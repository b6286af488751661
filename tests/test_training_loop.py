"""The training loop: reproducible, independent of micro-batches and world size."""

import pytest
import torch
from entry import start
from tiny import MIXED, last_weights, records, run_in, same, settings

from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.optim import learning_rate_at
from tvit_cli.model.folder import load_model


def test_it_learns_what_colour_tells(trained):
    result = trained(epochs=12, hue=0.0, test_at_end=True)
    assert records(result)[-1]["train_clip_top1"] > 0.9
    assert result.test is not None and result.test.metrics["video_top1"] == 1.0


def test_two_runs_of_one_seed_are_equal_bit_for_bit(trained):
    a, b = trained(), trained(num_workers=2)
    assert same(last_weights(a), last_weights(b))
    assert records(a) == records(b)


def test_the_model_folder_holds_the_best_epoch_not_the_last(trained):
    result = trained(epochs=6)
    epochs = records(result)
    best = max(epochs, key=lambda r: (r["val_video_top1"], -r["val_loss"]))
    assert result.best_epoch == best["epoch"]
    kept = load_checkpoint(list_checkpoints(result.run / "checkpoints")[best["epoch"] - 1])
    model, _ = load_model(result.model)
    assert torch.equal(model.classifier.weight, kept.trainable["classifier.weight"])


def test_without_validation_the_last_epoch_is_kept(trained):
    result = trained(val_groups="none")
    model, card = load_model(result.model)
    assert result.best == {} and result.best_epoch == 2 and card.metrics == {}
    assert torch.equal(model.classifier.weight, last_weights(result)["classifier.weight"])
    assert "val_loss" not in records(result)[0]


@pytest.mark.parametrize("changes", [{}, MIXED, {**MIXED, "repeats": 3}], ids=["plain", "mixed", "repeated"])
def test_accumulated_micro_batches_give_the_update_of_one_batch(trained, changes):
    facts = {"lora_dropout": 0.0, **changes}
    runs = (
        trained(per_gpu_batch_size=3, gradient_accumulation_steps=3, **facts),
        trained(per_gpu_batch_size=9, **facts),
    )
    one, cut, whole = map(last_weights, (trained(per_gpu_batch_size=6, **facts), *runs))
    # 12 clips: the last window is partial
    assert all(torch.allclose(cut[k], whole[k], atol=2e-4) for k in whole)
    assert not all(torch.allclose(one[k], whole[k], atol=2e-4) for k in whole)
    for a, b in zip(*(records(run, "step") for run in runs), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_two_processes_take_the_steps_of_one_and_one_of_them_speaks(trained, tmp_path, clips, pretrained):
    # 5 clips each of 10: partners lie in the other process, too.
    facts = {"epochs": 3, "lora_dropout": 0.0, "per_gpu_batch_size": 5, "experiment_name": "one", **MIXED}
    one = trained(**facts, gradient_accumulation_steps=2)
    own = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, **facts
    )
    (tmp_path / "c.json").write_text(own.model_dump_json())
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "tvit_cli")
    child = start(*launcher, "train", "--config", tmp_path / "c.json", "--experiment-name", "two")
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert out.count("The model is in") == 1
    two = run_in(tmp_path / "two")
    a, b = last_weights(one), last_weights(two)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)  # 12 clips: the last window has 2 of 10
    for x, y in zip(records(one), records(two), strict=True):
        assert x["train_loss"] == pytest.approx(y["train_loss"], rel=1e-4)
        assert x["val_video_top1"] == y["val_video_top1"]


def test_all_frames_of_a_tubelet_are_learnt_from_beside_pretrained_weights(trained):
    model, _ = load_model(trained(tubelet_size=2, epochs=1).model)
    first, central = model.patch_embed.weight.detach().chunk(2, dim=1)
    assert 0 < first.abs().mean() < 0.2 * central.abs().mean()  # they started at nothing


def test_the_rate_warms_up_in_epochs_and_falls_as_the_schedule_says(trained):
    result = trained(warmup_epochs=1, epochs=3, learning_rate=0.01)
    steps = records(result, "step")
    assert [record["step"] for record in steps] == list(range(1, 10))  # three of an epoch
    rates = [learning_rate_at(step, peak=0.01, warmup_steps=3, total_steps=9) for step in range(9)]
    assert [record["learning_rate"] for record in steps] == pytest.approx(rates)
    assert all(record["grad_norm"] > 0 for record in steps)


def test_workers_are_as_many_as_asked_for(trained, monkeypatch):
    from tvit_cli.data import clips

    asked = []
    real = clips.DataLoader

    def spy(*arguments, **keywords):
        asked.append(keywords["num_workers"])
        return real(*arguments, **keywords)

    monkeypatch.setattr(clips, "DataLoader", spy)
    trained(epochs=1, num_workers=2)
    assert asked[0] == 2  # of the training; validation has fewer batches
