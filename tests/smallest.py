"""The smallest sweep that trains: what tests of processes and clusters run, where the numbers do not matter."""

SMALLEST = {
    "formats": ["E5M2"],
    "optimizers": ["adamw"],
    "guards": "off",
    "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
    "data": {"batch": 2, "eval_batches": 1},
    "log_interval": 10,
    "eval_interval": 500,
    "checkpoint_interval": 10,
}
