"""The DyART method: boundary search, margin gradient, losses, attacks, averaging, experiment folder."""
