"""Simulations of ECLM and its rivals: data sets, environments, fleets and the Flower app."""
