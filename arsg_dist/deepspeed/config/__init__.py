"""Read, check and explain DeepSpeed configs for ARSG."""
