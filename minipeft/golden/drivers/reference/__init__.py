"""The NumPy column."""
