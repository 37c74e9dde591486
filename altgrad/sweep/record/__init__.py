"""What is kept: the ledger, a sweep's folder, exports, W&B, and what can be asked of them."""
