"""What makes a training a run that can be trusted: its settings, folder, checkpoints and state.

The scripts and the wings evaluation/ and analysis/ build on it; dyart/, models/ and data/ know nothing of it.
"""
