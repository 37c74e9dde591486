"""What the rows say is what was there: signals against numbers computed another way; what observing may not do."""

import math
import traceback

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad.quantization import quantize
from altgrad.training import ARMS, TrainConfig, Trainer
from altgrad.training.catalogue import SIGNALS, Signal, as_table, over_layers
from altgrad.training.observers import GradientNormScore
from altgrad.training.observers.tensors import OutputSums
from altgrad.training.reference import ReferenceCurve

LAYER = "transformer.h.0.mlp.c_fc"
ALWAYS = {"exact_ranks_every": 1, "detail_every": 1, "shadow_every": 1}


def config(arm: str = "adamw", **changes) -> TrainConfig:
    base = {
        "model": {"layers": 1, "heads": 2, "width": 16, "block": 16},
        "data": {"batch": 2, "eval_batches": 1},
        "steps": 4,
        "log_interval": 1,
        "eval_interval": 4,
        "checkpoint_interval": 4,
        "format": "E4M3",
        "optimizer": ARMS[arm].model_dump(),
        "observe": ALWAYS,
        "guards": (),
    }
    return TrainConfig(**(base | changes))


class Watched(Trainer):
    """Keeps copies of what one layer's last step looked like."""

    def _before_update(self):
        weight = self.model.get_submodule(LAYER).weight
        self.seen = {"before": weight.detach().clone(), "gradient": weight.grad.clone()}
        return super()._before_update()

    def _train_step(self, step, **rest):
        layer = self.model.get_submodule(LAYER)
        hook = layer.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0].detach().clone()))
        self.inputs: list[torch.Tensor] = []
        values = super()._train_step(step, **rest)
        hook.remove()
        self.seen |= {"after": layer.weight.detach().clone(), "input": self.inputs[0]}
        return values


@pytest.fixture(scope="module")
def watched():
    base = Trainer(config(format="BF16"))
    base.run()
    trainer = Watched(config(policy="uniform_act"), reference=ReferenceCurve.of_rows(base.rows))
    trainer.run()
    row = trainer.rows[-1]
    return {k: v.double().numpy() for k, v in trainer.seen.items()}, row["layers"][LAYER], row, base.rows[-1]


def test_gradients_and_updates(watched):
    seen, layer, _, _ = watched
    gradient, before, after = seen["gradient"], seen["before"], seen["after"]
    assert layer["grad_l2"] == pytest.approx(np.sqrt((gradient**2).sum()))
    assert layer["grad_linf"] == pytest.approx(np.abs(gradient).max())
    assert layer["grad_snr"] == pytest.approx(abs(gradient.mean()) / gradient.std())
    assert layer["grad_zero"] == (gradient == 0).mean()
    rms = np.sqrt(((after - before).astype(np.float32).astype(float) ** 2).mean() / (before**2).mean())
    assert layer["update_ratio"] == pytest.approx(rms, rel=1e-5)
    assert layer["zero_updates"] == (after == before).mean() and layer["dead_units"] == 0


