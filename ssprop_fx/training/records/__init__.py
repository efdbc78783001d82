"""Records: what a run writes down."""
