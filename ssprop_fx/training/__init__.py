"""Training of image classifiers with scheduled sparse back-propagation."""
