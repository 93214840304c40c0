"""Submissions of ARSG and of RemoteObservation around AdamW to AlgoPerf: docs/algoperf.md."""
