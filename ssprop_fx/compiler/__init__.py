"""Compiler: from a graph that Dynamo captured to a compiled graph with keep counts."""
