"""Where metrics go: the W&B run of an experiment is one run, however often it is resumed, and needs no network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny import make_clips, make_pretrained, settings

from tvit_cli.engine.checkpoint import list_checkpoints
from tvit_cli.engine.events import Event, Note
from tvit_cli.engine.trackers import Trackers
from tvit_cli.engine.train import TrainResult, train
from tvit_cli.errors import RunError


@pytest.fixture
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("nobody_is_logged_in")
def test_without_a_login_wandb_stays_offline_says_so_and_a_resumed_run_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = socket.getaddrinfo

    def spy(host: Any, *arguments: Any, **keywords: Any) -> Any:
        asked.append(host)
        return real(host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", spy)
    events: list[Event] = []

    def go(**changes: Any) -> TrainResult:
        facts = settings(
            path_to_data=str(tmp_path / "colours"),
            hf_model_name=str(tmp_path / "tiny-vit"),
            working_directory=tmp_path / "runs",
            log_wandb=True,
            **changes,
        )
        return train(facts, events.append)

    make_clips(tmp_path / "colours")
    make_pretrained(tmp_path / "tiny-vit")
    first = go()
    assert any("wandb login" in e.text and "wandb sync" in e.text for e in events if isinstance(e, Note))
    shutil.rmtree(first.model)
    shutil.rmtree(list_checkpoints(first.run / "checkpoints")[-1])
    go(resume_from_checkpoint="latest")
    own = (first.run / "wandb-id").read_text()
    kept = [path.name for path in (first.run / "wandb").glob("offline-run-*")]
    assert kept and {name.rpartition("-")[2] for name in kept} == {own}
    assert not [host for host in asked if host not in ("localhost", "127.0.0.1")]


def test_a_record_that_cannot_be_written_names_the_file_and_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written.*--resume-from-checkpoint latest"):
        Trackers(tmp_path).log({"kind": "step", "step": 1})


def test_a_last_line_that_was_cut_off_goes_and_so_do_records_after_the_step(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    Trackers(tmp_path).cut_after(3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)
    Trackers(tmp_path).cut_after(1)
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
