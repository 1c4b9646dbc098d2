"""Canonical reduction: training whose bits do not depend on the number of devices or processes."""
