"""How good drawn images are, and where in the spectrum a model works."""
