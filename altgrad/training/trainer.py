"""The loop. There is one, and every executor runs it.

    batch → forward → backward → before_update → step → after_update → guards → log

The model is rewritten once, before the loop (`quantize_model`), so the loop knows nothing of formats. Losses and
gradient norms stay 0-d tensors until the log interval ends; then everything is fetched together, guards judge the
interval, rows are flushed, and the caller gets control (`intervals`), which is where Ray listens. A guard's verdict
is answered here, by the worker itself: checkpoint, outcome, return.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from altgrad.quantization import dequantize_model, named_policy, quantize_model, quantized_parameters
from altgrad.training.arms import build_optimizer
from altgrad.training.checkpoint import load_checkpoint, save_checkpoint
from altgrad.training.config import UNQUANTIZED, ScheduleConfig, TrainConfig
from altgrad.training.guards import GuardPanel, Verdict, verdict_fields
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import TrialFolder
from altgrad.training.signals import StepSignals, layer_name
from altgrad.training.tasks import build_task, check_fingerprint, save_vocabulary


class Reporter(Protocol):
    """Who listens to a run: a Ray actor, a Ray Train worker, a test."""

    def report(self, row: dict[str, Any]) -> None:
        """Takes the last row of a log interval."""


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on the base learning rate at `step` (1-based)."""
    warm = min(1.0, step / schedule.warmup) if schedule.warmup else 1.0
    if schedule.kind == "cosine":
        progress = min(1.0, max(0.0, (step - schedule.warmup) / max(1, steps - schedule.warmup)))
        return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    if schedule.kind == "wsd":
        return warm * min(1.0, (steps - step + 1) / (schedule.decay_fraction * steps))
    return warm


