"""The papers' networks and the adapters for flax linen and nnx."""
