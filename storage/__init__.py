"""What runs and datasets both need of a disk: atomic writing, bounded reading, one lock. It knows neither of them."""