def test_ranks(watched):
    seen, layer, _, base = watched
    s = np.linalg.svd(seen["after"], compute_uv=False)
    energy = s**2 / (s**2).sum()
    p = s / s.sum()
    assert layer["stable_rank"] == pytest.approx(1 / energy[0], rel=1e-6)
    assert layer["spectral_norm"] == pytest.approx(s[0], rel=1e-6)
    assert layer["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert layer["variance_rank"] == 1 + (energy.cumsum() < 0.99).sum()
    assert layer["spread"] == pytest.approx(1 - energy[0], rel=1e-6)
    own = base["layers"][LAYER]
    assert layer["rank_ratio"] == pytest.approx(layer["stable_rank"] / own["stable_rank"])
    assert layer["spread_ratio"] == pytest.approx((1 - energy[0]) / (1 - 1 / own["stable_rank"]))
    assert layer["spectral_ratio"] == pytest.approx(s[0] / own["spectral_norm"])


def test_activations_and_grids(watched):
    seen, layer, _, _ = watched
    x, weight = seen["input"], torch.from_numpy(seen["after"]).float()
    scale = np.float32(np.abs(x).max()) / np.float32(448)
    rounded = quantize(torch.from_numpy(x).float(), "E4M3", float(scale)).double().numpy()
    assert layer["activation_amax"] == pytest.approx(np.abs(x).max())
    assert layer["activation_kurtosis"] == pytest.approx(stats.kurtosis(x.ravel(), fisher=False), rel=1e-6)
    assert layer["activation_sqnr"] == pytest.approx(10 * np.log10((x**2).sum() / ((x - rounded) ** 2).sum()), abs=0.01)
    assert layer["activation_underflow"] == pytest.approx(((rounded == 0) & (x != 0)).mean(), abs=1e-3)
    assert layer["activation_overflow"] == 0
    own = float(weight.abs().max() / 448)
    codes = np.unique(quantize(weight, "E4M3", own).numpy())
    assert layer["codes_in_use"] == pytest.approx(len(codes) / 253, abs=0.01)
    distance = (weight - quantize(weight, "E4M3", own)).abs().max() / weight.abs().max()
    assert 0 < layer["grid_distance"] < 0.5 and distance < 2.0**-4


def test_the_largest_attention_logit(watched):
    _, _, row, _ = watched
    trainer = Trainer(config(policy="uniform_act", steps=1, eval_interval=1, checkpoint_interval=1))
    found = []
    attention = trainer.model.get_submodule("transformer.h.0.attn")
    hook = attention.c_attn.register_forward_hook(lambda _, args, y: found.append(y.detach().double()))
    trainer.run()
    hook.remove()
    query, key, _ = found[0].unflatten(-1, (3, 2, 8)).unbind(2)
    logits = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(8)
    value = trainer.rows[-1]["layers"]["transformer.h.0.attn"]["attention_logit_max"]
    assert value == pytest.approx(logits.max().item(), rel=1e-5) and row["attention_logit_max"] != value


@pytest.mark.parametrize(("format_name", "least"), [("FP32", 1.0), ("E3M4", 0.9)])
def test_the_shadow_has_the_float32_gradient(format_name, least):
    trainer = Watched(config(format=format_name, steps=1, eval_interval=1, checkpoint_interval=1))
    trainer.run()
    row = trainer.rows[-1]
    plain = Watched(config(format="FP32", steps=1, eval_interval=1, checkpoint_interval=1))
    plain.run()
    own, shadow = (t.seen["gradient"].double().flatten() for t in (trainer, plain))
    cosine = torch.nn.functional.cosine_similarity(own, shadow, dim=0).item()
    assert row["layers"][LAYER]["gradient_cosine"] == pytest.approx(cosine) and cosine >= least - 1e-9
    assert least - 1e-9 <= row["gradient_cosine"] <= 1 + 1e-9
    snr = row["layers"][LAYER]["gradient_shadow_snr"]
    if format_name == "FP32":
        assert snr == math.inf
    else:
        assert snr == pytest.approx(10 * (shadow.square().sum() / (own - shadow).square().sum()).log10().item())


def test_the_catalogue_is_what_rows_hold(watched):
    _, _, row, _ = watched
    missing = [name for name in SIGNALS if name not in row]
    assert missing == []
    layers = {name for values in row["layers"].values() for name in values}
    assert [name for name, signal in SIGNALS.items() if signal.of_layers and name not in layers] == []
    assert layers - set(SIGNALS) == {"rescaled"}
    for name, value in over_layers(row["layers"]).items():
        assert row[name] == value or math.isnan(value)
    assert [line[0] for line in as_table()] == list(SIGNALS)


class CountedSyncs(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a scalar out of a tensor.

    On a CPU scales are checked, and compiled kernels take them as numbers; on a GPU neither is so.
    """

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            frames = traceback.extract_stack()
            self.count += not any("quantization/kernels" in f.filename or f.name == "_check_scales" for f in frames)
        return function(*args, **(kwargs or {}))


def test_an_interval_is_fetched_at_once(monkeypatch):
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or tolist(self))
    trainer = Trainer(
        config(
            steps=20,
            log_interval=5,
            eval_interval=20,
            checkpoint_interval=20,
            observe={"exact_ranks_every": 1, "detail_every": 1},
        )
    )
    intervals = trainer.intervals()
    next(intervals)  # compiles
    lists.clear()
    with CountedSyncs() as syncs:
        next(intervals)
    assert len(lists) == 1
    assert syncs.count == 0


def test_a_norm_that_is_not_finite_scores_nothing_and_spoils_nothing():
    norms = [1.0 + 0.1 * math.sin(i) for i in range(60)]
    clean, poisoned = GradientNormScore(), GradientNormScore()
    scores = [clean.update(norm) for norm in norms]
    assert math.isnan(poisoned.update(math.nan)) and math.isnan(poisoned.update(math.inf))
    assert [poisoned.update(norm) for norm in norms][20:] == scores[20:]
    assert all(math.isnan(score) for score in scores[:10]) and max(scores[10:]) < 2.5
    assert poisoned.update(5.0) > 10
    assert abs(poisoned.update(1.0)) < 1.5


def test_outputs_are_summed_where_the_loss_asks_for_it():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    sums, device = OutputSums(model), torch.device("cpu")

    def step(*inputs: float) -> list[bool]:
        sums.start_step()
        for value in inputs:
            sums.start_forward()
            sums.end_forward(model(torch.full((1, 3), value)).sum())
        return torch.isfinite(sums.end_step(device)).tolist()

    assert step(1.0) == [True, True, True] and sums.names == ["0", "1", "2"]
    assert sums.end_step(device).tolist() == [0.0, 0.0, 0.0]
    assert step(math.nan, 1.0) == step(1.0, math.nan) == [False, False, False]
    with torch.no_grad():
        model[2].bias[0] = math.inf
    assert step(1.0) == [True, True, False]
    sums.start_step()
    model(torch.full((1, 3), math.nan))  # not in a forward pass of the step
    assert torch.isfinite(sums.end_step(device)).all()
    sums.close()
    assert step(1.0) == [True, True, True]


def test_stiffness_is_the_spacing_where_the_weights_lie():
    """So one grid under two names has one stiffness."""
    found = []
    for name in ("E0M7", "E1M6", "E7M0"):
        trainer = Watched(config(format=name))
        trainer.run()
        found.append(trainer.rows[-1]["layers"][LAYER]["stiffness"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    weight = trainer.seen["after"].double().numpy()
    scale = np.abs(weight).max() / 2.0**64  # E7M0: powers of two to 2^64, each half its own size below the next
    expected = np.floor(np.log2(np.abs(weight[weight != 0]) / scale)) + np.log2(scale)
    assert found[2] == pytest.approx(expected.mean(), abs=0.01)


def test_a_signal_of_weights_is_one_line_of_the_catalogue(monkeypatch):
    """Measured at checks, in the row by its rule and in every layer; nothing else has to know it."""
    own = config(log_interval=2, observe={"detail_every": 2})
    before = Trainer(own).run()
    largest = Signal(
        "largest magnitude", "the weight's", row="max", least=0, of_weight=lambda weight: weight.abs().amax()
    )
    rarer = Signal("mean", "the weight's", "detail", "mean", of_weight=lambda weight: weight.mean())
    monkeypatch.setitem(SIGNALS, "largest", largest)
    monkeypatch.setitem(SIGNALS, "middle", rarer)
    trainer = Trainer(own)
    assert trainer.run().train_loss == before.train_loss, "observers change nothing"
    row = trainer.rows[-1]
    weights = {name: parameter.abs().max().item() for name, (parameter, _) in trainer.formats.items()}
    assert {name: values["largest"] for name, values in row["layers"].items() if "largest" in values} == weights
    assert row["largest"] == max(weights.values())
    assert [("middle" in each) for each in trainer.rows if "largest" in each] == [True, False], "detail is rarer"
