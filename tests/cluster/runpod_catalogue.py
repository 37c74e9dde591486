"""What the simulated RunPod offers: GPUs with their prices, data centers, and what a pod in each state allows."""

PRICES = {
    "NVIDIA RTX A4000": 0.25,
    "NVIDIA RTX A4500": 0.25,
    "NVIDIA RTX A5000": 0.27,
    "NVIDIA L4": 0.39,
    "NVIDIA GeForce RTX 3090": 0.46,
    "NVIDIA A40": 0.40,
    "NVIDIA H100 80GB HBM3": 2.69,
    "NVIDIA H100 PCIe": 2.39,
    "NVIDIA H200": 3.59,
    "NVIDIA A100-SXM4-80GB": 1.49,
    "NVIDIA A100 80GB PCIe": 1.39,
    "NVIDIA L40S": 0.86,
    "NVIDIA GeForce RTX 4090": 0.69,
}
"""USD an hour, in the order of magnitude of the real ones."""
DATA_CENTERS = {"EU-RO-1": True, "EU-CZ-1": True, "US-KS-2": True, "US-IL-1": True, "CA-MTL-3": True, "US-OLD-1": False}
"""With whether they have global networking."""
STATUS_ACTIONS = {
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
}
