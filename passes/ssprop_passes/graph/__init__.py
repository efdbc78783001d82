"""Graph: what every pass on a graph shares."""
