"""Compiler: turns a graph that Dynamo captured into a compiled graph with keep counts."""
