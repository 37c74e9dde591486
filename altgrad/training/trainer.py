"""The loop. There is one, and every executor runs it.

    batch → forward → backward → before_update → step → after_update → interventions → guards → log

The model is rewritten once, before the loop (`quantize_model`), so the loop knows nothing of formats. Losses, norms
and all that observers measure stay on the device until the log interval ends; then everything is fetched together,
declared interventions and guards judge the interval, rows are flushed, and the caller gets control (`intervals`),
which is where Ray listens. A guard's verdict is answered here, by the worker itself: checkpoint, outcome, return.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from altgrad.quantization import FormatShift, dequantize_model, quantize_model, quantized_parameters, requantize_layer
from altgrad.training.arms import build_optimizer
from altgrad.training.checkpoint import load_checkpoint, save_checkpoint
from altgrad.training.config import BASELINE, UNQUANTIZED, ScheduleConfig, TrainConfig
from altgrad.training.devices import Device, device_of, places_of
from altgrad.training.guards import GuardPanel, Verdict, check_layers, verdict_fields
from altgrad.training.interventions import Interventions, describe_clip
from altgrad.training.observers import GradientNormScore, Observer, Observers, Subject
from altgrad.training.observers.prospects import ProspectsObserver
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import TrialFolder
from altgrad.training.reference import ReferenceCurve
from altgrad.training.shadow import ShadowObserver
from altgrad.training.tasks import build_task, check_fingerprint, save_vocabulary
from altgrad.training.workers import ALONE, Workers


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
    `outcome` and, in memory, `rows` hold what happened in this attempt. `reference`: the curve of a healthy run, for
    the signals that are held against one; without it they are not measured. With `guarded=False` the run leaves its
    guards to whoever listens. `workers`: this process's place among those that share the training; only the first
    observes and writes, and a folder is given to all of them. `device` holds the model; the record says which it was.
    `text_sha256`: of the text it must be trained on (DataChanged where the source holds another). `keep_checkpoints`:
    every checkpoint stays, not only the newest.
    """

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter | None = None,
        *,
        folder: Path | None = None,
        observe: bool = True,
        reference: ReferenceCurve | None = None,
        guarded: bool = True,
        workers: Workers = ALONE,
        device: Device | torch.device | str = "cpu",
        text_sha256: str | None = None,
        keep_checkpoints: bool = False,
    ) -> None:
        workers.check(config.data.batch)
        observe = observe and workers.is_first
        self.config = config
        self.workers = workers
        self.reporter, self._keep_checkpoints = reporter, keep_checkpoints
        self.folder = None if folder is None or not workers.is_first else TrialFolder(folder)
        self.outcome: Outcome | None = None
        self.rows: list[dict[str, Any]] = []
        self.device = device if isinstance(device, Device) else device_of(device)
        self.devices: list[dict[str, str]] = []
        """on which the steps so far were trained, of this attempt and earlier ones"""
        self.task = build_task(config, text_sha256)
        self.model = self.task.build().to(self.device.torch_device)
        check_layers(config.guards, self.model)
        share = 0.0
        if config.format != UNQUANTIZED:
            share = quantize_model(self.model, policy=config.precision, seed=config.seed).share
        self.formats = quantized_parameters(self.model)
        if not config.optimizer.rounds_operands:
            dequantize_model(self.model)
        self._quantized_share = share if config.optimizer.rounds_operands else 0.0
        self.reference = reference
        self.optimizer = build_optimizer(config, self.model, dict(self.formats.values()))
        # Beside a backward pass, counting every step costs little.
        self.optimizer.telemetry, self.optimizer.count_every = observe, 1
        self.observers = self._build_observers() if observe else None
        self.panel = GuardPanel(config.guards if guarded else ())
        self.interventions = Interventions(config.interventions)
        self._score = GradientNormScore()
        self.step = 0
        self.resumed_from: int | None = None
        self._named = dict(self.model.named_parameters())
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
            self._restore(self.workers.from_first(None))
            self._enter_device()
            yield from self._train()
            return
        with self.folder:
            state = load_checkpoint(self.folder.checkpoint_path)
            self._restore(self.workers.from_first(state))
            self._enter_device()
            self._begin(self.folder)
            yield from self._train()

    def checkpoint(self) -> None:
        """Saves the state as it stands, between two intervals, for a run that is to go on later."""
        if self.folder is not None:
            save_checkpoint(self.folder.checkpoint_path, self._state(), keep=self._keep_checkpoints)

    def _train(self) -> Iterator[dict[str, Any]]:
        verdict: Verdict | None = None
        while self.step < self.config.steps and verdict is None:
            rows = self._interval()
            decides = self.workers.is_first
            shift = self.workers.from_first(self.interventions.shift(rows, self._format_names()) if decides else None)
            if shift is not None:
                self._apply(shift)
                self.panel.forget()
                rows[-1]["shifts"] = [f"{shift.layer}: {shift.label}"]
            else:
                verdict = self.workers.from_first(self.panel.check(rows) if decides else None)
                rows[-1] |= {"warnings": [w.message() for w in self.panel.warnings]} if self.panel.warnings else {}
            rows[-1] |= {} if self.interventions.formats is None else {"formats": self.interventions.formats}
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
        self._named = dict(self.model.named_parameters())  # a walk through all modules: once, not twice a step
        for step in range(first, end + 1):
            rates.append(self._set_learning_rate(step))
            pending.append(self._train_step(step, check=step == end))
        self.step = end
        measured = [] if self.observers is None else [self.observers.collect()]
        fetched = torch.cat([torch.stack(pending).flatten(), *measured]).tolist()
        width = len(pending[0])
        rows = [self._row(first + i, rate, fetched[i * width : (i + 1) * width]) for i, rate in enumerate(rates)]
        last = rows[-1]
        if self.observers is not None:
            last |= self.observers.row(fetched[len(rows) * width :]) | {"quantized_share": self._quantized_share}
        elapsed = time.perf_counter() - started
        last[self.task.throughput] = len(rows) * self.task.units() / elapsed
        if end % config.eval_interval == 0 or end == config.steps:
            last |= self.task.evaluate(self.model) if self.workers.is_first else {}
        self._seconds += time.perf_counter() - started
        return rows

    def _row(self, step: int, rate: float, values: list[float]) -> dict[str, Any]:
        """A step's row from what `_train_step` returned for it."""
        names = [name.removesuffix(".weight") for name in self._named]
        loss, norm, values = values[0], values[1], values[2:]
        row: dict[str, Any] = {
            "step": step,
            "train_loss": loss,
            "grad_norm": norm,
            "grad_norm_z": self._score.update(norm),
            "lr": rate,
            "loss_excess": self._excess(loss),
        }
        expected = None if self.reference is None else self.reference.loss(step)
        if expected is not None:
            row["loss_gap"] = loss - expected
        if self.interventions.clips:
            row |= describe_clip(*values[len(names) : len(names) + 2])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            outputs = values[len(names) + 2 * self.interventions.clips :]
            row["nonfinite_layer"] = self._broken_layer(loss, outputs, values[: len(names)], names)
        return row

    def _broken_layer(self, loss: float, outputs: list[float], norms: list[float], names: list[str]) -> str | None:
        """Where it broke: with the loss, the first module whose output did; else the gradient nearest to its cause."""
        modules = [] if self.observers is None else self.observers.modules
        broken = [name for name, value in zip(modules, outputs, strict=True) if not math.isfinite(value)]
        if not math.isfinite(loss):
            return broken[0] if broken else None
        # Gradients flow backwards: of the broken layers, the last is the nearest to the cause.
        late = [name for name, value in zip(names, norms, strict=True) if not math.isfinite(value)]
        return late[-1] if late else None

    def _train_step(self, step: int, *, check: bool) -> Tensor:
        """One step: loss, gradient norms, clipping and output sums, as one tensor that nobody waited for."""
        if self.observers is not None:
            self.observers.start_step(step, check=check)
        loss = self._backward(step)
        outputs = loss.new_zeros(0) if self.observers is None else self.observers.end_passes(loss.device)
        loss = self.workers.average(loss, self.model)
        if self.observers is not None:
            self.observers.before_update()
        norms = self._before_update()
        self.optimizer.step()
        if self.observers is not None:
            self.observers.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.cat([loss.double()[None], norms, outputs.double()])

    def _backward(self, step: int) -> Tensor:
        """This worker's share of the batch, forward and backward; its mean loss, 0-d."""
        losses = []
        for share in self.workers.shares:
            if self.observers is not None:
                self.observers.start_forward()
            loss = self.task.loss(self.model, step, share)
            if self.observers is not None:
                self.observers.end_forward(loss)
            pieces = self.workers.micro_batches
            (loss / pieces if pieces > 1 else loss).backward()
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _before_update(self) -> Tensor:
        """Clips the gradients; their total and each parameter's L2 norm before that, and what clipping did."""
        named = self._named
        norms = _norms(named)
        total = torch.linalg.vector_norm(norms)
        clipped = self.interventions.before_step(named, self._parameter_formats())
        if self.config.clip_grad_norm is not None:
            left = torch.linalg.vector_norm(_norms(named)) if self.interventions.clips else total
            torch.nn.utils.clip_grads_with_norm_(named.values(), self.config.clip_grad_norm, left)
        return torch.cat([total[None].double(), norms.double(), clipped])

    def _format_names(self) -> dict[str, str]:
        """Format by layer."""
        return {name: fmt.name for name, (_, fmt) in self.formats.items()}

    def _parameter_formats(self) -> dict[str, str]:
        """Format by parameter, of those that have one."""
        if not self.interventions.clips:
            return {}
        by_parameter = {parameter: fmt.name for parameter, fmt in self.formats.values()}
        return {name: by_parameter[p] for name, p in self.model.named_parameters() if p in by_parameter}

    def _build_observers(self) -> Observers:
        critical: tuple[str, ...] = self.model.critical_layers()  # type: ignore[operator]
        subject = Subject(self.model, self.optimizer, self.formats, critical, self.task.epoch())
        config = self.config.observe
        extra: list[Observer] = [] if config.shadow_every is None else [ShadowObserver(subject, self.task)]
        is_baseline = self.config.is_reference and self.config.format == BASELINE
        extra += [ProspectsObserver(subject, self.config.optimizer.lr)] if is_baseline else []
        return Observers(subject, config, self.reference, extra)

    def _apply(self, *shifts: FormatShift) -> None:
        """Moves layers to other formats; the optimizer and the observers go on with them."""
        for shift in shifts:
            requantize_layer(self.model, shift.layer, shift.after)
        self.formats = quantized_parameters(self.model)
        before, self.optimizer = self.optimizer, build_optimizer(self.config, self.model, dict(self.formats.values()))
        self.optimizer.telemetry, self.optimizer.count_every = before.telemetry, before.count_every
        self.optimizer.adopt(before)
        if self.observers is not None:
            state = self.observers.state_dict()
            self.observers.close()
            self.observers = self._build_observers()
            self.observers.load_state_dict(state)

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
            name: value for name, value in rows[-1].items() if name in ("train_loss", "val_loss", "bits_per_byte")
        }
        if self.folder is None:
            return
        self.folder.append(rows)
        if verdict is not None or self.step % self.config.checkpoint_interval == 0 or self.step >= self.config.steps:
            self.checkpoint()

    def _finish(self, verdict: Verdict | None) -> None:
        ending: dict[str, Any] = {"kind": OutcomeKind.DONE, "step": self.step}
        if verdict is not None:
            ending = verdict_fields(verdict)
        ending["formats"] = self.interventions.formats or None
        places = places_of(self.devices)
        self.outcome = Outcome(**ending, **self._last, seconds=self._seconds, **places)  # type: ignore[arg-type]
        if self.folder is not None:
            self.folder.finish(self.outcome)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "guards": self.panel.state_dict(),
            "interventions": self.interventions.state_dict(),
            "observers": None if self.observers is None else self.observers.state_dict(),
            "grad_norm_score": self._score.state_dict(),
            "first_loss": self._first_loss,
            "last": self._last,
            "seconds": self._seconds,
            "data": self.task.fingerprint(),
            "devices": self.devices,
        }

    def _restore(self, state: dict[str, Any] | None) -> None:
        """Goes on exactly where the state was saved."""
        if state is None:
            return
        check_fingerprint(state["data"], self.task.fingerprint())
        self.interventions.load_state_dict(state["interventions"])
        if self.interventions.shifts:
            self._apply(*self.interventions.shifts)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.panel.load_state_dict(state["guards"])
        self._score.load_state_dict(state["grad_norm_score"])
        if self.observers is not None and state["observers"] is not None:
            self.observers.load_state_dict(state["observers"])
        self.step = self.resumed_from = state["step"]
        self._first_loss, self._last, self._seconds = state["first_loss"], state["last"], state["seconds"]
        self.devices = list(state.get("devices", ()))

    def _enter_device(self) -> None:
        if (own := self.device.to_dict()) not in self.devices:
            self.devices.append(own)

    def _begin(self, folder: TrialFolder) -> None:
        folder.begin(
            {
                "config": self.config.model_dump(mode="json"),
                "data_sha256": self.task.data.sha256,
                "resumed_from": self.resumed_from,
                "reference": None if self.reference is None else self.reference.version,
                "workers": self.workers.world,
                "micro_batches": self.workers.micro_batches,
                "devices": self.devices,
            },
            after_step=self.step,
        )
        save_vocabulary(self.task, folder.path)


def _norms(named: dict[str, torch.nn.Parameter]) -> Tensor:
    """[parameters] the L2 norm of each one's gradient, 0 where it has none."""
    gradients = [
        torch.zeros((), dtype=torch.float32, device=p.device) if p.grad is None else p.grad for p in named.values()
    ]
    return torch.stack(torch._foreach_norm(gradients))
