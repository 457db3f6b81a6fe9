"""The command line. Verbs import torch when they run, not before."""
