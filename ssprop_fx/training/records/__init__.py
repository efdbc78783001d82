"""The records that a run writes."""
