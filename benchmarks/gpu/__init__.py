"""A GPU's figures in ten minutes: stages in order of worth, each in a process of its own."""