class Trainer:
    """Trains one configuration, from its checkpoint where there is one.

    With a `folder` the run leaves its record there (see `record.py`); without, nothing is written. `run()` returns
    the Outcome; `intervals()` does the same work in pieces, yielding the last row of each log interval. After either,
    `outcome` and, in memory, `rows` hold what happened in this attempt.
    """

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter | None = None,
        *,
        folder: Path | None = None,
        observe: bool = True,
    ) -> None:
        self.config = config
        self.reporter = reporter
        self.folder = None if folder is None else TrialFolder(folder)
        self.outcome: Outcome | None = None
        self.rows: list[dict[str, Any]] = []
        self.task = build_task(config)
        self.model = self.task.build()
        if config.format != UNQUANTIZED:
            self.conversion = quantize_model(
                self.model, policy=named_policy(config.policy, config.format), seed=config.seed
            )
        self.formats = quantized_parameters(self.model)
        if not getattr(config.optimizer, "quantized", True):
            dequantize_model(self.model)
        self.optimizer = build_optimizer(config, self.model, dict(self.formats.values()))
        self.optimizer.telemetry = observe
        self.signals = StepSignals(self.model, self.optimizer, self.formats) if observe else None
        self.panel = GuardPanel(config.guards)
        self._names = [layer_name(name) for name, _ in self.model.named_parameters()]
        self.step = 0
        self.resumed_from: int | None = None
        self._base_lr = config.optimizer.lr
        self._first_loss: float | None = None
        self._last: dict[str, float] = {}
        self._seconds = 0.0

    def run(self) -> Outcome:
        """Trains to the end and returns how it ended."""
        for row in self.intervals():
            if self.reporter is not None:
                self.reporter.report(row)
        assert self.outcome is not None
        return self.outcome

    def intervals(self) -> Iterator[dict[str, Any]]:
        """Trains one log interval per item. Closing the generator early leaves the folder to the next attempt."""
        if self.folder is None:
            yield from self._train()
            return
        with self.folder:
            self._resume(self.folder)
            yield from self._train()

    def _train(self) -> Iterator[dict[str, Any]]:
        verdict: Verdict | None = None
        while self.step < self.config.steps and verdict is None:
            rows = self._interval()
            verdict = self.panel.check(rows)
            self._keep(rows, verdict)
            if verdict is not None or self.step >= self.config.steps:
                self._finish(verdict)
            yield rows[-1]
        if self.outcome is None:
            self._finish(None)

    def _interval(self) -> list[dict[str, Any]]:
        """Trains up to the next multiple of the log interval and returns a row per step."""
        started = time.perf_counter()
        config = self.config
        end = min(config.steps, (self.step // config.log_interval + 1) * config.log_interval)
        first, rates, pending = self.step + 1, [], []
        for step in range(first, end + 1):
            rates.append(self._set_learning_rate(step))
            pending.append(self._train_step(step))
        self.step = end
        fetched = torch.stack(pending).tolist()
        rows = [self._row(first + i, rates[i], *values) for i, values in enumerate(fetched)]
        last = rows[-1]
        if self.signals is not None:
            last |= self.signals.collect()
        elapsed = time.perf_counter() - started
        last[self.task.throughput] = len(rows) * self.task.units() / elapsed
        if end % config.eval_interval == 0 or end == config.steps:
            last |= self.task.evaluate(self.model)
        self._seconds += time.perf_counter() - started
        return rows

    def _row(self, step: int, rate: float, loss: float, norm: float, *norms: float) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": step,
            "train_loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "loss_excess": self._excess(loss),
        }
        if not math.isfinite(norm):
            # Gradients flow backwards: of the broken layers, the last is the nearest to the cause.
            broken = [
                name for name, value in zip(self._names, norms, strict=True) if not math.isfinite(value)
            ]
            row["nonfinite_layer"] = broken[-1] if broken else None
        return row

    def _train_step(self, step: int) -> Tensor:
        """One step; returns loss, total and per-parameter gradient norms, as one tensor that nobody waited for."""
        loss = self.task.loss(self.model, step)
        loss.backward()
        norms = self._before_update()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.signals is not None:
            self.signals.after_update()
        return torch.cat([loss.detach()[None], norms])

    def _before_update(self) -> Tensor:
        """Clips the gradients to the global norm; returns the total and each parameter's L2 norm before that."""
        parameters = list(self.model.parameters())
        gradients = [torch.zeros(()) if p.grad is None else p.grad for p in parameters]
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
        total = torch.linalg.vector_norm(norms)
        if self.config.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad_norm, total)
        return torch.cat([total[None], norms])

    def _set_learning_rate(self, step: int) -> float:
        rate = self._base_lr * learning_rate_factor(self.config.schedule, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _excess(self, loss: float) -> float:
        """Nats above the loss of the first step."""
        if self._first_loss is None:
            self._first_loss = loss
        return loss - self._first_loss

    def _keep(self, rows: list[dict[str, Any]], verdict: Verdict | None) -> None:
        self.rows += rows
        self._last |= {
            name: value
            for name, value in rows[-1].items()
            if name in ("train_loss", "val_loss", "bits_per_byte")
        }
        if self.folder is None:
            return
        self.folder.append(rows)
        if (
            verdict is not None
            or self.step % self.config.checkpoint_interval == 0
            or self.step >= self.config.steps
        ):
            save_checkpoint(self.folder.checkpoint_path, self._state())

    def _finish(self, verdict: Verdict | None) -> None:
        ending: dict[str, Any] = {"kind": OutcomeKind.DONE, "step": self.step}
        if verdict is not None:
            ending = verdict_fields(verdict)
        self.outcome = Outcome(**ending, **self._last, seconds=self._seconds)  # type: ignore[arg-type]
        if self.folder is not None:
            self.folder.finish(self.outcome)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "guards": self.panel.state_dict(),
            "first_loss": self._first_loss,
            "last": self._last,
            "seconds": self._seconds,
            "data": self.task.fingerprint(),
        }

    def _resume(self, folder: TrialFolder) -> None:
        state = load_checkpoint(folder.checkpoint_path)
        if state is not None:
            check_fingerprint(state["data"], self.task.fingerprint())
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.panel.load_state_dict(state["guards"])
            self.step = self.resumed_from = state["step"]
            self._first_loss, self._last, self._seconds = state["first_loss"], state["last"], state["seconds"]
        folder.begin(
            {
                "config": self.config.model_dump(mode="json"),
                "data_sha256": self.task.data.sha256,
                "resumed_from": self.resumed_from,
            },
            after_step=self.step,
        )
        save_vocabulary(self.task, folder.path)
