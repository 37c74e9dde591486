"""The document classifier under the laws of training, and what a checkpoint's ids are tied to."""

import json
from pathlib import Path

import pytest
import torch

from altgrad.quantization import quantized_parameters
from altgrad.training import ARMS, TrainConfig, Trainer
from altgrad.training.catalogue import CLASSIFICATION_SIGNALS
from altgrad.training.classifier import build_classifier
from altgrad.training.config import MODELS, ModelConfig
from altgrad.training.model import build_model
from altgrad.training.record import read_rows

TINY = {
    "task": "classify",
    "model": {"layers": 1, "heads": 2, "width": 32, "block": 64},
    "data": {"source": "synthetic", "tokenizer": "words", "batch": 8},
    "log_interval": 5,
    "eval_interval": 10,
    "checkpoint_interval": 10,
    "steps": 20,
}
CLOCKS = {"samples_per_s", "eval_samples_per_s"}


def config(arm: str = "adamw", **changes) -> TrainConfig:
    return TrainConfig(**({**TINY, "optimizer": ARMS[arm].model_dump()} | changes))


def course(trainer: Trainer) -> str:
    trainer.run()
    return str(
        [
            {k: v for k, v in row.items() if k not in CLOCKS and k in ("train_loss", "val_loss", "f1_micro")}
            for row in trainer.rows
        ]
    )


def test_padding_changes_nothing_but_what_is_read_does():
    model = build_classifier(ModelConfig(**TINY["model"]), vocabulary=50, labels=5, seed=0)
    tokens = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(0))
    length = torch.tensor([12])
    whole = model(tokens, length)
    other = tokens.clone()
    other[:, 12:] = 7
    assert torch.allclose(whole, model(other, length), atol=1e-6)
    assert torch.allclose(whole, model(tokens[:, :12], length), atol=1e-6)
    other[:, 11] = (other[:, 11] + 1) % 50
    assert not torch.allclose(whole, model(other, length), atol=1e-6)


@pytest.mark.parametrize("arm", ["adamw", "manifold", "grid"])
def test_equal_configurations_are_equal_and_observers_change_nothing(arm: str):
    one = course(Trainer(config(arm)))
    assert one == course(Trainer(config(arm))) == course(Trainer(config(arm), observe=False))
    assert one != course(Trainer(config(arm, seed=1)))


@pytest.mark.parametrize("arm", ["adamw", "manifold", "grid"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(arm: str, tmp_path: Path):
    straight = Trainer(config(arm, steps=30), folder=tmp_path / "straight")
    straight.run()
    first = Trainer(config(arm, steps=30), folder=tmp_path / "cut").intervals()
    for _ in range(5):
        next(first)
    first.close()
    resumed = Trainer(config(arm, steps=30), folder=tmp_path / "cut")
    resumed.run()
    assert resumed.resumed_from == 20
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_rows(t.folder.metrics_path)[0]]
        for t in (straight, resumed)
    ]
    assert str(rows[0]) == str(rows[1])
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns_what_the_commonest_labels_do_not_know():
    trainer = Trainer(config(format="BF16", steps=200, log_interval=20, eval_interval=200, checkpoint_interval=200))
    trainer.run()
    last = trainer.rows[-1]
    assert set(CLASSIFICATION_SIGNALS) <= set(last)
    assert last["f1_micro"] > 0.8 > 0.6 > last["baseline_f1_micro"]
    assert 0 < last["threshold"] < 1 and last["samples_per_s"] > 0


def test_the_threshold_comes_from_validation_documents_alone():
    def final(trainer: Trainer) -> dict:
        trainer.run()
        return trainer.rows[-1]

    plain, other = Trainer(config(format="BF16")), Trainer(config(format="BF16"))
    own = other.task.data
    object.__setattr__(own, "test", own.train)
    try:
        before, after = final(other), final(plain)
    finally:
        from altgrad.training.data import documents

        documents._load.cache_clear()
    assert before["threshold"] == after["threshold"] and before["val_loss"] == after["val_loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "words-50"}, "the checkpoint's vocabulary size is .*, that of the data is 50"),
        ({"label_names": tuple(f"topic_{8 - k}" for k in range(9))}, "the checkpoint's label vocabulary is"),
    ],
)
def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path: Path, change, message):
    Trainer(config(), folder=tmp_path / "t").run()
    other = Trainer(config(data=TINY["data"] | change), folder=tmp_path / "t")
    with pytest.raises(ValueError, match=message):
        other.run()


