"""Galaxy morphology from few labels, in a notebook."""
__version__ = "0.1.0"
