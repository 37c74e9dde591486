"""A 50 M parameter GPT on a GPU, one format and arm: `python tests/bench/gpu_study.py --text DOCS.jsonl --out DIR …`.

The trainer as every executor runs it, on real text, guards off so that every run is seen to its end, and every ten
checks a look at the gradient of a float32 shadow. The trial's own record (config, rows, outcome) is what remains; a
line at the end sums it up. Needs torch, triton and pydantic.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from altgrad.training import ARMS, TrainConfig, Trainer
from altgrad.training.config import MODELS


def main() -> None:
    """Trains one configuration and prints how it ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a text, JSONL, parquet or CSV file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--format", default="E5M2")
    parser.add_argument("--arm", default="adamw", choices=list(ARMS))
    parser.add_argument("--policy", default="uniform")
    parser.add_argument("--model", default="gpt-50m", choices=list(MODELS))
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    config = TrainConfig(
        model=MODELS[asked.model],
        data={"source": asked.text, "batch": asked.batch, "eval_batches": 8},
        format=asked.format,
        policy=asked.policy,
        optimizer=ARMS[asked.arm].model_copy(update={"lr": asked.lr}),
        schedule={"kind": "cosine", "warmup": 100},
        steps=asked.steps,
        seed=asked.seed,
        log_interval=20,
        eval_interval=200,
        checkpoint_interval=asked.steps,
        guards=(),
        observe={"shadow_every": 10},
    )
    name = f"{asked.format}-{asked.arm}-{asked.policy}-{asked.seed}".replace("/", "_")
    trainer = Trainer(config, folder=asked.out / name, device=asked.device)
    started = time.perf_counter()
    outcome = trainer.run()
    seconds = time.perf_counter() - started
    cosines = [row["gradient_cosine"] for row in trainer.rows if "gradient_cosine" in row]
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(
        json.dumps(
            {
                "trial": name,
                "kind": outcome.kind,
                "steps": outcome.step,
                "parameters_millions": round(parameters, 1),
                "first_loss": trainer.rows[0]["train_loss"],
                "val_loss": outcome.val_loss,
                "least_cosine": min(cosines),
                "last_cosine": cosines[-1],
                "nonfinite_rows": sum("nonfinite_layer" in row for row in trainer.rows),
                "seconds": round(seconds, 1),
                "ms_per_step": round(seconds / asked.steps * 1e3, 1),
                "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if asked.device == "cuda" else None,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
