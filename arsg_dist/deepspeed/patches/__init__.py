"""Patch behaviour of DeepSpeed 0.19.8 that breaks ARSG, for no other optimizer."""
