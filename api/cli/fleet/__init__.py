"""The workers of one machine: where each runs, kept running, replaced, watched."""
