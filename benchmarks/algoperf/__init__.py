"""Submissions of ARSG and of RemoteObservation around AdamW to AlgoPerf's training-algorithms benchmark: docs/algoperf.md."""
