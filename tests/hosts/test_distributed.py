"""DDP, FSDP2 and torch.distributed.checkpoint over gloo, two processes, against the plain loop in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_models import ARMS as ALL_ARMS
from host_models import batch, loss_of, net, train
from torch import distributed, nn

pytestmark = pytest.mark.slow
STEPS = 5

ARMS = {name: ALL_ARMS[name] for name in ("adamw", "manifold", "manifold_sr", "grid_carry", "muon")}


def sharded_net() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = net()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def losses_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range = range(STEPS)
) -> list[float]:
    """This rank's half of every batch; the mean loss over both."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch(step).chunk(2)[rank])
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / 2)
    return losses


def full(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def work(rank: int, folder: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, dict] = {}
    for arm, make in ARMS.items():
        model = nn.parallel.DistributedDataParallel(net())
        found[f"ddp {arm}"] = {"losses": losses_of(model, make(model.parameters()), rank), "weights": full(model)}
        model = sharded_net()
        optimizer = make(model.parameters())
        losses = losses_of(model, optimizer, rank)
        found[f"fsdp {arm}"] = {
            "losses": losses,
            "weights": full(model),
            "counts": {
                key: int(sum(int(getattr(c, key)) for c in optimizer.counts.values())) for key in ("flips", "applied")
            },
            "sharded": [type(v).__name__ for s in optimizer.state.values() for k, v in s.items() if k == "exp_avg"],
        }
        # Saved from the sharded run, loaded into a fresh sharded one, which goes on as this one does.
        options = StateDictOptions(flatten_optimizer_state_dict=arm in ("grid_carry", "adamw"))
        saved_model, saved = get_state_dict(model, optimizer, options=options)
        checkpoint.save({"model": saved_model, "optimizer": saved}, checkpoint_id=folder / f"dcp {arm}")
        fresh = sharded_net()
        other = make(fresh.parameters())
        empty_model, empty = get_state_dict(fresh, other, options=options)
        checkpoint.load({"model": empty_model, "optimizer": empty}, checkpoint_id=folder / f"dcp {arm}")
        set_state_dict(fresh, other, model_state_dict=empty_model, optim_state_dict=empty, options=options)
        later = range(STEPS, STEPS + 3)
        pair = [losses_of(m, o, rank, later) for m, o in ((model, optimizer), (fresh, other))]
        found[f"dcp {arm}"] = {"losses": pair, "weights": [full(model), full(fresh)]}
    stateful = net(stateful=True)
    ddp = nn.parallel.DistributedDataParallel(stateful)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    losses_of(ddp, optimizer, rank, range(3))
    found["ddp stateful"] = {"draws": int(stateful.head.weight_quantizer.draws)}
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    folder = tmp_path_factory.mktemp("hosts")
    command = [sys.executable, __file__]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("host", ["ddp", "fsdp"])
def test_losses_are_those_of_the_plain_loop(ranks, host, arm):
    model = net()
    optimizer = ARMS[arm](model.parameters())
    expected = train(model, optimizer, range(STEPS))
    ours, theirs = (rank[f"{host} {arm}"] for rank in ranks)
    # The ranks agree bit for bit; against one process the gradients' sums round in another order.
    assert ours["losses"] == theirs["losses"]
    assert all(torch.equal(a, b) for a, b in zip(ours["weights"], theirs["weights"], strict=True))
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(expected), rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(ours["losses"][0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_shards_step_as_the_whole_tensor_does(ranks, arm):
    """One scale, one mean spacing and one draw for all of a tensor: DDP and FSDP2 make the same weights."""
    ddp, fsdp = ranks[0][f"ddp {arm}"], ranks[0][f"fsdp {arm}"]
    assert ddp["losses"] == pytest.approx(fsdp["losses"], rel=1e-3)
    assert fsdp["counts"]["applied"] > 0 and fsdp["sharded"] and set(fsdp["sharded"]) == {"DTensor"}


@pytest.mark.parametrize("arm", ARMS)
def test_a_distributed_checkpoint_goes_on_exactly(ranks, arm):
    for rank in ranks:
        went_on, loaded = rank[f"dcp {arm}"]["losses"]
        assert went_on == loaded
        assert all(torch.equal(a, b) for a, b in zip(*rank[f"dcp {arm}"]["weights"], strict=True))


def test_draws_count_steps_under_ddp(ranks):
    assert [rank["ddp stateful"]["draws"] for rank in ranks] == [3, 3]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
