"""Graph: what all passes share."""
