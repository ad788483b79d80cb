"""Calibration tokens on their way through the graph by stages, and the statistics they leave."""
