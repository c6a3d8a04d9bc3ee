"""Discovery: stage 1 (delta.py), stage 2 (screen.py), stage 3 (rank.py), and the two ways to measure an effect (effects.py)."""
