"""Which kernel is in use, why, and what forces one: as `altgrad doctor` says it."""

import importlib.util
import sys

import pytest

from altgrad.cli import main
from altgrad.quantization.kernels import dispatch


@pytest.fixture
def absent(monkeypatch):
    """Makes a package look as if it were not installed."""
    found = importlib.util.find_spec

    def remove(package):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *r: None if name == package else found(name, *r))

    return remove


def test_the_report_names_each_kernel_and_why(monkeypatch):
    monkeypatch.delenv("ALTGRAD_KERNEL", raising=False)
    rows = dict(dispatch.kernel_report())
    assert rows["kernel on CPU"] == "numba (numba is installed)"
    assert rows["kernel on GPU"].startswith(("triton (triton is installed)", "reference (triton is not installed)"))
    assert rows["ALTGRAD_KERNEL"].startswith("not set")
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    forced = dict(dispatch.kernel_report())
    assert forced["kernel on CPU"] == "reference (ALTGRAD_KERNEL=reference)"
    assert forced["ALTGRAD_KERNEL"] == "reference is forced"


@pytest.mark.parametrize("package", ["numba", "triton"])
def test_what_is_absent_is_said_and_cannot_be_forced(package, absent, monkeypatch, capsys):
    monkeypatch.delenv("ALTGRAD_KERNEL", raising=False)
    absent(package)
    device = {"numba": "CPU", "triton": "GPU"}[package]
    assert dict(dispatch.kernel_report())[f"kernel on {device}"].startswith(f"reference ({package} is not installed)")
    monkeypatch.setenv("ALTGRAD_KERNEL", package)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        dispatch.kernel_report()
    assert main(["doctor"]) == 2
    assert f"pip install {package}" in capsys.readouterr().err


def test_a_forced_triton_that_is_absent_is_refused_for_tensors_too(absent):
    absent("triton")
    dispatch._triton_kernels.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match="triton"):
            dispatch._triton_kernels("triton")
        assert dispatch._triton_kernels("") is None
    finally:
        dispatch._triton_kernels.cache_clear()


def test_triton_that_does_not_import_is_told_from_triton_that_is_absent(absent, monkeypatch):
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
        assert "its import fails" in dict(dispatch.kernel_report())["triton"]
    absent("triton")
    assert dict(dispatch.kernel_report())["triton"] == "not installed (extra gpu)"


def test_doctor_prints_the_report_and_refuses_an_unknown_kernel(monkeypatch, capsys):
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "kernel on CPU reference (ALTGRAD_KERNEL=reference)" in shown and "triton" in shown
    monkeypatch.setenv("ALTGRAD_KERNEL", "nunba")
    assert main(["doctor"]) == 2
    assert "unknown ALTGRAD_KERNEL 'nunba'; allowed: numba, triton, reference" in capsys.readouterr().err
