"""LoRA of all adapters of a batch: device tables, work items, and the launchers of the kernels that take them."""
