"""Who works through a batch changes nothing: several processes, several pieces, or one."""

import json
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from altgrad.training import TrainConfig, Trainer
from altgrad.training.arm_configs import ARMS
from altgrad.training.outcome import OutcomeKind
from altgrad.training.record import read_rows
from altgrad.training.workers import Share, Workers


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "steps": 12,
            "log_interval": 4,
            "eval_interval": 12,
            "checkpoint_interval": 4,
            "format": "E4M3",
            "optimizer": ARMS["manifold"].model_dump(),
            "model": {"layers": 1, "heads": 2, "width": 32, "block": 32},
            "data": {"batch": 4, "eval_batches": 1},
        }
        | changes
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def work(rank: int, world: int, port: int, text: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    trainer = Trainer(TrainConfig.model_validate_json(text), folder=Path(folder), workers=Workers(rank, world))
    trainer.run()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    assert trainer.outcome is not None
    Path(f"{folder}.{rank}").write_text(json.dumps({"kind": str(trainer.outcome.kind), "step": trainer.outcome.step}))
    torch.save(weights, f"{folder}.{rank}.pt")
    distributed.destroy_process_group()


def run_together(own: TrainConfig, folder: Path, world: int = 2) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    workers = [
        context.Process(target=work, args=(rank, world, port, own.model_dump_json(), str(folder)))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * world


def losses(folder: Path) -> list[float]:
    return [row["train_loss"] for row in read_rows(folder / "metrics.jsonl")[0]]


@pytest.mark.slow
def test_two_workers_train_as_one_does_and_hold_equal_weights(tmp_path: Path) -> None:
    run_together(config(), tmp_path / "two")
    alone = Trainer(config(), folder=tmp_path / "one")
    alone.run()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert len(losses(tmp_path / "two")) == 12
    first, second = (torch.load(f"{tmp_path / 'two'}.{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)

    run_together(config(steps=16), tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["resumed_from"] == 12
    Trainer(config(steps=16), folder=tmp_path / "one").run()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_all_workers_stop_with_the_first_ones_verdict(tmp_path: Path) -> None:
    guards = [{"signal": "flip_yield", "test": "above", "limit": -1.0, "kind": "stalled"}]
    run_together(config(guards=guards), tmp_path / "two")
    endings = [json.loads(Path(f"{tmp_path / 'two'}.{rank}").read_text()) for rank in (0, 1)]
    assert endings == [{"kind": "stalled", "step": 4}] * 2


@pytest.mark.parametrize("arm", ["adamw", "grid"])
def test_pieces_of_a_batch_add_up_to_it(arm: str) -> None:
    own = config(optimizer=ARMS[arm].model_dump(), format="BF16" if arm == "adamw" else "E4M3")
    whole, pieces = Trainer(own), Trainer(own, workers=Workers(micro_batches=2))
    for trainer in (whole, pieces):
        assert trainer.run().kind is OutcomeKind.DONE
    expected = [row["train_loss"] for row in whole.rows]
    assert [row["train_loss"] for row in pieces.rows] == pytest.approx(expected, abs=2e-3)
    assert pieces.rows[0]["train_loss"] == pytest.approx(expected[0], abs=1e-6)


def test_every_piece_is_someones_and_nobodys_twice() -> None:
    shares = [share for rank in range(3) for share in Workers(rank, 3, 2).shares]
    assert shares == [Share(i, 6) for i in range(6)]


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match=r"data\.batch=4 can't be shared evenly by 3 workers"):
        Trainer(config(), workers=Workers(0, 3))
