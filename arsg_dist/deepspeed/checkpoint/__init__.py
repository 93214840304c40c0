"""Save and load DeepSpeed engines' state, and read DeepSpeed's checkpoint files."""
