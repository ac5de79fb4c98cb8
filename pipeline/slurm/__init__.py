"""Runs as jobs of a Slurm cluster: their graph, scripts, submission and states. Imports no torch."""
