"""RemoteObservation around AdamW, for both rulesets."""
