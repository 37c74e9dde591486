"""Two processes that see different data hold equal delayed scales, for one collective a step."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from altgrad.quantization import ScaleTracker, compute_scale, synchronize_amax

STEPS = 24
FORMATS_OF_A_STEP = ["E4M3", "E5M2", "E7M0", "E0M7", "BF16", "E6M1", "E4M3"]


def data_of(rank: int, step: int) -> list[torch.Tensor]:
    """A step's tensors: other magnitudes on each rank, an early peak on rank 1, NaN and infinity, one all zero."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    tensors = [torch.randn(50, generator=generator) * 2.0 ** (i - 3 * rank) for i in range(len(FORMATS_OF_A_STEP))]
    if (rank, step) == (1, 2):
        tensors[0][4] = 1e4
    if step == 5:
        tensors[1][0] = math.nan if rank == 0 else -math.inf
    if step == 9:
        tensors[2][0], tensors[5][0] = (math.nan, 1e6) if rank == 0 else (1e6, math.inf)
    if rank == 1:
        tensors[3].zero_()
    return tensors


def work(rank: int, folder: Path) -> None:
    """One worker: saves every step's scales and the collectives it took."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    shared = [ScaleTracker(name, shared=True) for name in FORMATS_OF_A_STEP]
    alone = [ScaleTracker(name) for name in FORMATS_OF_A_STEP]
    scales, apart, collectives = [], [], []
    for step in range(STEPS):
        tensors = data_of(rank, step)
        with torch.profiler.profile() as profile:
            if not (rank == 1 and step == 7):
                scales.append([tracker.update(x).item() for tracker, x in zip(shared, tensors, strict=True)])
            else:
                scales.append([tracker.scale().item() for tracker in shared])
            synchronize_amax(shared)
        collectives.append([event.name for event in profile.events() if event.name.startswith("gloo:")])
        apart.append([tracker.update(x).item() for tracker, x in zip(alone, tensors, strict=True)])
    torch.save({"scales": scales, "apart": apart, "collectives": collectives}, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_scales_are_equal_every_step(ranks):
    assert ranks[0]["scales"] == ranks[1]["scales"]
    assert all(a != b for a, b in zip(ranks[0]["apart"], ranks[1]["apart"], strict=True)), "the control agrees"


def test_a_step_takes_one_collective(ranks):
    for rank in ranks:
        assert rank["collectives"] == [["gloo:all_reduce"]] * STEPS


def test_scales_are_those_of_all_data_seen_before(ranks):
    for step in range(1, STEPS):
        for i, name in enumerate(FORMATS_OF_A_STEP):
            window = range(max(0, step - 16), step)
            seen = [data_of(r, s)[i] for s in window for r in range(2) if (r, s) != (1, 7)]
            finite = [amax for amax in (x.abs().max() for x in seen) if torch.isfinite(amax)]
            expected = 1.0 if name == "BF16" else compute_scale(torch.stack(finite), name).item()
            assert ranks[0]["scales"][step][i] == expected
    assert ranks[0]["scales"][0] == [1.0] * len(FORMATS_OF_A_STEP)


def test_without_a_process_group_the_same_law_holds():
    first, second = ScaleTracker("E4M3", 2, shared=True), ScaleTracker("E5M2", 2, shared=True)
    for amax in (-3.0, 5.0, math.nan, 4.0):
        assert first.update(torch.tensor([448.0 * amax])).item() == 1.0, "joined before the synchronization"
    synchronize_amax([first, second])
    assert first.scale().item() == 5.0 and second.scale().item() == 1.0
    assert first.gathered() is None
    for _ in range(2):
        assert first.update(torch.tensor([448.0])).item() == 5.0
        synchronize_amax([first, second])
    assert first.scale().item() == 1.0
    synchronize_amax([])


def test_what_was_gathered_resumes():
    tracker, resumed = ScaleTracker("E4M3", shared=True), ScaleTracker("E4M3", shared=True)
    tracker.update(torch.tensor([448.0 * 7]))
    resumed.load_state_dict(tracker.state_dict())
    synchronize_amax([resumed])
    assert resumed.scale().item() == pytest.approx(7.0)


def test_an_unshared_tracker_is_refused():
    with pytest.raises(ValueError, match="shared"):
        synchronize_amax([ScaleTracker("E4M3", shared=True), ScaleTracker("E4M3")])


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
