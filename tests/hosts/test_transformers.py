"""Models of Hugging Face, built from configs: what of them is quantized, its numbers, and training in Trainer."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from altgrad.quantization import (
    LayerRule,
    PrecisionPolicy,
    export_model,
    load_exported,
    quantize_model,
    rounded_weights,
)
from altgrad.training import build_arm

WIDTH, VOCABULARY, STEPS = 64, 64, 30
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = SHAPE | {"num_key_value_heads": 2, "vocab_size": VOCABULARY}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | ENDS),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32}
        | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        | ENDS,
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        LLAMA | {"num_local_experts": 4, "experts_implementation": "grouped_mm"} | ENDS,
    ),
    "bert": ("BertForMaskedLM", "BertConfig", SHAPE | CALM | {"vocab_size": VOCABULARY}),
    "vit": ("ViTForImageClassification", "ViTConfig", SHAPE | CALM | {"image_size": 16, "patch_size": 4}),
}


def per_layer(pattern: str, *names: str) -> list[str]:
    return [pattern.format(layer) + name for layer in range(2) for name in names]


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS = {
    "llama": [*per_layer("model.layers.{}.", *ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "lm_head"],
    "gpt2": [*per_layer("transformer.h.{}.", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), "lm_head"],
    "mixtral": [
        *per_layer("model.layers.{}.", *ATTENTION, "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "lm_head",
    ],
    "bert": [
        *per_layer(
            "bert.encoder.layer.{}.",
            *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
            *("intermediate.dense", "output.dense"),
        ),
        "cls.predictions.transform.dense",
        "cls.predictions.decoder",
    ],
    "vit": [
        "vit.embeddings.patch_embeddings.projection",
        *per_layer(
            "vit.layers.{}.",
            *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
        ),
        "classifier",
    ],
}
"""The weights that are to be converted, by the names that rules match."""


def library() -> Any:
    """Not while tests are collected: it loads triton, which the tests of GPU kernels want to set up first."""
    import transformers

    return transformers


def build(name: str) -> nn.Module:
    transformers = library()
    model, config, options = MODELS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**options))
    assert isinstance(built, nn.Module)
    return built


def batch(name: str, number: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(number)
    if name == "vit":
        labels = torch.randint(0, 2, (8,), generator=draw)
        images = torch.randn(8, 3, 16, 16, generator=draw) + labels[:, None, None, None]
        return {"pixel_values": images, "labels": labels}
    tokens = (torch.randint(0, VOCABULARY, (8, 1), generator=draw) + torch.arange(12) % 5) % VOCABULARY
    # Trainer divides by the number of labels; the first is nobody's next token.
    return {"input_ids": tokens, "labels": tokens.index_fill(1, torch.tensor(0), -100)}


@pytest.mark.parametrize(
    ("name", "experts"), [*((name, "eager") for name in MODELS), ("mixtral", "batched_mm"), ("mixtral", "grouped_mm")]
)
def test_a_model_is_converted_whole_and_computes_as_on_its_rounded_weights(name: str, experts: str) -> None:
    model = build(name)
    model.config._experts_implementation = experts  # type: ignore[union-attr]
    plain = copy.deepcopy(model)
    rule = LayerRule(pattern="", weight="E4M3", activation=None, gradient=None)  # type: ignore[arg-type]
    table = quantize_model(model, policy=PrecisionPolicy(rules=(rule,)))
    weights = rounded_weights(model)
    assert list(weights) == LAYERS[name] and table.product_share >= 0.95
    own, others = dict(model.named_parameters()), dict(plain.named_parameters())
    with torch.no_grad():
        for roles in weights.values():
            others[next(n for n, p in own.items() if p is roles.parameter())].copy_(roles.quantized_weight())
    losses = [side(**batch(name, 0)).loss for side in (model, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for n, p in own.items():
        torch.testing.assert_close(p.grad, others[n].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "path"), [("gpt2", "transformer.h.0.mlp.c_fc"), ("mixtral", "model.layers.0.mlp.gate")]
)
def test_layers_known_by_their_looks_take_surgery(name: str, path: str) -> None:
    model = build(name)
    quantize_model(model, format="E4M3")
    layer = model.get_submodule(path)
    prune.l1_unstructured(layer, "weight", 0.3)
    layer.adapter = nn.Parameter(torch.zeros(1))
    model(**batch(name, 0)).loss.backward()
    assert layer.get_parameter("weight_orig").grad is not None


@pytest.mark.parametrize("store", ["values", "codes"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "vit"])
def test_a_model_made_from_an_export_has_the_same_outputs(name: str, store: Any) -> None:
    model, plain = build(name), build(name)
    model.logit_scale = nn.Parameter(torch.ones(()))
    plain.logit_scale = nn.Parameter(torch.zeros(()))
    quantize_model(model, format="E4M3", policy="uniform_full")
    load_exported(plain, export_model(model, store=store))
    assert plain.logit_scale == 1
    own = {key: value for key, value in batch(name, 0).items() if key != "labels"}
    assert torch.equal(model.eval()(**own).logits, plain.eval()(**own).logits)


class Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The examples of `batch`, in its order."""

    def __init__(self, name: str) -> None:
        whole = [batch(name, number) for number in range(STEPS)]
        self._examples = [{key: value[i] for key, value in b.items()} for b in whole for i in range(8)]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._examples[index]


def train_in_own_loop(name: str, arm: str) -> list[float]:
    model = build(name)
    model.train()
    optimizer = build_arm(model, arm, format="E4M3", policy="uniform_full", lr=2e-3)
    losses = []
    for number in range(STEPS):
        loss = model(**batch(name, number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def train_in_trainer(name: str, arm: str, folder: Any) -> Iterator[float]:
    transformers = library()

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = build(name)
    optimizer = build_arm(model, arm, format="E4M3", policy="uniform_full", lr=2e-3)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    options = {"max_steps": STEPS, "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": [], "seed": 0}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, **options
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=Batches(name), optimizers=(optimizer, constant))
    trainer.train()
    return (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["manifold", "grid"])
@pytest.mark.parametrize("name", MODELS)
def test_trainer_trains_an_arm_as_a_loop_of_ones_own_does(name: str, arm: str, tmp_path: Any) -> None:
    own = train_in_own_loop(name, arm)
    assert all(torch.isfinite(torch.tensor(own))) and sum(own[-5:]) < 0.98 * sum(own[:5])
    assert list(train_in_trainer(name, arm, tmp_path)) == pytest.approx(own, abs=5e-5)  # the log has four decimals