def test_a_checkpoint_of_another_tokenizer_is_refused_in_language_modelling(tmp_path: Path):
    shape = {"task": "lm", "model": TINY["model"]}
    Trainer(config(**shape, data={"source": "synthetic"}), folder=tmp_path / "t").run()
    with pytest.raises(ValueError, match="the checkpoint's vocabulary size is 256, that of the data is 300"):
        Trainer(config(**shape, data={"source": "synthetic", "tokenizer": "bpe-300"}), folder=tmp_path / "t").run()


def test_vocabularies_are_saved_with_the_run(tmp_path: Path):
    trainer = Trainer(config(), folder=tmp_path / "t")
    trainer.run()
    assert json.loads((tmp_path / "t" / "labels.json").read_text()) == list(trainer.task.data.labels)
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    assert saved.get_vocab_size() == trainer.task.data.tokenizer.vocabulary


def test_critical_layers_are_named_by_role_and_exist():
    gpt = build_model(ModelConfig(layers=2), vocabulary=256, seed=0)
    assert gpt.critical_layers()[0] == "lm_head" and len(gpt.critical_layers()) == 5
    model = Trainer(config()).model
    assert model.critical_layers()[0] == "classifier"
    assert set(model.critical_layers()) <= set(quantized_parameters(model))


def test_the_residual_scale_weighs_what_the_blocks_add_and_one_is_no_other_trial():
    def logits(scale: float) -> torch.Tensor:
        model = build_classifier(ModelConfig(**TINY["model"], residual_scale=scale), vocabulary=50, labels=5, seed=0)
        tokens = torch.arange(20)[None]
        return model(tokens, torch.tensor([20]))

    # So small a share leaves the average of the embeddings.
    bare = build_classifier(ModelConfig(**TINY["model"]), vocabulary=50, labels=5, seed=0)
    bare.transformer["h"] = torch.nn.ModuleList()
    expected = bare(torch.arange(20)[None], torch.tensor([20]))
    assert torch.allclose(logits(1e-6), expected, atol=1e-4) and not torch.allclose(logits(1.0), expected, atol=1e-4)
    whole, plain = (config(model=TINY["model"] | extra) for extra in ({"residual_scale": 1.0}, {}))
    assert whole.trial_id("x") == plain.trial_id("x") and "residual_scale" not in plain.identity("x")["model"]
    assert config(model=TINY["model"] | {"residual_scale": 0.1}).trial_id("x") != plain.trial_id("x")


@pytest.mark.parametrize(("name", "millions"), [("gpt-10m", 10.6), ("gpt-50m", 49.2)])
def test_the_larger_presets_are_as_large_as_they_say(name: str, millions: float):
    with torch.device("meta"):
        model = build_model(MODELS[name], vocabulary=256, seed=0)
    blocks = sum(p.numel() for key, p in model.named_parameters() if ".h." in key)
    assert blocks / 1e6 == pytest.approx(millions, abs=0.1)


def test_an_encoder_belongs_to_classification_and_words_can_not_write():
    with pytest.raises(ValueError, match="belongs to task='classify'"):
        TrainConfig(model={"encoder": "bert-base-uncased"})
    with pytest.raises(ValueError, match="language modelling takes bytes or bpe"):
        TrainConfig(data={"tokenizer": "words"})


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A tiny BERT with its tokenizer, in a folder as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(
        vocab_file=str(tmp_path / "vocab.txt"), vocab={word: i for i, word in enumerate(words)}
    )
    small = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    folder = tmp_path / "encoder"
    transformers.BertForSequenceClassification(small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_hugging_face_encoder_trains_and_resumes_exactly(encoder: str, tmp_path: Path):
    shape = {"model": {"block": 32, "encoder": encoder}, "data": {"source": "synthetic", "batch": 4}}
    straight = Trainer(config(**shape), folder=tmp_path / "straight")
    straight.run()
    assert len(quantized_parameters(straight.model)) > 5
    assert straight.model.critical_layers() == ("encoder.classifier",)
    first = Trainer(config(**shape), folder=tmp_path / "cut").intervals()
    for _ in range(3):
        next(first)
    first.close()
    resumed = Trainer(config(**shape), folder=tmp_path / "cut")
    resumed.run()
    assert resumed.resumed_from == 10
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True))


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"encoder .*nowhere.* no tokenizer can be loaded"):
        Trainer(config(model={"block": 32, "encoder": str(tmp_path / "nowhere")}))


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'altgrad\[hf\]'"):
        Trainer(config(model={"block": 32, "encoder": "bert-base-uncased"}))
