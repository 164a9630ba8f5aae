"""What makes a checkpoint whole: every file as it was recorded, the exported model's too, all of
one start.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lidit.errors import InputError, JobError
from pipelines.training import checkpoints, drift, driver


def write(run: Path, step: int, starts: tuple[str, str] = ("a", "a"), model: bool = False) -> Path:
    """Two ranks' parts of a vector of ten numbers."""
    folder = run / checkpoints.checkpoint_name(step)
    folder.mkdir(parents=True)
    if model:
        (folder / "model" / "model").mkdir(parents=True)
        (folder / "model" / "model_index.json").write_text("{}")
        (folder / "model" / "model" / "weights.safetensors").write_bytes(b"weights" * 100)
    for rank, (start, numbers) in enumerate(((0, torch.arange(6.0)), (6, torch.arange(6.0, 10)))):
        position = checkpoints.Position(step, 2, step, {}, starts[rank])
        save_file({f"master|w|{start}": numbers}, folder / f"rank-{rank:05}.safetensors")
        if rank == 0:
            (folder / "position.json").write_text(json.dumps(position.__dict__))
        checkpoints.write_record(folder, rank, position)
    return folder


def test_a_half_uploaded_model_is_not_published(tmp_path: Path) -> None:
    write(tmp_path, 4)
    last = write(tmp_path, 8, model=True)
    assert checkpoints.newest_complete(tmp_path) == last
    weights = last / "model" / "model" / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:300])
    assert "weights.safetensors does not match" in str(checkpoints.problem(last))
    assert checkpoints.newest_complete(tmp_path) == tmp_path / checkpoints.checkpoint_name(4)
    weights.unlink()
    assert checkpoints.unfinished(last)
    assert checkpoints.newest_complete(tmp_path) == tmp_path / checkpoints.checkpoint_name(4)
    weights.write_bytes(content)
    driver.publish_model(tmp_path)
    assert driver.finished_step(tmp_path) == 8


def test_a_last_checkpoint_without_a_model_is_not_published(tmp_path: Path) -> None:
    write(tmp_path, 8)
    with pytest.raises(
        JobError, match="holds no exported model; delete it and run the same command again"
    ):
        driver.publish_model(tmp_path)


def test_sending_that_is_cut_off_leaves_no_finished_checkpoint(tmp_path: Path) -> None:
    """The first checkpoint of a run, one of whose workers is killed as it sends its part: the run
    begins anew, for nothing was lost but that.
    """
    run, target = tmp_path / "run", tmp_path / "run" / checkpoints.checkpoint_name(4)
    parts = [write(tmp_path / f"of-{rank}", 4) for rank in range(2)]
    for rank, part in enumerate(parts):
        for file in part.glob(f"*-{1 - rank:05}.*"):
            file.unlink()
    (parts[1] / "position.json").unlink()

    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, target, dirs_exist_ok=True))

    def cut_off(folder: Path) -> Path:
        file = copied(folder) / "rank-00001.safetensors"
        file.write_bytes(file.read_bytes()[:50])
        raise KeyboardInterrupt

    checkpoints.send(parts[0], 0, copied)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.send(parts[1], 1, cut_off)
    assert checkpoints.newest_complete(run) is None
    parts[1] = write(tmp_path / "again", 4)
    assert checkpoints.send(parts[1], 1, copied) == target
    assert checkpoints.newest_complete(run) == target
    assert not list(tmp_path.rglob("*-record-*"))


def test_parts_of_two_starts_are_no_checkpoint(tmp_path: Path) -> None:
    whole, mixed = write(tmp_path, 4), write(tmp_path, 8, ("a", "b"))
    assert "of another start" in str(checkpoints.problem(mixed))
    assert checkpoints.unfinished(mixed)
    assert checkpoints.newest_complete(tmp_path) == whole


def test_records_of_earlier_versions_still_count(tmp_path: Path) -> None:
    folder = write(tmp_path, 4, ("", ""))
    position = json.loads((folder / "position.json").read_text())
    del position["start"]
    (folder / "position.json").write_text(json.dumps(position))
    for rank in range(2):
        record = json.loads((folder / f"rank-{rank:05}.json").read_text())
        (folder / f"rank-{rank:05}.json").write_text(json.dumps(record["files"][0]))
    assert checkpoints.newest_complete(tmp_path) == folder


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"step": 8', '"step": 9'),
        ('"ema_updates": 8', '"ema_updates": 0'),
        ('"world_size": 2', '"world_size": 1'),
    ],
)
def test_a_flipped_bit_of_the_position_is_seen(tmp_path: Path, old: str, new: str) -> None:
    whole, last = write(tmp_path, 4), write(tmp_path, 8)
    path = last / "position.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert "position.json" in str(checkpoints.problem(last))
    assert checkpoints.newest_complete(tmp_path) == whole


def test_a_checkpoint_under_another_steps_name_is_none(tmp_path: Path) -> None:
    whole = write(tmp_path, 4)
    copied = shutil.copytree(whole, tmp_path / checkpoints.checkpoint_name(12))
    assert "is of step 4" in str(checkpoints.problem(copied))
    assert checkpoints.newest_complete(tmp_path) == whole


def test_the_record_of_another_rank_is_no_record(tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    (folder / "rank-00001.json").write_bytes((folder / "rank-00000.json").read_bytes())
    assert "is the record of another rank's part" in str(checkpoints.problem(folder))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "null", "{", ""])
def test_a_torn_position_makes_the_run_fall_back(tmp_path: Path, content: str) -> None:
    whole, last = write(tmp_path, 4), write(tmp_path, 8)
    (last / "position.json").write_text(content)
    assert checkpoints.newest_complete(tmp_path) == whole


@pytest.mark.parametrize(("first", "last"), [(0, 10), (0, 3), (2, 6), (6, 10), (5, 7), (9, 10)])
def test_any_part_of_a_parameter_is_read(tmp_path: Path, first: int, last: int) -> None:
    found = checkpoints.CheckpointReader(write(tmp_path, 4)).read("master", "w", first, last)
    assert found.tolist() == list(range(first, last))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000])
def test_a_torn_list_of_facts_is_one_line_with_a_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / drift.FACTS).write_text(content)
    with pytest.raises(InputError, match=r"run\.json: cannot be read .*; delete it if"):
        drift.check_drift(tmp_path, {"config": {}}, allow_drift=False)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"step": null}', "[" * 100_000])
def test_a_torn_mark_of_the_end_is_no_end(tmp_path: Path, content: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "finished.json").write_text(content)
    assert driver.finished_step(tmp_path) is None
