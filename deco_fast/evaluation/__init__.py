"""How good drawn images are."""
