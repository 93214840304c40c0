"""Patch behaviour of DeepSpeed that breaks ARSG, for other optimizers only where `repair` was asked to."""
