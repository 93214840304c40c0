"""ARSG, for both rulesets."""
