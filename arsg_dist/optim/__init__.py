"""The ARSG method: reference rule, optimizer and schedulers (torch only)."""
