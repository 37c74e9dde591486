"""The Triton step equals the torch reference bit for bit: under the interpreter here, on a GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="triton is not installed (extra 'gpu')")

import test_step_kernels as steps  # noqa: E402

import altgrad.training.optimizer as optimizer_module  # noqa: E402
from altgrad.training.kernels import gpu, reference  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FORMATS = ("E4M3", "E7M0", "E7M0/p3109", "INT8", "BF16")


def both(monkeypatch, arm: str, name: str, dtype: torch.dtype, shape: tuple[int, int], count_every: int = 1):
    """State and counts of the same ten steps by the Triton kernels and by the reference."""
    monkeypatch.setattr(steps, "SHAPE", shape)
    monkeypatch.setattr(steps, "DEVICE", "cuda" if ON_GPU else "cpu")
    results = []
    for kernel in (gpu, reference):
        monkeypatch.setattr(optimizer_module, "kernel_for", lambda job, kernel=kernel: kernel)
        results.append(steps.run(arm, name, dtype, count_every))
    return results


def assert_equal(triton, torch_results) -> None:
    assert torch.equal(triton[1], torch_results[1])
    for ours, theirs in zip(triton[0], torch_results[0], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("arm", steps.ARMS)
def test_the_triton_step_is_the_references(arm, name, monkeypatch):
    assert_equal(*both(monkeypatch, arm, name, torch.float32, (7, 11)))


@pytest.mark.parametrize("arm", ["grid", "stochastic"])
def test_steps_that_count_less_too(arm, monkeypatch):
    assert_equal(*both(monkeypatch, arm, "E4M3", torch.float32, (7, 11), 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arm", ["adamw", "stochastic", "manifold_sr", "grid"])
def test_half_width_parameters_too(arm, dtype, monkeypatch):
    assert_equal(*both(monkeypatch, arm, "E4M3", dtype, (7, 11)))


@pytest.mark.parametrize("arm", ["adamw", "manifold", "grid_carry"])
def test_wide_reads_of_aligned_tensors_change_nothing(arm, monkeypatch):
    monkeypatch.setattr(steps, "SMALL", 16)
    table, aligned = gpu.table_of, []
    monkeypatch.setattr(gpu, "table_of", lambda *given: aligned.append(table(*given)) or aligned[-1])
    assert_equal(*both(monkeypatch, arm, "E4M3", torch.float32, (16, 48)))
    assert aligned and all(is_aligned for _, _, is_aligned in aligned)


@pytest.mark.parametrize("arm", ["manifold_sr", "grid_carry", "eco"])
def test_several_programs_add_up(arm, monkeypatch):
    assert_equal(*both(monkeypatch, arm, "E3M4", torch.float32, (37, 61)))


def test_the_comparison_can_fail(monkeypatch):
    ours, _ = both(monkeypatch, "grid", "E4M3", torch.float32, (7, 11))
    _, other = both(monkeypatch, "grid", "E3M4", torch.float32, (7, 11))
    assert not torch.equal(ours[0][0], other[0][0])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: equality with the CPU and steps without a host sync")
@pytest.mark.parametrize("arm", steps.ARMS)
def test_on_a_gpu_a_step_equals_the_cpus_and_waits_for_nothing(arm):
    results = []
    for device in ("cuda", "cpu"):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter((torch.randn(300, 70, generator=generator) * 0.02).to(device))
        optimizer = steps.ARMS[arm]([weight], "E4M3")
        for step in range(5):
            weight.grad = (torch.randn(300, 70, generator=generator) * 0.01).to(device)
            if device == "cuda" and step:
                torch.cuda.set_sync_debug_mode("error")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        results.append(weight.detach().cpu())
    assert torch.equal(*results)
