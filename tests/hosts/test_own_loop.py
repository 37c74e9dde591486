"""Any arm in a loop of one's own: the README's recipe as it stands there, accelerate, and the obvious calls."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_models import batch, loss_of, net
from torch import Tensor, nn

from altgrad.quantization import LayerRule, PrecisionPolicy, quantize_model, quantized_parameters
from altgrad.training import ARMS, GridOptim, ManifoldAdamW, RoundedAdamW, RoundedOptimizer, build_arm

README = Path(__file__).parents[2] / "README.md"


class WithLoss(nn.Module):
    """As models of transformers are called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(None)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=loss_of(self.net, x))


def test_the_recipe_of_the_readme_trains_and_logs():
    (recipe,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "build_arm(" in code)
    torch.manual_seed(0)
    model, logged = WithLoss(), []
    before = float(model(batch(0)).loss)
    exec(recipe, {"model": model, "batches": [{"x": batch(0)} for _ in range(20)], "log": logged.append})
    assert float(model(batch(0)).loss) < 0.9 * before and len(logged) == 20
    signals = logged[0]["net.head"]
    assert set(signals) == {"flips", "flip_rate", "flip_yield", "stall_ratio", "stable_rank", "effective_rank"}
    assert signals["flips"] > 0 and 1 <= signals["stable_rank"] <= 4


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_is_built_by_its_name(arm):
    model = net(None)
    options = {"lr": 0.1} if arm == "grid_literal" else {}
    optimizer = build_arm(model, arm, format="E5M2", **options)
    before = float(loss_of(model, batch(0)))
    for _ in range(5):
        loss_of(model, batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss_of(model, batch(0))) < before
    assert bool(quantized_parameters(model)) == (arm != "manifold_fp32")


def test_what_build_arm_refuses():
    with pytest.raises(ValueError, match=r"unknown arm 'manifld'.*nearest: manifold"):
        build_arm(net(None), "manifld", format="E4M3")
    with pytest.raises(ValueError, match=r"unknown option of grid 'rung_clp'.*nearest: rung_clip"):
        build_arm(net(None), "grid", format="E4M3", rung_clp=3)
    with pytest.raises(ValueError, match="lr=-1: Input should be greater than 0"):
        build_arm(net(None), "grid", format="E4M3", lr=-1)
    with pytest.raises(ValueError, match="needs format="):
        build_arm(net(None), "grid")
    with pytest.raises(ValueError, match="converted already"):
        build_arm(net("E4M3"), "grid", format="E5M2")
    assert "E3M4" in {group["format"] for group in build_arm(net("E3M4"), "grid").param_groups}


MAKERS: dict[str, Any] = {
    "adamw": RoundedAdamW,
    "manifold": ManifoldAdamW,
    "grid": GridOptim,
    "lion": lambda params, **options: RoundedOptimizer(params, "lion", **options),
}


@pytest.mark.parametrize("arm", MAKERS)
@pytest.mark.parametrize("split", ["one list", "with and without decay", "names"])
def test_exactly_the_converted_weights_take_the_formats_of_their_layers(arm, split):
    model = net(None)
    rules = [LayerRule(pattern=pattern, weight=weight) for pattern, weight in (("head", "E3M4"), ("", "E5M2"))]
    quantize_model(model, policy=PrecisionPolicy(rules=tuple(rules)))
    flat, matrices = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (False, True))
    params = {
        "one list": lambda: model.parameters(),
        # Norms and biases come first, in a group without any converted weight.
        "with and without decay": lambda: [{"params": flat}, {"params": matrices}],
        "names": lambda: model.named_parameters(),
    }[split]()
    optimizer = MAKERS[arm](params, lr=1e-3)
    found = {p: group["format"] for group in optimizer.param_groups for p in group["params"]}
    wanted = {p: fmt.name for p, fmt in quantized_parameters(model).values()}
    assert found == dict.fromkeys(model.parameters()) | wanted
    with pytest.raises(ValueError, match="E3M4"):
        MAKERS[arm](model.parameters(), lr=1e-3, format="E5M2")


def test_over_a_model_that_is_not_converted_it_says_what_it_puts_there(caplog):
    converted = net("E4M3")
    with caplog.at_level(logging.WARNING, "altgrad"):
        GridOptim(net(None).named_parameters(), lr=1e-3, format="E4M3")
        GridOptim(converted.parameters(), lr=1e-3, format="E4M3")
        GridOptim([{"params": list(net(None).parameters()), "format": None}], lr=1e-3)
    (said,) = caplog.messages
    assert "13 tensors take the format E4M3" in said and "blocks.0.0.weight (16,)" in said and "9 more" in said


def test_weights_that_a_model_reads_past_their_layers_are_named(caplog):
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.through, self.past = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.through(x) @ self.past.weight

    model = Past()
    optimizer = build_arm(model, "manifold", format="E4M3")
    for _ in range(2):
        model(batch(0)).square().mean().backward()
        optimizer.step()
    lookup = nn.Sequential(nn.Embedding(4, 8), nn.Conv1d(3, 3, 1))
    quantize_model(lookup, policy=PrecisionPolicy(rules=(LayerRule(pattern="", weight="E4M3"),), embeddings=True))
    optimizer = GridOptim(lookup.parameters(), lr=1e-3)
    lookup(torch.ones(2, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    (said,) = (message for message in caplog.messages if "never ran" in message)
    assert said.startswith("1 converted weights have a gradient") and "(16, 16)" in said


@pytest.mark.parametrize("arm", ["manifold", "grid"])
def test_accelerate_trains_as_a_plain_loop_does(arm):
    import accelerate

    losses = []
    for is_plain in (True, False):
        model = net(None)
        optimizer = build_arm(model, arm, format="E4M3", lr=1e-2)
        accelerator = None if is_plain else accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        if accelerator is not None:
            model, optimizer = accelerator.prepare(model, optimizer)
        own = []
        for step in range(6):
            for half in range(2):
                if accelerator is None:
                    loss = loss_of(model, batch(2 * step + half))
                    (loss / 2).backward()
                else:
                    with accelerator.accumulate(model):
                        loss = loss_of(model, batch(2 * step + half))
                        accelerator.backward(loss)
                        optimizer.step()
                        optimizer.zero_grad()
                own.append(float(loss))
            if accelerator is None:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(own)
    assert losses[0] == losses[1]
